package fsbroker_test

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"
)

func TestOneRequestForAllCallers(t *testing.T) {
	const callers = 200
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, document)))
	s := startSite(t, options(node, ""))

	var wg sync.WaitGroup
	statuses := make([]string, callers)
	for i := range callers {
		wg.Go(func() {
			r := s.get(pair)
			if r.status != http.StatusOK || string(r.body) != document {
				t.Errorf("status %d: %s", r.status, r.body)
			}
			statuses[i] = r.header.Get("Cache-Status")
		})
	}
	within(t, "the question", g.entered)
	time.Sleep(100 * time.Millisecond)
	close(g.open)
	wg.Wait()
	node.wantRequests(t, 1)
	counts := map[string]int{}
	for _, status := range statuses {
		counts[status]++
	}
	if counts["fsbroker; fwd=uri-miss; stored"] != 1 || counts["fsbroker; fwd=uri-miss; collapsed"] == 0 {
		t.Errorf("the callers were told %v", counts)
	}
}

func TestCallersThatLeave(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, document)))
	s := startSite(t, options(node, ""))
	bearer := "Authorization: Bearer " + callerSecret

	// One who leaves does not take the answer away from the other.
	impatient, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := s.try(impatient, http.MethodGet, pair, bearer)
		left <- err
	}()
	within(t, "the question", g.entered)
	answered := make(chan reply, 1)
	go func() { answered <- s.get(pair) }()
	time.Sleep(100 * time.Millisecond)
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller left with %v", err)
	}
	time.Sleep(100 * time.Millisecond)
	close(g.open)
	if r := <-answered; string(r.body) != document {
		t.Errorf("the other got %s", r.body)
	}
	node.wantRequests(t, 1)

	// When all have left, the question is dropped, and one who comes then has it asked again.
	g2 := newGate()
	node.setHandler(g2.then(responds(http.StatusOK, document)))
	impatient, leave = context.WithCancel(t.Context())
	go func() {
		_, err := s.try(impatient, http.MethodGet, pair+"&all", bearer)
		left <- err
	}()
	within(t, "the second question", g2.entered)
	leave()
	<-left
	within(t, "the second question to be dropped", g2.left)
	close(g2.open)
	s.get(pair+"&all").wantStatus(t, http.StatusOK)
	node.wantRequests(t, 3)
}

func TestNocacheJoinsNoEarlierRequest(t *testing.T) {
	stale, fresh := reportOf("t1", "SUCCESS"), reportOf("t1", "SUCCESS", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, stale)))
	s := startSite(t, options(node, ""))

	first := make(chan reply, 1)
	go func() { first <- s.get(pair) }()
	within(t, "the question", g.entered)
	node.setHandler(responds(http.StatusOK, fresh))
	const callers = 20
	rest := make(chan reply, callers)
	for range callers {
		go func() { rest <- s.get(pair + "&nocache") }()
	}
	time.Sleep(200 * time.Millisecond)
	node.wantRequests(t, 1) // one at a time
	close(g.open)
	if r := <-first; string(r.body) != stale {
		t.Errorf("the first got %s", r.body)
	}
	for range callers {
		if r := <-rest; string(r.body) != fresh {
			t.Errorf("a nocache caller got %s", r.body)
		}
	}
	node.wantRequests(t, 2) // and all who had come before it share the second
}
