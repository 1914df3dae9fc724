package fsbroker_test

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

func TestReloadKeepsReports(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	for i := range 5 {
		s.load(options(node, fmt.Sprintf("timeout %ds\ncache {\n max_size %dMiB\n }", i+1, i+1)))
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	}
	// A configuration that does not load changes nothing.
	if err := s.tryLoad(options(node, "broker 127.0.0.1:1 {env.NOT_SET}")); err == nil {
		t.Error("a broker with an empty secret was accepted")
	}
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	node.wantRequests(t, 1)
	if n := fsbroker.NamespaceUsers("default"); n != 1 {
		t.Errorf("%d handlers hold the store, want the one that runs", n)
	}
	// The cache ends with the last handler.
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := fsbroker.NamespaceUsers("default"); n != 0 {
		t.Errorf("%d handlers hold the store, though none runs", n)
	}
}

// A configuration that does not start changes nothing of what operators see: the one before goes on.
func TestReloadThatDoesNotStart(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	other := newBackend(t, nil)
	taken := newListener(t)
	s := startWithAdmin(t, options(node, harvesting+"\ncache {\n storage\n }"), "")
	s.get(pair).wantStatus(t, http.StatusOK)
	s.wantQueueEmpty()
	_, nodes := s.requestAdmin(http.MethodGet, "/fsbroker/nodes")
	_, cache := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
	_, pending := s.requestAdmin(http.MethodGet, "/fsbroker/harvest")
	gauges := func() map[string]string {
		all := s.scrape()
		maps.DeleteFunc(all, func(series, _ string) bool {
			return regexp.MustCompile(`_(total|bucket|sum|count)\b`).MatchString(series)
		})
		return all
	}
	before := gauges()
	if len(before) < 8 {
		t.Fatalf("there are only the gauges %v", before)
	}
	for range 20 {
		err := testsite.Load([]byte(s.withAdmin(options(other, harvesting+"\ncache {\n storage\n max_size 1MiB\n }") +
			"\n}\n\nhttp://" + taken.Addr().String() + " {\n respond ok")))
		if err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Fatalf("the configuration starts, or fails with %v", err)
		}
		s.wantAdmin(http.MethodGet, "/fsbroker/nodes", http.StatusOK, strings.TrimSpace(nodes))
		s.wantAdmin(http.MethodGet, "/fsbroker/cache", http.StatusOK, strings.TrimSpace(cache))
		s.wantAdmin(http.MethodGet, "/fsbroker/harvest", http.StatusOK, strings.TrimSpace(pending))
		if after := gauges(); !maps.Equal(before, after) {
			t.Fatalf("the gauges were\n%v\nand are\n%v", before, after)
		}
	}
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	if n := fsbroker.NamespaceUsers("default"); n != 1 {
		t.Errorf("%d configurations use the namespace, want the one that runs", n)
	}
}

// An instance without a name that lasts is warned of when it begins to follow anything, and not at each reload.
func TestReloadWithoutAnInstanceName(t *testing.T) {
	home := t.TempDir()
	t.Setenv("XDG_DATA_HOME", home)
	if err := os.MkdirAll(filepath.Join(home, "caddy"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "caddy", "instance.uuid"), []byte("not a UUID"), 0o600); err != nil {
		t.Fatal(err)
	}
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, harvesting))
	for i := range 3 {
		s.load(options(node, fmt.Sprintf("%s\ntimeout %ds", harvesting, i+1)))
	}
	if n := strings.Count(string(readFile(t, s.logFile())), "this instance has no name that lasts"); n != 1 {
		t.Errorf("the log has %d warnings, want 1", n)
	}
	// It is warned of again when it begins anew.
	s.load(options(node, ""))
	s.load(options(node, harvesting))
	if n := strings.Count(string(readFile(t, s.logFile())), "this instance has no name that lasts"); n != 2 {
		t.Errorf("the log has %d warnings, want 2", n)
	}
}

func TestReloadWhileRequestsAreInFlight(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, document)))
	broker := newBackend(t, g.then(explains(`{"appServerID":"node-1","taskID":"t2"}`)))
	s := startSite(t, options(node, brokerOption(broker)))

	var wg sync.WaitGroup
	request := func(path string) {
		replies := s.goGet(path)
		wg.Go(func() {
			if r := <-replies; r.status != http.StatusOK || string(r.body) != document {
				t.Errorf("%s: status %d: %s", path, r.status, r.body)
			}
		})
	}
	request(pair)
	request("/task?submitID=s1") // its configuration is cleaned up before it requests the node
	within(t, "the first request", g.entered)
	within(t, "the second request", g.entered)
	for i := range 3 {
		s.load(options(node, brokerOption(broker)+"\npoll_interval 3s"))
		request(pair)
		wantHeld(t, 2+i+1)
	}
	close(g.open)
	wg.Wait()
	node.wantRequests(t, 2)
	broker.wantRequests(t, 2) // its report, and why there is none
}

func TestStopWhileRequestsAreInFlight(t *testing.T) {
	g := newGate()
	node := newBackend(t, g.then(nil))
	s := startSite(t, options(node, "timeout 60s"))
	// A short grace period ends while the request is under way.
	s.grace = "200ms"
	s.load(options(node, "timeout 60s"))
	ended := make(chan error, 1)
	go func() {
		_, err := s.try(t.Context(), http.MethodGet, pair, "Authorization: Bearer "+callerSecret)
		ended <- err
	}()
	within(t, "the request", g.entered)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	s.client.CloseIdleConnections()
	node.CloseClientConnections()
	within(t, "the request to be canceled", g.left)
	<-ended
}
