package fsbroker_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() { caddy.RegisterModule(eventRecorder{}) }

// eventRecorder is an event handler that notes what it hears.
type eventRecorder struct{}

var heard struct {
	sync.Mutex
	events []string
}

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.record", New: func() caddy.Module { return new(eventRecorder) }}
}

func (eventRecorder) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (eventRecorder) Handle(_ context.Context, e caddy.Event) error {
	heard.Lock()
	defer heard.Unlock()
	heard.events = append(heard.events, fmt.Sprintf("%s of %v: %v %v at %v, since %v",
		e.Name(), e.Origin().CaddyModule().ID, e.Data["role"], e.Data["node"], e.Data["address"], e.Data["reason"]))
	return nil
}

var _ caddyevents.Handler = eventRecorder{}

// recordEvents are global options, with which heard hears the events of nodes.
const recordEvents = "events {\non fsbroker_node_unhealthy record\non fsbroker_node_healthy record\n}"

// wantEvents checks what was heard since the last time.
func wantEvents(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	eventually(t, fmt.Sprintf("%d events", len(want)), func() bool {
		heard.Lock()
		defer heard.Unlock()
		got = append(got, heard.events...)
		heard.events = nil
		return len(got) >= len(want)
	})
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("heard\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// sick answers well to anything but /system-info.
func sick(status int, body string) http.HandlerFunc {
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
		true:  {`node_up{address="` + host + `",node="node-1",role="node"}`: "1"},
		false: {`node_up{address="` + host + `",node="node-1",role="node"}`: "0"},
	}
	event := func(kind, reason string) string {
		return fmt.Sprintf("fsbroker_node_%s of http.handlers.fsbroker_task: node node-1 at %s, since %s", kind, host, reason)
	}
	eventually(t, "a few checks", func() bool { return len(node.requests()) >= 3 })
	if q := node.requests()[0]; q.Path != "/system-info" || q.Query().Get("secret") != nodeSecret {
		t.Errorf("the node was asked %s", q)
	}
	s.wantMetrics(nil, up[true])

	for name, answer := range map[string]struct {
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
			node.setHandler(sick(answer.status, answer.body))
			wantEvents(t, event("unhealthy", answer.reason))
			s.wantMetrics(nil, up[false])
			// Questions go on, and are no reason to think better of it.
			s.get(pair+"&nocache").wantStatus(t, http.StatusOK)
			s.wantMetrics(nil, up[false])
			node.setHandler(sick(http.StatusOK, "{}"))
			wantEvents(t, event("healthy", answer.reason))
			s.wantMetrics(nil, up[true])
		})
	}
	if warnings := s.logged("fails"); len(warnings) != 7 {
		t.Errorf("want 7 warnings, one for each change: %v", warnings)
	}
	broker.wantRequests(t, 0)
	s.wantNoSecretInLog()
}

// A check that cannot connect spares callers the try, and one that can ends that.
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

// Without checks, what questions find is told as well, and the node is asked nothing else.
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

// A check that waits for its answer ends with its configuration.
func TestHealthChecksEnd(t *testing.T) {
	asked, gone := make(chan bool, 1), make(chan bool, 1)
	node := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		asked <- true
		<-r.Context().Done()
		gone <- true
	})
	s := startWithAdmin(t, options(node, "health_interval 1h\nhealth_timeout 1h"), recordEvents)
	<-asked
	s.load("respond 404")
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Error("the check goes on")
	}
	wantEvents(t)
}
