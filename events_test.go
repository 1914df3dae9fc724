package fsbroker_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() { caddy.RegisterModule(eventGate{}) }

// eventGate is an event handler that waits. Then it returns the error of its context.
type eventGate struct{}

// events says that an event waits, and lets it go on.
var events struct{ waits, goOn chan struct{} }

func (eventGate) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.gate", New: func() caddy.Module { return new(eventGate) }}
}

func (eventGate) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (eventGate) Handle(ctx context.Context, _ caddy.Event) error {
	close(events.waits)
	<-events.goOn
	return ctx.Err()
}

var _ caddyevents.Handler = eventGate{}

// A reload loses no event: neither for the handler that has it at the moment, nor for those after it.
func TestEventDuringReload(t *testing.T) {
	events.waits, events.goOn = make(chan struct{}), make(chan struct{})
	broker := newForgetful(t, 100*time.Millisecond, time.Hour)
	s := startWithAdmin(t, proxied(broker.URL, "", harvesting), "events {\non fsbroker_report_finished gate\non fsbroker_report_finished record\n}")
	id := s.submit()
	within(t, "the event", events.waits)
	s.load(proxied(broker.URL, "", harvesting+"\ntimeout 20s"))
	close(events.goOn)
	s.wantNothingPending()
	wantEvents(t, fmt.Sprintf("default tester %s / %s file of %s", id, sumOf(id), id))
	if lines := s.logged("handler error"); len(lines) > 0 {
		t.Errorf("the context of the handler ended: %v", lines)
	}
}
