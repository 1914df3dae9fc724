package fsbroker_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

func wantWaiters(t *testing.T, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d callers to wait", want), func() bool { return fsbroker.Waiters() == want })
}

func TestWait(t *testing.T) {
	finished, unfinished := reportOf("t1", "SUCCESS"), reportOf("t1", "IN_PROGRESS")
	node := newBackend(t, responds(http.StatusOK, unfinished))
	s := startSite(t, options(node, "poll_interval 200ms\nmax_wait 15s"))

	applied := map[string]string{}
	answers := map[string]<-chan reply{}
	for name, test := range map[string]struct {
		query   string
		header  []string
		applied string
	}{
		"header":                    {"", []string{"Prefer: wait=10"}, "wait=10"},
		"among other preferences":   {"", []string{`Prefer: respond-async; x="a,b"`, `Prefer: Wait="12"`}, "wait=12"},
		"query":                     {"&wait=11", nil, "wait=11"},
		"query wins":                {"&wait=11", []string{"Prefer: wait=5"}, "wait=11"},
		"more than is allowed":      {"&wait=3600", nil, "wait=15"},
		"more than is imaginable":   {"", []string{"Prefer: wait=99999999999999999999"}, "wait=15"},
		"not to be":                 {"&wait=0", nil, ""},
		"not to be, the query wins": {"&wait=0", []string{"Prefer: wait=5"}, ""},
		"malformed":                 {"", []string{"Prefer: wait=soon"}, ""},
		"malformed, then right":     {"", []string{"Prefer: wait=soon", "Prefer: wait=5"}, ""},
	} {
		applied[name] = test.applied
		answers[name] = s.goGet(pair+test.query, test.header...)
	}
	wantWaiters(t, 6)
	for name, answer := range answers {
		if applied[name] == "" {
			r := <-answer
			r.wantHeader(t, "Preference-Applied", "")
			if string(r.body) != unfinished {
				t.Errorf("%s: status %d: %s", name, r.status, r.body)
			}
		}
	}
	node.setHandler(responds(http.StatusOK, finished))
	for name, answer := range answers {
		if applied[name] != "" {
			r := <-answer
			r.wantHeader(t, "Preference-Applied", applied[name])
			r.wantHeader(t, "Cache-Control", "private, no-cache")
			if string(r.body) != finished {
				t.Errorf("%s: status %d: %s", name, r.status, r.body)
			}
		}
	}
	wantWaiters(t, 0)

	// What is finished needs no waiting.
	r := s.get(pair+"&wait=10", "Prefer: wait=10")
	r.wantHeader(t, "Cache-Status", "fsbroker; hit")
	r.wantHeader(t, "Preference-Applied", "")
}

func TestWaitUntilTimeIsUp(t *testing.T) {
	newest := reportOf("t1", "IN_PROGRESS", "SUCCESS")
	node := newBackend(t, responds(http.StatusNoContent, ""))
	s := startSite(t, options(node, "poll_interval 200ms\nmax_wait 1s"))

	start := time.Now()
	empty, answer := s.goGet("/task?appServerID=node-1&taskID=t2&wait=1"), s.goGet(pair+"&wait=60")
	wantWaiters(t, 2)
	node.setHandler(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("taskID") == "t1" {
			responds(http.StatusOK, newest)(w, r)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	r := <-answer
	if held := time.Since(start); held < time.Second {
		t.Errorf("the answer was held for %s only", held)
	}
	r.wantHeader(t, "Preference-Applied", "wait=1")
	r.wantHeader(t, "Cache-Control", "no-store")
	if string(r.body) != newest {
		t.Errorf("status %d: %s", r.status, r.body)
	}
	r = <-empty
	r.wantStatus(t, http.StatusNoContent)
	r.wantHeader(t, "Preference-Applied", "wait=1")
	r.wantHeader(t, "Retry-After", "1")
}

// However the callers come and the cache's time runs, a report is asked for once in an interval, and not less often.
func TestWaitPollsOnceInAnInterval(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
	broker := newBackend(t, responds(http.StatusOK, `{"appServerID":"node-1","taskID":"t1"}`))
	s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 500ms"))
	s.get(pair)
	time.Sleep(200 * time.Millisecond)
	first, second := s.goGet(pair+"&wait=5"), s.goGet(pair+"&wait=4&serect="+callerSecret)
	time.Sleep(200 * time.Millisecond)
	third := s.goGet("/task?submitID=s1&wait=4")
	for _, answer := range []<-chan reply{first, second, third} {
		(<-answer).wantStatus(t, http.StatusOK)
	}
	if n := len(node.requests()); n < 8 || n > 12 {
		t.Errorf("the node was asked %d questions in about 5 seconds, want about 11", n)
	}
	broker.wantRequests(t, 1)
}

func TestWaitPollsAsSoonAsNothingIsKept(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
	s := startSite(t, options(node, "poll_interval 4s"))
	s.get(pair)
	time.Sleep(3 * time.Second)
	node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	start := time.Now()
	s.get(pair+"&wait=15").wantHeader(t, "Cache-Control", "private, no-cache")
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("the answer took %s, though what was kept was to expire in 1s", took)
	}
	node.wantRequests(t, 2)
}

func TestWaitForSubmission(t *testing.T) {
	finished := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusNoContent, ""))
	broker := newBackend(t, responds(http.StatusOK, `{"state":"QUEUED"}`))
	s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 100ms"))

	answer := s.goGet("/task?submitID=s1&wait=15")
	eventually(t, "the broker to be asked again", func() bool { return len(broker.requests()) > 2 })
	broker.setHandler(responds(http.StatusOK, `{"appServerID":"node-1","taskID":"t1"}`))
	eventually(t, "the node to be asked again", func() bool { return len(node.requests()) > 2 })
	node.setHandler(responds(http.StatusOK, finished))
	if r := <-answer; string(r.body) != finished {
		t.Errorf("status %d: %s", r.status, r.body)
	}
}

func TestWaitEndsWithProblem(t *testing.T) {
	node := newBackend(t, responds(http.StatusNoContent, ""))
	s := startSite(t, options(node, "poll_interval 100ms"))
	for _, nocache := range []string{"", "&nocache"} {
		answers := []<-chan reply{s.goGet(pair + nocache + "&wait=15"), s.goGet(pair + nocache + "&wait=15")}
		wantWaiters(t, 2)
		node.setHandler(responds(http.StatusNotFound, ""))
		for _, answer := range answers {
			(<-answer).wantProblem(t, http.StatusNotFound, "unknown_task")
		}
		// The problem is theirs, and not of one who comes later.
		node.setHandler(responds(http.StatusNoContent, ""))
		answer := s.goGet(pair + nocache + "&wait=1")
		(<-answer).wantStatus(t, http.StatusNoContent)
	}
	s.wantNoSecretInLog()
}

func TestWaitWithIfNoneMatch(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
	s := startSite(t, options(node, "poll_interval 200ms"))
	known := "If-None-Match: " + s.get(pair).header.Get("ETag")

	r := s.get(pair+"&wait=1", known)
	r.wantStatus(t, http.StatusNotModified)
	r.wantHeader(t, "Preference-Applied", "wait=1")

	answer := s.goGet(pair+"&wait=15", known)
	wantWaiters(t, 1)
	node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	r = <-answer
	r.wantStatus(t, http.StatusOK)
	r.wantHeader(t, "Cache-Control", "private, no-cache")
}

func TestWaitWithNocache(t *testing.T) {
	finished := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, finished))
	s := startSite(t, options(node, "poll_interval 100ms"))
	s.get(pair).wantStatus(t, http.StatusOK)

	// The node has begun anew: what is kept is not what such a caller waits for.
	node.setHandler(responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
	before := len(node.requests())
	answer := s.goGet(pair + "&nocache&wait=15")
	eventually(t, "fresh polls", func() bool { return len(node.requests()) > before+3 })
	again := reportOf("t1", "SUCCESS", "FAILED")
	node.setHandler(responds(http.StatusOK, again))
	r := <-answer
	r.wantHeader(t, "Cache-Status", "fsbroker; fwd=request; stored")
	if string(r.body) != again {
		t.Errorf("status %d: %s", r.status, r.body)
	}
}

func TestWaitersThatLeave(t *testing.T) {
	node := newBackend(t, responds(http.StatusNoContent, ""))
	s := startSite(t, options(node, "poll_interval 100ms"))
	wait := func() (leave func()) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = s.try(ctx, http.MethodGet, pair, "Authorization: Bearer "+callerSecret, "Prefer: wait=60")
		}()
		return func() {
			cancel()
			<-ended
		}
	}
	asked := func() int { return len(node.requests()) }

	leaveOne, leaveOther := wait(), wait()
	wantWaiters(t, 2)
	leaveOne()
	wantWaiters(t, 1)
	before := asked()
	eventually(t, "polls for the other", func() bool { return asked() > before+2 })

	// With the last one goes the question that is under way, and no more are asked.
	g := newGate()
	node.setHandler(g.then(nil))
	within(t, "a question", g.entered)
	leaveOther()
	within(t, "the question to be dropped", g.left)
	wantWaiters(t, 0)
	before = asked()
	time.Sleep(500 * time.Millisecond)
	node.wantRequests(t, before)
}

func TestReloadEndsWait(t *testing.T) {
	unfinished := reportOf("t1", "IN_PROGRESS")
	node := newBackend(t, responds(http.StatusOK, unfinished))
	s := startSite(t, options(node, ""))
	answers := []<-chan reply{s.goGet(pair + "&wait=60"), s.goGet("/task?appServerID=node-1&taskID=t2&wait=60")}
	wantWaiters(t, 2)
	start := time.Now()
	s.load(options(node, "max_wait 30s"))
	for _, answer := range answers {
		r := <-answer
		r.wantHeader(t, "Preference-Applied", "wait=60")
		if string(r.body) != unfinished {
			t.Errorf("status %d: %s", r.status, r.body)
		}
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("the waits went on for %s", took)
	}

	// One who comes back goes on waiting with the new configuration.
	answer := s.goGet(pair + "&wait=60")
	wantWaiters(t, 1)
	node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	r := <-answer
	r.wantHeader(t, "Preference-Applied", "wait=30")
	r.wantHeader(t, "Cache-Control", "private, no-cache")
}

// A process that ends waits for its requests first, for up to 5 seconds here.
func TestShutdownEndsWait(t *testing.T) {
	g := newGate()
	node := newBackend(t, responds(http.StatusNoContent, ""))
	p := startProcess(t, "", options(node, "poll_interval 100ms"))
	answer := p.goGet(pair + "&wait=60")
	eventually(t, "polls", func() bool { return len(node.requests()) > 2 })
	node.setHandler(g.then(nil))
	within(t, "a question", g.entered) // which is under way when the process is told to end
	start := time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r := <-answer
	r.wantStatus(t, http.StatusNoContent)
	r.wantHeader(t, "Preference-Applied", "wait=60")
	if err := p.cmd.Wait(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("the process took %s to end", took)
	}
}

// pollers counts the goroutines that ask for those who wait.
func pollers(t *testing.T) (n int) {
	t.Helper()
	var profile strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
		t.Fatal(err)
	}
	same := 0 // goroutines with the same stack
	for line := range strings.Lines(profile.String()) {
		_, _ = fmt.Sscanf(line, "%d @", &same)
		if strings.Contains(line, "(*Handler).poll+") {
			n += same
		}
	}
	return n
}

// However many wait for a task, one poller asks one question in an interval.
func TestManyWait(t *testing.T) {
	waiters := 10_000
	if fsbroker.RaceDetector {
		waiters = 1_500 // with three goroutines each, client and all; it cannot have more than 8128
	}
	const streams, interval = 250, 500 * time.Millisecond // HTTP/2 has this many requests in one connection
	finished := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
	s := startSite(t, options(node, fmt.Sprintf("poll_interval %s\nmax_wait 5m", interval)))

	start := time.Now()
	var wg sync.WaitGroup
	for range waiters / streams {
		transport := &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: s.client.Transport.(*http.Transport).TLSClientConfig.RootCAs},
			ForceAttemptHTTP2: true,
		}
		t.Cleanup(transport.CloseIdleConnections)
		client := &http.Client{Transport: transport}
		ask := func(wait string) (int, string, error) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.base+pair, nil)
			if err != nil {
				return 0, "", err
			}
			req.Header.Set("Authorization", "Bearer "+callerSecret)
			req.Header.Set("Prefer", wait)
			resp, err := client.Do(req)
			if err != nil {
				return 0, "", err
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			return resp.ProtoMajor, string(body), err
		}
		if major, _, err := ask("wait=0"); major != 2 || err != nil { // and has a connection from now on
			t.Fatalf("HTTP/%d: %v", major, err)
		}
		for range streams {
			wg.Go(func() {
				if _, body, err := ask("wait=300"); err != nil || body != finished {
					t.Errorf("%v, %q", err, body)
				}
			})
		}
	}
	wantWaiters(t, waiters)
	all := time.Now()
	before := len(node.requests())
	time.Sleep(10 * interval)
	asked, took := len(node.requests())-before, time.Since(all)
	if most := int(took/interval) + 1; asked < 5 || asked > most {
		t.Errorf("the node was asked %d questions in %s, want 1 in each %s", asked, took, interval)
	}
	if n := pollers(t); n != 1 {
		t.Errorf("%d pollers ask for them, want 1", n)
	}

	node.setHandler(responds(http.StatusOK, finished))
	told := time.Now()
	wg.Wait()
	t.Logf("%d callers waited: %s until all did, %d questions in %s while they did, %s until all had the report",
		waiters, all.Sub(start).Round(time.Millisecond), asked, took.Round(time.Millisecond),
		time.Since(told).Round(time.Millisecond))
	if n, most := len(node.requests()), int(time.Since(start)/interval)+2; n > most {
		t.Errorf("the node was asked %d questions in all, want no more than %d", n, most)
	}
}
