package fsbroker

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"slices"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// requestInfo is what placeholders and the access log show of a request. It is attached when the request comes in, and
// complete before the response is written: header fields of the response may contain the placeholders.
type requestInfo struct {
	client   *client          // nil without a valid secret
	node     *upstream.Origin // whose report it is; nil if that is not known
	cache    outcome
	upstream problem.Role // of the upstream that answered; none if the report was kept

	vary [1]string // of the response; here it takes no allocation of its own
}

// newRequestInfo attaches a requestInfo to r, which is a request to server. Placeholders and the access log read it only
// when they are used: setting every value in advance would cost a hit as much as all the rest of it
// (BenchmarkRequestInfo).
func newRequestInfo(r *http.Request, server *caddyhttp.Server) *requestInfo {
	info := new(requestInfo)
	ctx := r.Context()
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(info.placeholder)
	}
	if server != nil && server.Logs != nil {
		if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
			extra.Add(zap.Inline(info))
		}
	}
	return info
}

// placeholder is a caddy.ReplacerFunc. An unknown value is empty: some directives show a placeholder without a value as
// it is written.
func (i *requestInfo) placeholder(name string) (any, bool) {
	switch name {
	case "http.fsbroker.client":
		return i.clientName(), true
	case "http.auth.user.id":
		return i.clientName(), i.client != nil
	case "http.fsbroker.cache":
		return i.cache.String(), true
	case "http.fsbroker.node":
		return i.nodeName(), true
	case "http.fsbroker.upstream":
		return i.upstream.String(), true
	}
	return nil, false
}

// clientName returns the name of the client. It is empty without a valid secret.
func (i *requestInfo) clientName() string {
	if i.client == nil {
		return ""
	}
	return i.client.name
}

// nodeName returns the application server ID of the node. It is empty if the node is not known.
func (i *requestInfo) nodeName() string {
	if i.node == nil {
		return ""
	}
	return i.node.Name
}

// MarshalLogObject implements zapcore.ObjectMarshaler.
func (i *requestInfo) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if name := i.clientName(); name != "" {
		enc.AddString("fsbroker_client", name)
	}
	enc.AddString("fsbroker_cache", i.cache.String())
	if name := i.nodeName(); name != "" {
		enc.AddString("fsbroker_node", name)
	}
	if i.upstream != problem.RoleNone {
		enc.AddString("fsbroker_upstream", i.upstream.String())
	}
	return nil
}

// unsolicited begins what net/http prints to the standard logger about an upstream that sends something unasked on an idle
// connection. It goes on with what the upstream sent, which may be an echo of a request with a secret. Nothing else that
// net/http prints holds what an upstream sent.
var unsolicited = []byte("Unsolicited response received on idle HTTP channel starting with ")

// stdLogFilter is an output of the standard logger that leaves out what an upstream sent.
type stdLogFilter struct{ io.Writer }

// filterStdLog puts a filter in front of the output of the standard logger, unless there is one already. Caddy replaces the
// output when a configuration has a sink for it.
func filterStdLog() {
	if w := log.Writer(); !isFilter(w) {
		log.SetOutput(stdLogFilter{w})
	}
}

func isFilter(w io.Writer) bool {
	_, ok := w.(stdLogFilter)
	return ok
}

// Write implements io.Writer.
func (f stdLogFilter) Write(line []byte) (int, error) {
	if before, _, ok := bytes.Cut(line, unsolicited); ok {
		shortened := slices.Concat(before, unsolicited, []byte("(left out)\n"))
		if _, err := f.Writer.Write(shortened); err != nil {
			return 0, err
		}
		return len(line), nil
	}
	return f.Writer.Write(line)
}

// Interface guard
var _ zapcore.ObjectMarshaler = (*requestInfo)(nil)
