package fsbroker_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() { caddy.RegisterModule(eventRecorder{}) }

// eventRecorder is an event handler that records events in the recording of the site for which it was made. So what a configuration
// emits at its end is not taken for an event of the next test.
type eventRecorder struct{ recording *recording }

// recording has the events since the last call of wantEvents.
type recording struct {
	sync.Mutex
	events []string
}

// recorded is the recording of the newest site.
var recorded atomic.Pointer[recording]

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.record", New: func() caddy.Module { return &eventRecorder{recorded.Load()} }}
}

func (eventRecorder) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (r eventRecorder) Handle(_ context.Context, e caddy.Event) error {
	r.recording.Lock()
	defer r.recording.Unlock()
	text := fmt.Sprintf("%s of %v: %v %v at %v, since %v",
		e.Name(), e.Origin().CaddyModule().ID, e.Data["role"], e.Data["node"], e.Data["address"], e.Data["reason"])
	if e.Name() == "fsbroker_report_finished" {
		text = fmt.Sprintf("%v %v %v %v/%v %v %v",
			e.Data["namespace"], e.Data["client"], e.Data["submit_id"], e.Data["node"], e.Data["task_id"], e.Data["sha256"], e.Data["name"])
	}
	r.recording.events = append(r.recording.events, text)
	return nil
}

var _ caddyevents.Handler = eventRecorder{}

// recordEvents are the global options that record the events of nodes.
const recordEvents = "events {\non fsbroker_node_unhealthy record\non fsbroker_node_healthy record\n}"

// recordFinished are the global options that record the events of finished reports.
const recordFinished = "events {\non fsbroker_report_finished record\n}"

// wantEvents checks the events since its last call.
func wantEvents(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	current := recorded.Load()
	eventually(t, fmt.Sprintf("%d events", len(want)), func() bool {
		current.Lock()
		defer current.Unlock()
		got = append(got, current.events...)
		current.events = nil
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
	s := startWithAdmin(t, options(node, brokerOption(broker)+"\nhealth_interval 20ms\nhealth_timeout 1m"), recordEvents)
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

// A node that has refused the secret, and that is not asked for reports any more, is healthy again when it accepts the secret
// in a check.
func TestChecksEndARefusedSecret(t *testing.T) {
	node := newBackend(t, systemInfo)
	host := node.Listener.Addr().String()
	s := startWithAdmin(t, options(node, "fail_duration 1ms\nhealth_interval 20ms"), recordEvents)
	node.setHandler(responds(http.StatusUnauthorized, ""))
	s.get(pair).wantProblem(t, http.StatusBadGateway, "node_refused_secret")
	node.setHandler(systemInfo)
	var want []string
	for _, kind := range []string{"unhealthy", "healthy"} {
		want = append(want, fmt.Sprintf("fsbroker_node_%s of http.handlers.fsbroker_task: node node-1 at %s, since node_refused_secret", kind, host))
	}
	wantEvents(t, want...)
	s.wantMetrics(nil, map[string]string{`node_up{address="` + host + `",namespace="default",node="node-1",role="node"}`: "1"})
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

// A node that answers nonsense is logged, with the cause, and is not said to be healthy.
func TestFailingNodeIsSeen(t *testing.T) {
	const leak = "what the node sent " + nodeSecret
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		code    string
		cause   string
	}{
		"the status 500":      {responds(http.StatusInternalServerError, leak), "bad_answer", "the node answered with the unexpected status 500"},
		"HTML":                {responds(http.StatusOK, "\n<!doctype html>"+leak), "bad_answer", "the node sent something that looks like HTML and is not a report: its operator checks that its address is that of the node"},
		"nonsense":            {responds(http.StatusOK, leak), "bad_answer", "the node sent something that is not a report: it is not JSON, or it is incomplete (byte 0)"},
		"an empty answer":     {responds(http.StatusOK, ""), "bad_answer", "the node sent something that is not a report: it is empty"},
		"nothing":             {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "timeout", "the node did not answer within 200ms"},
		"a closed connection": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "bad_answer", "the node closed the connection without an answer"},
		"half an answer":      {halfAnAnswer, "bad_answer", "the node did not finish its answer"},
		"something else":      {notHTTP(leak), "bad_answer", "the node sent something that is not HTTP"},
		"the status 400":      {responds(http.StatusBadRequest, leak), "rejected_request", "the node answered with the status 400: perhaps it refused the secret that is configured for it, or does not accept the IDs: check the IDs; its operator checks secret and secret_in"},
		"the status 503":      {responds(http.StatusServiceUnavailable, leak), "overloaded", "the node answered with the status 503: it is overloaded"},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				node := newBackend(t, test.handler)
				host := node.Listener.Addr().String()
				s := startWithAdmin(t, options(node, "timeout 200ms\nhealth_timeout 200ms\nfail_duration 50ms"), recordEvents)
				before := s.scrape()
				for i := range 5 {
					if r := s.get(pair); i == 1 {
						r.wantProblem(t, r.status, "node_"+test.code)
						r.wantHeader(t, "Retry-After", map[bool]string{true: "", false: "1"}[test.code == "rejected_request"])
					}
				}
				lines := s.logged("node fails")
				if len(lines) != 1 || lines[0]["level"] != "warn" || lines[0]["node"] != "node-1" || lines[0]["code"] != "node_"+test.code || lines[0]["cause"] != test.cause {
					t.Errorf("the log has %v, want one line with %s: %s", lines, test.code, test.cause)
				}
				_, state := s.requestAdmin(http.MethodGet, "/fsbroker/nodes")
				want := "unhealthy"
				if test.code == "overloaded" { // which passes
					want = "degraded"
				}
				if !strings.Contains(state, `"state":"`+want+`","last_problem":{"code":"node_`+test.code+`","cause":"`+test.cause+`"`) {
					t.Errorf("the node is %s", state)
				}
				up := `node_up{address="` + host + `",namespace="default",node="node-1",role="node"}`
				s.wantMetrics(before, map[string]string{
					up: map[string]string{"unhealthy": "0", "degraded": "1"}[want], `questions_total{node="node-1",outcome="` + test.code + `",role="node"}`: "5",
				})

				node.setHandler(systemInfo)
				s.get(pair).wantStatus(t, http.StatusOK)
				eventually(t, "the log to say that it is over", func() bool { return len(s.logged("node answers again")) == 1 })
				s.wantMetrics(nil, map[string]string{up: "1"})
				var events []string
				if want == "unhealthy" {
					for _, kind := range []string{"unhealthy", "healthy"} {
						events = append(events, fmt.Sprintf("fsbroker_node_%s of http.handlers.fsbroker_task: node node-1 at %s, since node_%s", kind, host, test.code))
					}
				}
				wantEvents(t, events...)
				s.wantNoSecretInLog()
				if log := fmt.Sprint(s.logged("")); strings.Contains(log, "what the node sent") {
					t.Errorf("the log holds what the node sent: %s", log)
				}
			})
		})
	}
}

// halfAnAnswer is the handler of a backend that breaks off.
func halfAnAnswer(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "1000")
	_, _ = w.Write([]byte(`{"result":`))
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// notHTTP returns the handler of a backend that does not speak HTTP.
func notHTTP(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = conn.Write([]byte(text + "\r\n\r\n"))
		_ = conn.Close()
	}
}
