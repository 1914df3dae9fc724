package fsbroker

import (
	"net/http"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// record is what placeholders and the access log tell of a request. It is made when the request comes, and complete
// before the answer is written, whose header fields may have the placeholders.
type record struct {
	client *client // nil without a right secret
	cache  outcome
	node   *peer // whose report it is; nil where it is not known
}

// newRecord lets placeholders and the access log see the record of r. They look into it when they want to know: setting
// what most requests never need would cost a hit as much as all the rest of it, and so would a field for a log that
// nobody keeps (BenchmarkRecord).
func newRecord(r *http.Request) *record {
	rec := new(record)
	ctx := r.Context()
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(rec.placeholder)
	}
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok && server.Logs != nil {
		if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
			extra.Add(zap.Inline(rec))
		}
	}
	return rec
}

// placeholder is a caddy.ReplacerFunc. What is not known is empty, since some directives would show a placeholder that
// has no value as it is written.
func (rec *record) placeholder(name string) (any, bool) {
	switch name {
	case "http.fsbroker.client":
		return rec.clientName(), true
	case "http.auth.user.id":
		return rec.clientName(), rec.client != nil
	case "http.fsbroker.cache":
		return rec.cache.String(), true
	case "http.fsbroker.node":
		return rec.nodeName(), true
	}
	return nil, false
}

func (rec *record) clientName() string {
	if rec.client == nil {
		return ""
	}
	return rec.client.name
}

func (rec *record) nodeName() string {
	if rec.node == nil {
		return ""
	}
	return rec.node.name
}

// MarshalLogObject implements zapcore.ObjectMarshaler.
func (rec *record) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if name := rec.clientName(); name != "" {
		enc.AddString("fsbroker_client", name)
	}
	enc.AddString("fsbroker_cache", rec.cache.String())
	if name := rec.nodeName(); name != "" {
		enc.AddString("fsbroker_node", name)
	}
	return nil
}

// recommendBearer warns of a client that sends its secret in a query, once for each configuration.
func (h *Handler) recommendBearer(c *client) {
	if c.warned.Load() || c.warned.Swap(true) {
		return
	}
	h.logger.Warn("a client sends its secret in the query, which ends up in logs: have it send Authorization: Bearer <secret> instead",
		zap.String("client", c.name))
}
