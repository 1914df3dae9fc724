package fsbroker

import (
	"context"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// events emits the events of a configuration.
type events struct {
	app     *caddyevents.App
	running atomic.Bool // the configuration has started and has not stopped; no events about upstreams are emitted otherwise
}

// emitter emits the events of a site.
type emitter struct {
	*events
	namespace string
	ctx       caddy.Context // of the handler that is the origin of the events
	logger    *zap.Logger
}

// changed emits an event about an upstream. The reason is the code of the failure that began or ended. If an event handler
// panics, the request that has caused the event goes on.
func (e *emitter) changed(u *upstream.Upstream, event, reason string) {
	if !e.running.Load() {
		return
	}
	_ = guard.Do(e.logger, func() error {
		e.app.Emit(e.ctx, event, map[string]any{
			"namespace": e.namespace, "role": u.Role.String(), "node": u.Name, "address": u.Host(), "reason": reason,
		})
		return nil
	})
}

// finished emits the event that a report is finished and kept. The end of the configuration does not interrupt it: the event
// is emitted once, so its handlers would miss it.
func (e *emitter) finished(t harvest.Target) {
	ctx := e.ctx
	ctx.Context = context.WithoutCancel(ctx.Context)
	e.app.Emit(ctx, "fsbroker_report_finished", map[string]any{
		"namespace": e.namespace, "client": t.Client, "submit_id": t.SubmitID,
		"node": t.AppServerID, "task_id": t.TaskID, "sha256": t.SHA256, "name": t.Name,
	})
}
