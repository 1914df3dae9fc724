package fsbroker_test

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"
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
			r, err := s.try(t.Context(), http.MethodGet, pair, "Authorization: Bearer "+callerSecret)
			if err != nil {
				t.Error(err)
				return
			}
			if r.status != http.StatusOK || string(r.body) != document {
				t.Errorf("status %d: %s", r.status, r.body)
			}
			statuses[i] = r.header.Get("Cache-Status")
		})
	}
	within(t, "the request", g.entered)
	wantHeld(t, callers)
	close(g.open)
	wg.Wait()
	node.wantRequests(t, 1)
	counts := map[string]int{}
	for _, status := range statuses {
		counts[status]++
	}
	if counts["fsbroker; fwd=uri-miss; stored"] != 1 || counts["fsbroker; fwd=uri-miss; collapsed"] != callers-1 {
		t.Errorf("the callers got %v", counts)
	}
}

func TestCallersThatLeave(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, document)))
	s := startSite(t, options(node, ""))
	bearer := "Authorization: Bearer " + callerSecret

	// A caller that leaves takes nothing away from the other.
	leaving, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := s.try(leaving, http.MethodGet, pair, bearer)
		left <- err
	}()
	within(t, "the request", g.entered)
	other := s.goGet(pair)
	wantHeld(t, 2)
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller left with %v", err)
	}
	wantHeld(t, 1)
	close(g.open)
	if r := <-other; string(r.body) != document {
		t.Errorf("the other got %s", r.body)
	}
	node.wantRequests(t, 1)

	// When all callers have left, the request is canceled. The next caller causes another.
	g2 := newGate()
	node.setHandler(g2.then(responds(http.StatusOK, document)))
	leaving, leave = context.WithCancel(t.Context())
	go func() {
		_, err := s.try(leaving, http.MethodGet, pair+"&all", bearer)
		left <- err
	}()
	within(t, "the second request", g2.entered)
	leave()
	<-left
	within(t, "the second request to be canceled", g2.left)
	close(g2.open)
	s.get(pair+"&all").wantStatus(t, http.StatusOK)
	node.wantRequests(t, 3)
}

func TestNocacheJoinsNoEarlierRequest(t *testing.T) {
	stale, fresh := reportOf("t1", "SUCCESS"), reportOf("t1", "SUCCESS", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, stale)))
	s := startSite(t, options(node, ""))

	first := s.goGet(pair)
	within(t, "the request", g.entered)
	node.setHandler(responds(http.StatusOK, fresh))
	const callers = 20
	var rest []<-chan reply
	for range callers {
		rest = append(rest, s.goGet(pair+"&nocache"))
	}
	wantHeld(t, 1+callers)
	node.wantRequests(t, 1) // one at a time
	close(g.open)
	if r := <-first; string(r.body) != stale {
		t.Errorf("the first got %s", r.body)
	}
	for _, replies := range rest {
		if r := <-replies; string(r.body) != fresh {
			t.Errorf("a nocache caller got %s", r.body)
		}
	}
	node.wantRequests(t, 2) // all of them share the second one
}
