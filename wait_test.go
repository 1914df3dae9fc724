package fsbroker_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

// wantWaiters waits until that many callers wait for a report to be finished.
func wantWaiters(t *testing.T, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d callers that wait", want), func() bool { return fsbroker.Waiters() == want })
}

func TestWait(t *testing.T) {
	finished, unfinished := reportOf("t1", "SUCCESS"), reportOf("t1", "IN_PROGRESS")
	node := newBackend(t, responds(http.StatusOK, unfinished))
	s := startSite(t, options(node, "poll_interval 200ms\nmax_wait 1500s"))

	applied := map[string]string{}
	replies := map[string]<-chan reply{}
	for name, test := range map[string]struct {
		query   string
		header  []string
		applied string
	}{
		"header":                   {"", []string{"Prefer: wait=1000"}, "wait=1000"},
		"among other preferences":  {"", []string{`Prefer: respond-async; x="a,b"`, `Prefer: Wait="1200"`}, "wait=1200"},
		"query":                    {"&wait=1100", nil, "wait=1100"},
		"query wins":               {"&wait=1100", []string{"Prefer: wait=5"}, "wait=1100"},
		"more than is allowed":     {"&wait=3600", nil, "wait=1500"},
		"more than fits a number":  {"", []string{"Prefer: wait=99999999999999999999"}, "wait=1500"},
		"zero":                     {"&wait=0", nil, ""},
		"zero, and the query wins": {"&wait=0", []string{"Prefer: wait=5"}, ""},
		"malformed":                {"", []string{"Prefer: wait=soon"}, ""},
		"malformed, then right":    {"", []string{"Prefer: wait=soon", "Prefer: wait=5"}, ""},
	} {
		applied[name] = test.applied
		replies[name] = s.goGet(pair+test.query, test.header...)
	}
	wantWaiters(t, 6)
	for name, held := range replies {
		if applied[name] == "" {
			r := <-held
			r.wantHeader(t, "Preference-Applied", "")
			if string(r.body) != unfinished {
				t.Errorf("%s: status %d: %s", name, r.status, r.body)
			}
		}
	}
	node.setHandler(responds(http.StatusOK, finished))
	for name, held := range replies {
		if applied[name] != "" {
			r := <-held
			r.wantHeader(t, "Preference-Applied", applied[name])
			r.wantHeader(t, "Cache-Control", "private, no-cache")
			if string(r.body) != finished {
				t.Errorf("%s: status %d: %s", name, r.status, r.body)
			}
		}
	}
	wantWaiters(t, 0)

	// A finished report is not waited for.
	r := s.get(pair+"&wait=10", "Prefer: wait=10")
	r.wantHeader(t, "Cache-Status", "fsbroker; hit")
	r.wantHeader(t, "Preference-Applied", "")
}

func TestWaitUntilTimeIsUp(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		newest := reportOf("t1", "IN_PROGRESS", "SUCCESS")
		node := newBackend(t, responds(http.StatusNoContent, ""))
		s := startSite(t, options(node, "poll_interval 200ms\nmax_wait 1s"))

		start := time.Now()
		empty, unfinished := s.goGet("/task?appServerID=node-1&taskID=t2&wait=1"), s.goGet(pair+"&wait=60")
		wantWaiters(t, 2)
		node.setHandler(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("taskID") == "t1" {
				responds(http.StatusOK, newest)(w, r)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		})
		r := <-unfinished
		if held := time.Since(start); held < time.Second {
			t.Errorf("the request was held for %s only", held)
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
	})
}

// A wait that is over when the first answer comes is not begun: the caller gets that answer.
func TestWaitThatIsOverAtTheFirstAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		unfinished := reportOf("t1", "IN_PROGRESS")
		g := newGate()
		node := newBackend(t, g.then(responds(http.StatusOK, unfinished)))
		s := startSite(t, options(node, "poll_interval 20ms"))
		replies := s.goGet(pair + "&wait=1")
		within(t, "the request", g.entered)
		time.Sleep(1100 * time.Millisecond) // the node takes longer than the wait
		close(g.open)
		r := <-replies
		r.wantHeader(t, "Preference-Applied", "")
		r.wantHeader(t, "Retry-After", "1")
		if string(r.body) != unfinished {
			t.Errorf("status %d: %s", r.status, r.body)
		}
		node.wantRequests(t, 1)
	})
}

// One report causes one request in each poll interval, no matter when callers come.
func TestWaitPollsOnceInAnInterval(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		broker := newBackend(t, explains(`{"appServerID":"node-1","taskID":"t1"}`))
		s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 500ms"))
		s.get(pair)
		time.Sleep(200 * time.Millisecond) // the callers come at different times within an interval
		first, second := s.goGet(pair+"&wait=5"), s.goGet(pair+"&wait=4&serect="+callerSecret)
		time.Sleep(200 * time.Millisecond)
		third := s.goGet("/task?submitID=s1&wait=4")
		for _, replies := range []<-chan reply{first, second, third} {
			(<-replies).wantStatus(t, http.StatusOK)
		}
		if n := len(node.requests()); n < 8 || n > 12 {
			t.Errorf("the node got %d requests in about 5 seconds, want about 11", n)
		}
		if n := len(broker.requests()); n > 2*10 {
			t.Errorf("the broker got %d requests in about 4 seconds, want two for each of 9 polls", n)
		}
	})
}

func TestWaitPollsAsSoonAsNothingIsKept(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startSite(t, options(node, "poll_interval 4s"))
		s.get(pair)
		time.Sleep(3 * time.Second) // most of the interval, in which the report is kept
		node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		start := time.Now()
		s.get(pair+"&wait=15").wantHeader(t, "Cache-Control", "private, no-cache")
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("the response took %s, but the kept report expired in 1s", took)
		}
		node.wantRequests(t, 2)
	})
}

func TestWaitForSubmission(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		finished := reportOf("t1", "SUCCESS")
		node := newBackend(t, responds(http.StatusNoContent, ""))
		broker := newBackend(t, explains(`{"state":"QUEUED"}`))
		s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 100ms"))

		replies := s.goGet("/task?submitID=s1&wait=15")
		eventually(t, "more requests to the broker", func() bool { return len(broker.requests()) > 2 })
		broker.setHandler(explains(`{"appServerID":"node-1","taskID":"t1"}`))
		eventually(t, "more requests to the node", func() bool { return len(node.requests()) > 2 })
		node.setHandler(responds(http.StatusOK, finished))
		if r := <-replies; string(r.body) != finished {
			t.Errorf("status %d: %s", r.status, r.body)
		}
	})
}

func TestWaitEndsWithProblem(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusNoContent, ""))
		s := startSite(t, options(node, "poll_interval 100ms"))
		for _, nocache := range []string{"", "&nocache"} {
			held := []<-chan reply{s.goGet(pair + nocache + "&wait=15"), s.goGet(pair + nocache + "&wait=15")}
			wantWaiters(t, 2)
			node.setHandler(responds(http.StatusNotFound, ""))
			for _, replies := range held {
				(<-replies).wantProblem(t, http.StatusNotFound, "unknown_task")
			}
			// A caller that comes later does not get that problem.
			node.setHandler(responds(http.StatusNoContent, ""))
			s.get(pair+nocache+"&wait=1").wantStatus(t, http.StatusNoContent)
		}
		s.wantNoSecretInLog()
	})
}

func TestWaitWithIfNoneMatch(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startSite(t, options(node, "poll_interval 200ms"))
		known := "If-None-Match: " + s.get(pair).header.Get("ETag")

		r := s.get(pair+"&wait=1", known)
		r.wantStatus(t, http.StatusNotModified)
		r.wantHeader(t, "Preference-Applied", "wait=1")

		replies := s.goGet(pair+"&wait=15", known)
		wantWaiters(t, 1)
		node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		r = <-replies
		r.wantStatus(t, http.StatusOK)
		r.wantHeader(t, "Cache-Control", "private, no-cache")
	})
}

func TestWaitWithNocache(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		finished := reportOf("t1", "SUCCESS")
		node := newBackend(t, responds(http.StatusOK, finished))
		s := startSite(t, options(node, "poll_interval 100ms"))
		s.get(pair).wantStatus(t, http.StatusOK)

		// The node has started the task again, and such a caller does not wait for the kept report.
		node.setHandler(responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		before := len(node.requests())
		replies := s.goGet(pair + "&nocache&wait=15")
		eventually(t, "more requests", func() bool { return len(node.requests()) > before+3 })
		again := reportOf("t1", "SUCCESS", "FAILED")
		node.setHandler(responds(http.StatusOK, again))
		r := <-replies
		r.wantHeader(t, "Cache-Status", "fsbroker; fwd=request; stored")
		if string(r.body) != again {
			t.Errorf("status %d: %s", r.status, r.body)
		}
	})
}

func TestWaitersThatLeave(t *testing.T) {
	inBubble(t, func(t *testing.T) {
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

		leaveOne, leaveOther := wait(), wait()
		wantWaiters(t, 2)
		leaveOne()
		wantWaiters(t, 1)
		before := len(node.requests())
		eventually(t, "requests for the other", func() bool { return len(node.requests()) > before+2 })

		// When the last caller leaves, the request that is under way is canceled, and there are no more.
		g := newGate()
		node.setHandler(g.then(nil))
		within(t, "a request", g.entered)
		leaveOther()
		within(t, "the request to be canceled", g.left)
		wantWaiters(t, 0)
		before = len(node.requests())
		time.Sleep(500 * time.Millisecond) // five intervals without a request
		node.wantRequests(t, before)
	})
}

// A caller that leaves while it waits is counted and logged with what it would have got.
func TestWaiterThatLeavesIsCounted(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startWithAdmin(t, strings.Replace(options(node, "poll_interval 10s"), "secret tester", "secret leaver", 1), "")
		ctx, leave := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = s.try(ctx, http.MethodGet, pair+"&wait=60", "Authorization: Bearer "+callerSecret)
		}()
		wantWaiters(t, 1)
		leave()
		<-ended
		var counted []string
		eventually(t, "the request to be counted", func() bool {
			for series := range s.scrape() {
				if strings.Contains(series, `client="leaver",code="499"`) {
					counted = append(counted, series)
				}
			}
			return len(counted) > 0
		})
		if want := `caddy_fsbroker_requests_total{cache="miss",client="leaver",code="499",endpoint="/task"}`; len(counted) > 1 || counted[0] != want {
			t.Errorf("it is counted in %v, want %s", counted, want)
		}
		log := string(readFile(t, s.logFile()))
		if want := `"fsbroker_cache":"miss","fsbroker_node":"node-1","fsbroker_upstream":"node"`; !strings.Contains(log, want) {
			t.Errorf("the access log does not have %s", want)
		}
	})
}

func TestReloadEndsWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		unfinished := reportOf("t1", "IN_PROGRESS")
		node := newBackend(t, responds(http.StatusOK, unfinished))
		s := startSite(t, options(node, ""))
		held := []<-chan reply{s.goGet(pair + "&wait=60"), s.goGet("/task?appServerID=node-1&taskID=t2&wait=60")}
		wantWaiters(t, 2)
		start := time.Now()
		s.load(options(node, "max_wait 30s"))
		for _, replies := range held {
			r := <-replies
			r.wantHeader(t, "Preference-Applied", "wait=60")
			if string(r.body) != unfinished {
				t.Errorf("status %d: %s", r.status, r.body)
			}
		}
		if took := time.Since(start); took > 4*time.Second {
			t.Errorf("the requests were held for another %s", took)
		}

		// A caller that comes back waits with the new configuration.
		replies := s.goGet(pair + "&wait=60")
		wantWaiters(t, 1)
		node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		r := <-replies
		r.wantHeader(t, "Preference-Applied", "wait=30")
		r.wantHeader(t, "Cache-Control", "private, no-cache")
	})
}

// A process that ends waits for its requests, up to the grace period. Those that wait for a report end at once.
func TestShutdownEndsWait(t *testing.T) {
	g := newGate()
	node := newBackend(t, responds(http.StatusNoContent, ""))
	p := startProcessWithGrace(t, "", options(node, "poll_interval 100ms\nmax_wait 1h"), "1h")
	replies := p.goGet(pair + "&wait=3600")
	eventually(t, "more requests", func() bool { return len(node.requests()) > 2 })
	node.setHandler(g.then(nil))
	within(t, "a request", g.entered) // it is under way when the process ends
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r := within(t, "the response", replies)
	r.wantStatus(t, http.StatusNoContent)
	r.wantHeader(t, "Preference-Applied", "wait=3600")
	if err := p.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// Any number of callers that wait for one task cause one request in each interval.
func TestManyWait(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	waiters := 10_000
	if fsbroker.RaceDetector {
		waiters = 1_500 // each has three goroutines, the client's included, and the limit is 8128
	}
	const streams, interval = 250, 500 * time.Millisecond // an HTTP/2 connection has this many requests
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
		request := func(wait string) (int, string, error) {
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
		if major, _, err := request("wait=0"); major != 2 || err != nil { // opens the connection
			t.Fatalf("HTTP/%d: %v", major, err)
		}
		for range streams {
			wg.Go(func() {
				if _, body, err := request("wait=300"); err != nil || body != finished {
					t.Errorf("%v, %q", err, body)
				}
			})
		}
	}
	wantWaiters(t, waiters)
	all := time.Now()
	before := len(node.requests())
	eventually(t, "10 polls", func() bool { return len(node.requests()) >= before+10 })
	polls, took := len(node.requests())-before, time.Since(all)
	if most := int(took/interval) + 1; polls > most {
		t.Errorf("the node got %d requests in %s, want 1 in each %s", polls, took, interval)
	}

	node.setHandler(responds(http.StatusOK, finished))
	done := time.Now()
	wg.Wait()
	t.Logf("%d callers: %s until all waited, %d requests in %s of waiting, %s until all had the report",
		waiters, all.Sub(start).Round(time.Millisecond), polls, took.Round(time.Millisecond),
		time.Since(done).Round(time.Millisecond))
	if n, most := len(node.requests()), int(time.Since(start)/interval)+2; n > most {
		t.Errorf("the node got %d requests in all, want no more than %d", n, most)
	}
}
