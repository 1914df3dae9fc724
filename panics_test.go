package fsbroker_test

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() {
	caddy.RegisterModule(panickingProxy{})
	caddy.RegisterModule(panickingEvents{})
}

// panickingProxy is a module of the transport that panics with the URL of the request, as panics says.
type panickingProxy struct{}

// panics is when panickingProxy panics: when there is a request to the backend, and the channel is closed.
var panics struct {
	sync.Mutex
	backend *backend
	now     <-chan struct{}
}

// closed is a channel that is closed.
var closed = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// panicFor makes panickingProxy panic for requests to a backend once a channel is closed, until the test ends or mend is
// called.
func panicFor(t *testing.T, b *backend, now <-chan struct{}) (mend func()) {
	set := func(b *backend, now <-chan struct{}) {
		panics.Lock()
		defer panics.Unlock()
		panics.backend, panics.now = b, now
	}
	set(b, now)
	mend = func() { set(nil, nil) }
	t.Cleanup(mend)
	return mend
}

func (panickingProxy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.network_proxy.panics", New: func() caddy.Module { return new(panickingProxy) }}
}

func (panickingProxy) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (panickingProxy) ProxyFunc() func(*http.Request) (*url.URL, error) {
	return func(r *http.Request) (*url.URL, error) {
		panics.Lock()
		b, now := panics.backend, panics.now
		panics.Unlock()
		if b == nil || r.URL.Host != host(b) {
			return nil, nil
		}
		<-now
		panic(r.URL)
	}
}

// panickingEvents is an event handler that panics.
type panickingEvents struct{}

func (panickingEvents) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.panics", New: func() caddy.Module { return new(panickingEvents) }}
}

func (panickingEvents) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (panickingEvents) Handle(_ context.Context, e caddy.Event) error { panic(e.Data) }

var (
	_ caddy.ProxyFuncProducer = panickingProxy{}
	_ caddyevents.Handler     = panickingEvents{}
)

// host returns the address of a backend.
func host(b *backend) string { return strings.TrimPrefix(b.URL, "http://") }

// panicking are the options of a node whose transport panics when panicFor says so.
func panicking(node *backend, more string) string {
	return options(node, "transport http {\n network_proxy panics\n }\n"+more)
}

// wantPanics checks that the log has that many panics, each with the function that has panicked, and no secret.
func (s *site) wantPanics(want int, function string) {
	s.t.Helper()
	lines := s.waitLogged(want, "panicked")
	if len(lines) != want {
		s.t.Errorf("the log has %d panics, want %d: %v", len(lines), want, lines)
	}
	for _, line := range lines {
		if stack, _ := line["stack"].(string); line["level"] != "error" || !strings.Contains(stack, function) {
			s.t.Errorf("the log does not say that %s has panicked: %v", function, line)
		}
	}
	s.wantNoSecretInLog()
}

// A panic ends one fetch, for all its callers, and nothing else.
func TestPanicInAFetch(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	now := make(chan struct{})
	s := startSite(t, panicking(node, ""))
	mend := panicFor(t, node, now)
	var replies []<-chan reply
	for range 5 {
		replies = append(replies, s.goGet(pair))
	}
	wantHeld(t, len(replies))
	close(now)
	for _, r := range replies {
		(<-r).wantProblem(t, http.StatusInternalServerError, "internal")
	}
	s.wantPanics(1, "panickingProxy")
	mend()
	if r := s.get(pair); string(r.body) != document {
		t.Errorf("after the panic: status %d: %s", r.status, r.body)
	}
	node.wantRequests(t, 1)
	if lines := s.logged("node fails"); len(lines) > 0 {
		t.Errorf("the node is said to fail: %v", lines)
	}
}

// An upstream whose request panics is passed over like one that fails.
func TestPanicIsPassedOver(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, reportOf("other", "SUCCESS")))
	broker := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, panicking(node, brokerOption(broker)))
	panicFor(t, node, closed)
	if r := s.get(pair); string(r.body) != document {
		t.Errorf("status %d: %s", r.status, r.body)
	}
	s.wantPanics(1, "panickingProxy")
}

// A panic while callers wait for a report ends their wait.
func TestPanicWhileWaiting(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startSite(t, panicking(node, "poll_interval 200ms"))
		one, two := s.goGet(pair+"&wait=60"), s.goGet(pair+"&wait=60")
		wantWaiters(t, 2)
		panicFor(t, node, closed)
		for _, r := range []<-chan reply{one, two} {
			(<-r).wantProblem(t, http.StatusInternalServerError, "internal")
		}
		s.wantPanics(1, "panickingProxy")
	})
}

// A panic in a health check, or while the admin API asks a node, says nothing about the node.
func TestPanicInAHealthCheck(t *testing.T) {
	node := newBackend(t, systemInfo)
	mend := panicFor(t, node, closed)
	s := startWithAdmin(t, panicking(node, "health_interval 50ms"), "")
	eventually(t, "a second check", func() bool { return len(s.logged("panicked")) > 1 })
	s.wantAdmin(http.MethodGet, "/fsbroker/nodes", http.StatusOK,
		`[{"namespace":"default","role":"node","node":"node-1","address":"`+host(node)+`","state":"healthy","questions":0,"system_info_problem":"internal"}]`)
	mend()
	eventually(t, "a check that succeeds", func() bool { return len(node.requests()) > 0 })
	s.wantNoSecretInLog()
}

// An event handler that panics holds up nothing: neither what is followed, nor the answer of a node that it is told of.
func TestPanicInAnEventHandler(t *testing.T) {
	broker := newForgetful(t, 100*time.Millisecond, time.Hour)
	s := startWithAdmin(t, proxied(broker.URL, "", harvesting),
		"events {\non fsbroker_report_finished panics\non fsbroker_node_unhealthy panics\n}")
	id := s.submit()
	s.wantNothingPending()
	s.wantPanics(1, "panickingEvents")
	s.wantHarvested(t, id)
	broker.Close()
	s.get("/task?submitID=other").wantProblem(t, http.StatusBadGateway, "broker_unreachable")
	s.wantPanics(2, "panickingEvents")
}

// A storage that panics costs what it would have done, as one does that fails.
func TestPanicInAStorage(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	fault.dir = storageDir(t)
	panicsIn := func(operations string) {
		beforeEach(t, func(operation, key string, _ int) error {
			if strings.Contains(operations, operation) {
				panic("https://storage/?secret=" + nodeSecret + "&key=" + key)
			}
			return nil
		})
	}
	panicsIn("Store Load Delete List Lock Unlock")
	s := startWithAdmin(t, options(node, "cache {\n storage faulty\n }\nharvest"), "")
	s.get(pair).wantStatus(t, http.StatusOK)
	eventually(t, "a panic", func() bool { return len(s.logged("panicked")) > 0 })
	s.wantNoSecretInLog()
	status, body := s.requestAdmin(http.MethodDelete, "/fsbroker/cache")
	if status != http.StatusBadGateway {
		t.Errorf("a purge of a storage that panics: status %d: %s", status, body)
	}
	s.get(pair).wantStatus(t, http.StatusOK)

	// What could not be stored is stored when the storage works again.
	panicsIn("")
	wantStoredIn(t, fault.dir, 1)

	panicsIn("Load")
	s.restart(options(node, "cache {\n storage faulty\n }"))
	s.get(pair).wantStatus(t, http.StatusOK)
	node.setHandler(responds(http.StatusNotFound, ""))
	s.get("/task?appServerID=node-1&taskID=t2").wantProblem(t, http.StatusServiceUnavailable, "storage_unavailable")
	s.wantNoSecretInLog()
}
