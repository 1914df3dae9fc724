package fsbroker

import (
	"net/http"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// record is what the access log tells of a request.
type record struct {
	client *client // nil without a right secret
	cache  outcome
	node   *peer // whose report it is; nil where it is not known
}

// announce makes placeholders and fields of the access log of what came of a request. It comes before the answer, whose
// header fields may have the placeholders. It is one field for the log, since adding each costs as much as all.
func announce(r *http.Request, rec record) {
	ctx := r.Context()
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		// Some directives would show a placeholder that nobody has set as it is written.
		var node any = ""
		if rec.node != nil {
			node = rec.node.boxedName
		}
		if rec.client == nil {
			repl.Set("http.fsbroker.client", "")
		}
		repl.Set("http.fsbroker.cache", outcomeNames[rec.cache])
		repl.Set("http.fsbroker.node", node)
	}
	if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Add(zap.Inline(rec))
	}
}

// MarshalLogObject implements zapcore.ObjectMarshaler.
func (rec record) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if rec.client != nil {
		enc.AddString("fsbroker_client", rec.client.name.(string))
	}
	enc.AddString("fsbroker_cache", rec.cache.String())
	if rec.node != nil {
		enc.AddString("fsbroker_node", rec.node.name)
	}
	return nil
}

// recommendBearer warns of a client that sends its secret in a query, once for each configuration.
func (h *Handler) recommendBearer(c *client) {
	if c.warned.Load() || c.warned.Swap(true) {
		return
	}
	h.logger.Warn("a client sends its secret in the query, which ends up in logs: have it send Authorization: Bearer <secret> instead",
		zap.String("client", c.name.(string)))
}
