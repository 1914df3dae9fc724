package cluster_test

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// submitted is a submission whose caller got an answer.
type submitted struct {
	id, sha256 string
	begun      time.Time
}

// submit submits a file of its own through an instance, as often as it takes to get an answer: the instance may be away, and
// the broker's queue may be full. Any goroutine may call it. It reports how often it failed, and false if the test has ended.
func (i *instance) submit() (s submitted, failed int, ok bool) {
	for ; ; failed++ {
		file, begun := text(1), time.Now()
		sum := sha256.Sum256(file)
		id, err := i.c.submitTo(i.site, i.c.secrets["PORTAL_SECRET"], file)
		if err == nil {
			return submitted{id, hex.EncodeToString(sum[:]), begun}, failed, true
		}
		select {
		case <-i.c.t.Context().Done():
			return s, failed, false
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// pending is what the admin API shows of a submission that is followed.
type pending struct {
	State string
	Noted bool // in Redis
}

// pending returns what is followed, by submission.
func (i *instance) pending() map[string]pending {
	i.c.t.Helper()
	r, err := i.do(http.MethodGet, i.admin+"/fsbroker/harvest")
	if err != nil {
		i.c.t.Fatal(err)
	}
	var namespaces map[string][]struct {
		SubmitID string `json:"submit_id"`
		pending
	}
	if err := json.Unmarshal([]byte(r.body), &namespaces); err != nil || namespaces["default"] == nil {
		i.c.t.Fatalf("%v: %s", err, r.body)
	}
	list := make(map[string]pending)
	for _, p := range namespaces["default"] {
		list[p.SubmitID] = p.pending
	}
	return list
}

// wantKept checks that an instance has both reports of all submissions, by their IDs and by their files, and asks nobody for
// them.
func (i *instance) wantKept(submissions []submitted) {
	i.c.t.Helper()
	for _, s := range submissions {
		for _, all := range []bool{false, true} {
			var byID string
			for _, path := range []string{"/task?submitID=" + s.id, "/task?sha256=" + s.sha256} {
				if all {
					path += "&all=true"
				}
				r, err := i.getKept(path)
				if err != nil {
					i.c.t.Fatal(err)
				}
				byID = cmp.Or(byID, r.body)
				if r.status != http.StatusOK || !strings.Contains(r.body, `"hash":"`+s.sha256) ||
					!strings.Contains(r.body, `"overallState":"success"`) || strings.Contains(r.body, `"resources":`) != all || r.body != byID {
					i.c.t.Errorf("%s: status %d: %.200s", path, r.status, r.body)
				}
			}
		}
	}
}

// maxDelay is the longest delay between two questions for a report.
const maxDelay = 27 * time.Second

// mostQuestions returns how often the high-level report of a submission is asked for at the most, within a time after it was
// accepted. The delays double, beginning with poll_interval, and are up to a tenth shorter at random.
func mostQuestions(pollInterval, within time.Duration) (n int) {
	delay := pollInterval
	for at := delay * 9 / 10; at <= within; at += delay * 9 / 10 {
		n++
		delay = min(2*delay, maxDelay)
	}
	return n
}

// wantQuestions checks that nothing was asked more often than a bound, given those for each kind of report.
func wantQuestions(t *testing.T, asked map[question]int, submissions []submitted, bound func(s submitted) (summary, complete int)) {
	t.Helper()
	var sum, most [2]int
	for _, s := range submissions {
		var bounds [2]int
		bounds[0], bounds[1] = bound(s)
		for kind, all := range []bool{false, true} {
			n := asked[question{s.id, all}]
			if n > bounds[kind] || n == 0 {
				t.Errorf("%s, all %t: %d questions, want 1 to %d", s.id, all, n, bounds[kind])
			}
			sum[kind] += n
			most[kind] += bounds[kind]
		}
	}
	t.Logf("%d submissions took %d questions for high-level reports, at most %d are allowed; and %d for complete ones, at most %d",
		len(submissions), sum[0], most[0], sum[1], most[1])
}

// Caddy is killed while it follows submissions, and started again. No report is lost that a caller was promised, although
// nobody asks for one, and the nodes and the broker forget it in the end.
func TestKillWhileReportsAreFollowed(t *testing.T) {
	const (
		submissions  = 200
		beforeKill   = 120
		analysis     = time.Second
		pollInterval = 200 * time.Millisecond
	)
	c := newTimedCluster(t, timing{analysis, time.Hour})
	i := c.startWith([]string{"poll_interval " + pollInterval.String()})

	answers := make(chan submitted, submissions)
	var failed atomic.Int64
	go func() {
		pace := time.NewTicker(20 * time.Millisecond)
		defer pace.Stop()
		for range submissions {
			<-pace.C
			go func() {
				if s, tries, ok := i.submit(); ok {
					failed.Add(int64(tries))
					answers <- s
				}
			}()
		}
	}()
	var all []submitted
	collect := func(n int) {
		for len(all) < n {
			select {
			case s := <-answers:
				all = append(all, s)
			case <-c.ctx.Done():
				t.Fatalf("%d submissions are accepted, want %d", len(all), n)
			}
		}
	}

	collect(beforeKill)
	done := make(map[string]bool)
	eventually(t, "a report that is kept", func() bool {
		followed := i.pending()
		for _, s := range all {
			if _, ok := followed[s.id]; !ok {
				done[s.id] = true
			}
		}
		return len(done) > 0
	})
	i.kill()
	killed := time.Now()
	i.run()
	away := time.Since(killed)
	unfinished := len(all) - len(done)
	if unfinished == 0 {
		t.Error("when Caddy is killed, no submission is pending: some must be")
	}

	collect(submissions)
	eventually(t, "nothing to be pending", func() bool { return len(i.pending()) == 0 })
	finished := time.Now()
	i.kill() // nothing was pending, so all is in Redis
	i.run()
	asked := c.broker.questions()
	t.Logf("after %d answers, of which %d were pending and %d done, Caddy was away for %s, and %d requests failed",
		beforeKill, unfinished, len(done), away.Round(time.Millisecond), failed.Load())

	wantQuestions(t, asked, all, func(s submitted) (summary, complete int) {
		summary, complete = mostQuestions(pollInterval, finished.Sub(s.begun))+1, 1 // the last one finds it finished
		if s.begun.Before(killed) && !done[s.id] {
			return 2*summary + 1, 2 // it may be resumed, which asks at once
		}
		return summary, complete
	})
	c.forget()
	i.wantKept(all)
}

// An instance is killed while it follows submissions. The other one takes them over, and follows them to their end, although
// Redis, and the broker, are away for a while.
func TestTakeover(t *testing.T) {
	const (
		submissions  = 50
		analysis     = 60 * time.Second
		pollInterval = 2 * time.Second
		away         = 6 * time.Second
	)
	c := newTimedCluster(t, timing{analysis, time.Hour}, "--appendonly", "yes", "--appendfsync", "always")
	one, other := c.start(), c.start()
	began := time.Now()
	var all []submitted
	for range submissions {
		s, _, ok := one.submit()
		if !ok {
			t.Fatal("the test has ended")
		}
		all = append(all, s)
	}
	accepted := time.Now()
	for id, p := range one.pending() {
		if !p.Noted {
			t.Errorf("%s is not noted", id)
		}
	}
	one.kill()
	killed := time.Now()

	c.redis.Pause()
	time.Sleep(away)
	c.redis.Resume()
	resumed := time.Now() // before, nothing can be taken over
	eventually(t, "the other instance to take over", func() bool {
		return other.logged("what another instance followed is taken over")
	})
	takenOver := time.Now()
	if list := other.pending(); len(list) != submissions {
		t.Errorf("the other instance follows %d submissions, want %d", len(list), submissions)
	}

	// The broker is away when the reports are finished, and Redis when they are fetched.
	time.Sleep(time.Until(accepted.Add(analysis - away/2)))
	if n := len(other.pending()); n != submissions && time.Since(began) < analysis {
		t.Errorf("%d submissions are pending before they are finished, want %d", n, submissions)
	}
	c.broker.stop()
	time.Sleep(away)
	c.broker.start(t)
	eventually(t, "the first report", func() bool {
		for q := range c.broker.questions() {
			if q.all {
				return true
			}
		}
		return false
	})
	c.redis.Kill()
	time.Sleep(away)
	c.redis.Restart()
	eventually(t, "nothing to be pending", func() bool { return len(other.pending()) == 0 })
	finished := time.Now()
	asked := c.broker.questions()
	t.Logf("killed after %s, taken over after %s, all finished after %s", killed.Sub(began).Round(time.Millisecond),
		takenOver.Sub(began).Round(time.Millisecond), finished.Sub(began).Round(time.Millisecond))
	wantQuestions(t, asked, all, func(submitted) (summary, complete int) {
		// The other instance asks at once, and then as if they were new.
		return mostQuestions(pollInterval, killed.Sub(began)) + 1 + mostQuestions(pollInterval, finished.Sub(resumed)), 1
	})

	other.kill() // nothing was pending, so all is in Redis
	c.forget()
	one.run()
	one.wantKept(all)
	if n := len(one.pending()); n != 0 {
		t.Errorf("%d submissions are followed again", n)
	}
}
