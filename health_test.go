package fsbroker_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() { caddy.RegisterModule(eventRecorder{}) }

// eventRecorder is an event handler that records events.
type eventRecorder struct{}

// recorded has the events since the last call of wantEvents.
var recorded struct {
	sync.Mutex
	events []string
}

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.record", New: func() caddy.Module { return new(eventRecorder) }}
}

func (eventRecorder) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (eventRecorder) Handle(_ context.Context, e caddy.Event) error {
	recorded.Lock()
	defer recorded.Unlock()
	recorded.events = append(recorded.events, fmt.Sprintf("%s of %v: %v %v at %v, since %v",
		e.Name(), e.Origin().CaddyModule().ID, e.Data["role"], e.Data["node"], e.Data["address"], e.Data["reason"]))
	return nil
}

var _ caddyevents.Handler = eventRecorder{}

// recordEvents are the global options that record the events of nodes.
const recordEvents = "events {\non fsbroker_node_unhealthy record\non fsbroker_node_healthy record\n}"

// wantEvents checks the events since its last call.
func wantEvents(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	eventually(t, fmt.Sprintf("%d events", len(want)), func() bool {
		recorded.Lock()
		defer recorded.Unlock()
		got = append(got, recorded.events...)
		recorded.events = nil
		return len(got) >= len(want)
	})
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// withSystemInfo is like systemInfo, with another response to /system-info.
func withSystemInfo(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/system-info" {
			responds(status, body)(w, r)
			return
		}
		systemInfo(w, r)
	}
}

func TestHealthChecks(t *testing.T) {
	node := newBackend(t, systemInfo)
	broker := newBackend(t, systemInfo)
	host := strings.TrimPrefix(node.URL, "http://")
	s := startWithAdmin(t, options(node, brokerOption(broker)+"\nhealth_interval 20ms\nhealth_timeout 1s"), recordEvents)
	up := map[bool]map[string]string{
		true:  {`node_up{address="` + host + `",namespace="default",node="node-1",role="node"}`: "1"},
		false: {`node_up{address="` + host + `",namespace="default",node="node-1",role="node"}`: "0"},
	}
	event := func(kind, reason string) string {
		return fmt.Sprintf("fsbroker_node_%s of http.handlers.fsbroker_task: node node-1 at %s, since %s", kind, host, reason)
	}
	eventually(t, "three checks", func() bool { return len(node.requests()) >= 3 })
	if q := node.requests()[0]; q.Path != "/system-info" || q.Query().Get("secret") != nodeSecret {
		t.Errorf("the node got a request for %s", q)
	}
	s.wantMetrics(nil, up[true])

	for name, response := range map[string]struct {
		status int
		body   string
		reason string
	}{
		"status":        {http.StatusInternalServerError, "", "node_bad_answer"},
		"nothing":       {http.StatusNoContent, "", "node_bad_answer"},
		"no such path":  {http.StatusNotFound, "", "node_bad_answer"},
		"wrong secret":  {http.StatusUnauthorized, "", "node_refused_secret"},
		"no object":     {http.StatusOK, "[1]", "node_bad_answer"},
		"garbage":       {http.StatusOK, "<html>", "node_bad_answer"},
		"something big": {http.StatusOK, strings.Repeat(" ", 2<<20) + "{}", "node_bad_answer"},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			node.setHandler(withSystemInfo(response.status, response.body))
			wantEvents(t, event("unhealthy", response.reason))
			s.wantMetrics(nil, up[false])
			// The node is still used, and a good response to a caller's request does not make it healthy.
			s.get(pair+"&nocache").wantStatus(t, http.StatusOK)
			s.wantMetrics(nil, up[false])
			node.setHandler(withSystemInfo(http.StatusOK, "{}"))
			wantEvents(t, event("healthy", response.reason))
			s.wantMetrics(nil, up[true])
		})
	}
	if warnings := s.logged("fails"); len(warnings) != 7 {
		t.Errorf("want 7 warnings, one for each change: %v", warnings)
	}
	if q := broker.requests()[0]; q.Path != "/system-info" || q.Query().Get("secret") != brokerSecret {
		t.Errorf("the broker got a request for %s", q)
	}
	s.wantNoSecretInLog()
}

// A check that cannot connect makes callers fail fast, until a check can connect again.
func TestHealthChecksConnect(t *testing.T) {
	node := newBackend(t, systemInfo)
	listener := node.Listener.Addr().String()
	s := startWithAdmin(t, options(node, "health_interval 20ms\nfail_duration 1h"), recordEvents)
	eventually(t, "a check", func() bool { return len(node.requests()) > 0 })
	wantEvents(t)

	node.Close()
	wantEvents(t, "fsbroker_node_unhealthy of http.handlers.fsbroker_task: node node-1 at "+listener+", since node_unreachable")
	s.get(pair).wantProblem(t, http.StatusServiceUnavailable, "node_down")

	restartBackend(t, listener, systemInfo)
	wantEvents(t, "fsbroker_node_healthy of http.handlers.fsbroker_task: node node-1 at "+listener+", since node_unreachable")
	s.get(pair).wantStatus(t, http.StatusOK)
}

// Without checks, callers' requests cause the events, and the node gets no others.
func TestEventsOfRequests(t *testing.T) {
	node := newBackend(t, systemInfo)
	host := node.Listener.Addr().String()
	startWithAdmin(t, options(node, ""), recordEvents).get(pair)
	node.wantRequests(t, 1)

	s := startWithAdmin(t, options(node, "fail_duration 1ms"), recordEvents)
	node.setHandler(responds(http.StatusForbidden, ""))
	for range 3 {
		s.get(pair+"&nocache").wantProblem(t, http.StatusBadGateway, "node_refused_secret")
	}
	wantEvents(t, "fsbroker_node_unhealthy of http.handlers.fsbroker_task: node node-1 at "+host+", since node_refused_secret")
	node.setHandler(systemInfo)
	s.get(pair+"&nocache").wantStatus(t, http.StatusOK)
	wantEvents(t, "fsbroker_node_healthy of http.handlers.fsbroker_task: node node-1 at "+host+", since node_refused_secret")

	node.setHandler(responds(http.StatusInternalServerError, ""))
	s.get(pair+"&nocache").wantProblem(t, http.StatusBadGateway, "node_bad_answer")
	node.Close()
	s.get(pair+"&nocache").wantProblem(t, http.StatusBadGateway, "node_unreachable")
	wantEvents(t, "fsbroker_node_unhealthy of http.handlers.fsbroker_task: node node-1 at "+host+", since node_unreachable")
}

// A check that waits for a response ends with its configuration.
func TestHealthChecksEnd(t *testing.T) {
	g := newGate()
	node := newBackend(t, g.then(nil))
	s := startWithAdmin(t, options(node, "health_interval 1h\nhealth_timeout 1h"), recordEvents)
	within(t, "a check", g.entered)
	s.load("respond 404")
	within(t, "the check to be canceled", g.left)
	wantEvents(t)
}
