package fsbroker

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// provisionHealth has the checks begin, and lets events out, when all apps have started: before, nobody could hear them.
func (h *Handler) provisionHealth(ctx caddy.Context) error {
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	h.ctx, h.events = ctx, app.(*caddyevents.App)
	h.checks, h.endChecks = context.WithCancel(context.Background())
	if err := h.events.On("started", starter{h}); err != nil {
		return fmt.Errorf("subscribing to the start: %w", err)
	}
	return nil
}

// starter hears that the configuration of a handler has started.
type starter struct{ handler *Handler }

// Handle implements caddyevents.Handler.
func (s starter) Handle(context.Context, caddy.Event) error {
	h := s.handler
	h.started.Store(true)
	if h.HealthInterval > 0 {
		for _, node := range h.nodes {
			go h.checkRegularly(node)
		}
	}
	return nil
}

// checkRegularly checks a node, now and from time to time, until the handler is cleaned up. That does not wait for it,
// since somebody who handles an event may wait for a new configuration.
func (h *Handler) checkRegularly(node *peer) {
	ticker := time.NewTicker(time.Duration(h.HealthInterval))
	defer ticker.Stop()
	defer h.transport.Transport.CloseIdleConnections()
	for {
		if x, _, err := h.askSystemInfo(h.checks, node); err == nil {
			node.note(byCheck, x)
		}
		select {
		case <-ticker.C:
		case <-h.checks.Done():
			return
		}
	}
}

// systemInfo is what a node tells of itself.
type systemInfo struct {
	Name    string    `json:"name,omitempty"`
	Version string    `json:"version,omitempty"`
	Queue   nodeQueue `json:"queue"`
}

// nodeQueue counts a node's tasks, as far as it does.
type nodeQueue struct {
	Active    *int64 `json:"active,omitempty"`
	Queued    *int64 `json:"queued,omitempty"`
	Completed *int64 `json:"completed,omitempty"`
}

// maxSystemInfo bounds what a node tells of itself, in bytes.
const maxSystemInfo = 1 << 20

// askSystemInfo asks a node how it is, even if it is known to be down. The error says that ctx has ended.
func (h *Handler) askSystemInfo(ctx context.Context, node *peer) (exchange, systemInfo, error) {
	room := h.store.lease()
	defer room.release()
	var info systemInfo
	x, err := node.exchange(ctx, time.Duration(h.HealthTimeout), "system-info", make(url.Values), room, func(body io.Reader) error {
		text, err := io.ReadAll(io.LimitReader(body, maxSystemInfo))
		if err != nil {
			return err
		}
		var doc object
		if err := json.Unmarshal(text, &doc); err != nil || doc == nil {
			return node.problem(http.StatusBadGateway, "bad_answer", "sent something that is not a JSON object: its operator has to correct that")
		}
		info = readSystemInfo(doc)
		return nil
	})
	if err == nil && x.trouble == nil && x.status != http.StatusOK {
		x.trouble = node.problem(http.StatusBadGateway, "bad_answer",
			fmt.Sprintf("answered with status %d, and not with its system information", x.status))
	}
	return x, info, err
}

// readSystemInfo reads what is there.
func readSystemInfo(doc object) systemInfo {
	version, queue := doc.object("versionInfo"), doc.object("queueInfo")
	return systemInfo{
		Name:    version.id("name"),
		Version: version.id("version"),
		Queue: nodeQueue{
			Active:    queue.count("activeCount"),
			Queued:    queue.count("queueCount"),
			Completed: queue.count("completedCount"),
		},
	}
}

// count is a member that is a number, or else nil.
func (o object) count(name string) *int64 {
	n, ok := o.member(name).(float64)
	if !ok {
		return nil
	}
	whole := int64(n)
	return &whole
}

// lapse is something that was wrong with a peer.
type lapse struct {
	Code string    `json:"code"`
	At   time.Time `json:"at"`

	found finder
}

// finder is who found something wrong: whoever did has to find it right again.
type finder int

const (
	byQuestion finder = iota
	byCheck
	byAdmin
	byConnecting // any of them, and any of them will do
)

// note keeps and tells what has changed about the peer: that it fails, and that it no longer does. In a question, a slow
// or senseless answer is one report's trouble and changes nothing; to an admin, it changes nothing at all.
func (p *peer) note(by finder, x exchange) {
	if x.trouble == nil {
		p.noteRecovery(by)
		return
	}
	if x.trouble == busy || by == byAdmin && !x.dialFailed {
		return
	}
	if x.dialFailed {
		by = byConnecting
	}
	now := &lapse{Code: x.trouble.code, At: time.Now(), found: by}
	p.last.Store(now)
	if by == byQuestion && !strings.HasSuffix(now.Code, "_refused_secret") {
		return
	}
	known := p.ailment.Swap(now)
	if known != nil && known.Code == now.Code {
		return
	}
	fields := []zap.Field{zap.String("code", now.Code)}
	if x.dialFailed { // the errors of dialing hold no more than an address; others might hold what the peer sent
		fields = append(fields, zap.NamedError("cause", x.cause), zap.Duration("fail_duration", p.failDuration))
	}
	p.logger.Warn("fails", fields...)
	if known == nil {
		p.emit("fsbroker_node_unhealthy", p, now.Code)
	}
}

// condition is how a peer is, as far as is known.
type condition int

const (
	healthy condition = iota
	unhealthy
	isDown // and not asked for a while
)

func (c condition) String() string { return [...]string{"healthy", "unhealthy", "down"}[c] }

func (p *peer) condition(now time.Time) condition {
	switch {
	case p.down(now) != nil:
		return isDown
	case p.ailment.Load() != nil:
		return unhealthy
	}
	return healthy
}

// noteRecovery notes that the peer does as it should, if what was wrong with it could be seen in that way.
func (p *peer) noteRecovery(by finder) {
	known := p.ailment.Load()
	if known == nil || known.found != by && known.found != byConnecting || !p.ailment.CompareAndSwap(known, nil) {
		return
	}
	p.logger.Info("answers again")
	p.emit("fsbroker_node_healthy", p, known.Code)
}

// emitter tells others of a change of a peer.
type emitter func(event string, p *peer, reason string)

// emit is the emitter of a handler. The reason is the code of what is, or was, wrong.
func (h *Handler) emit(event string, p *peer, reason string) {
	if h.started.Load() && !h.retired.Load() {
		h.events.Emit(h.ctx, event, map[string]any{"role": p.role, "node": p.name, "address": p.base.Host, "reason": reason})
	}
}

// Interface guard
var _ caddyevents.Handler = starter{}
