package harvest

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Both kinds are fetched, and the event is told once.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		target := u.submit(1, 5*time.Minute)
		p.mustAdd(t, target)
		time.Sleep(4 * time.Minute)
		if list := p.List(); len(list) != 1 || list[0].Age != 4*time.Minute || list[0].Noted || list[0].Finished || list[0].Client != "client" {
			t.Errorf("pending is %+v", list)
		}
		time.Sleep(time.Minute + 30*time.Second)
		k := u.task(target.ID, func(*fakeTask) {})
		if !k.kept[0] || !k.kept[1] || k.asked[1] != 1 || k.told != 1 || k.widest > 30*time.Second || p.counts() != [3]int{1} {
			t.Errorf("%+v, counts %v", k, p.counts())
		}
		if k.asked[0] > 16 {
			t.Errorf("%d questions in 5 minutes", k.asked[0])
		}
	})
}

// Metrics that followers share have what all of them have pending, until they are closed.
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), NewMetrics()
		one, two := u.start(nil, Config{Metrics: m}, nil), u.start(nil, Config{Metrics: m}, nil)
		one.mustAdd(t, u.submit(1, time.Hour), u.submit(2, time.Hour))
		time.Sleep(time.Minute)
		two.mustAdd(t, u.submit(3, time.Hour))
		time.Sleep(time.Minute)
		want := func(pending, oldest float64) {
			t.Helper()
			if n, age := testutil.ToFloat64(m.pending), testutil.ToFloat64(m.oldest); n != pending || age != oldest {
				t.Errorf("%v are pending, the oldest for %v s, want %v and %v s", n, age, pending, oldest)
			}
		}
		want(3, 120)
		one.stop()
		want(1, 60)
		two.stop()
		want(0, 0)
	})
}

// What is pending is listed by its age.
func TestListOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		for _, id := range []int{5, 3} {
			p.mustAdd(t, u.submit(id, time.Hour))
			time.Sleep(time.Second)
		}
		p.mustAdd(t, u.submit(2, time.Hour), u.submit(1, time.Hour), u.submit(4, time.Hour))
		var got []ID
		for _, item := range p.List() {
			got = append(got, item.ID)
		}
		if want := []ID{u.id(5), u.id(3), u.id(1), u.id(2), u.id(4)}; !slices.Equal(got, want) {
			t.Errorf("listed %v, want %v", got, want)
		}
	})
}

// An upstream that does not answer holds up no other.
func TestBoundsOfUpstreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, func(s *Source) {
			fetch := s.Fetch
			s.Upstream = func(target Target) string { return target.Client }
			s.Fetch = func(ctx context.Context, target Target, kind task.Kind) (Outcome, error) {
				if target.Client == "slow" {
					<-ctx.Done()
				}
				return fetch(ctx, target, kind)
			}
		})
		defer p.stop()
		for i := range 2 * maxInFlight {
			target := u.submit(i, time.Hour)
			target.Client = "slow"
			p.mustAdd(t, target)
		}
		time.Sleep(time.Minute)
		p.mustAdd(t, u.submit(-1, 10*time.Second))
		time.Sleep(time.Minute)
		if p.counts() != [3]int{1} || p.pending() != 2*maxInFlight {
			t.Errorf("counts %v, %d are pending", p.counts(), p.pending())
		}
	})
}

// A target that was known is given up when it is unknown three times in a row.
func TestUnknownInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		target := u.submit(1, time.Hour)
		p.mustAdd(t, target)
		time.Sleep(10 * time.Minute)
		before := u.task(target.ID, func(k *fakeTask) { k.gone = time.Now() }).asked[0]
		time.Sleep(10 * time.Minute)
		if n := u.questions() - before; n != maxUnknown || p.counts() != [3]int{0, 0, 1} {
			t.Errorf("%d questions, counts %v", n, p.counts())
		}
	})
}

// How a target ends.
func TestEnds(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*fakeTask)
		away   bool
		after  time.Duration
		counts [3]int
		why    string
	}{
		"finished":           {after: time.Minute, counts: [3]int{1}},
		"failed":             {change: func(k *fakeTask) { k.failed = true }, after: time.Minute, counts: [3]int{0, 1}, why: "it has failed"},
		"known late":         {change: func(k *fakeTask) { k.known = time.Now().Add(time.Hour) }, after: 2 * time.Hour, counts: [3]int{1}},
		"never known":        {change: func(k *fakeTask) { k.known = time.Now().Add(48 * time.Hour) }, after: 25 * time.Hour, counts: [3]int{0, 0, 1}, why: "no upstream has known it for 24h0m0s"},
		"gone":               {change: func(k *fakeTask) { k.finished, k.gone = time.Time{}, time.Now().Add(time.Hour) }, after: 2 * time.Hour, counts: [3]int{0, 0, 1}, why: "no upstream knows it any more"},
		"never finished":     {change: func(k *fakeTask) { k.finished = time.Time{} }, after: 25 * time.Hour, counts: [3]int{0, 0, 1}, why: "it is not finished after 24h0m0s"},
		"the broker is away": {away: true, after: 25 * time.Hour, counts: [3]int{0, 0, 1}, why: "it is not finished after 24h0m0s: the broker is away"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newUpstream()
				p := u.start(nil, Config{}, nil)
				defer p.stop()
				target := u.submit(1, 10*time.Second)
				if test.change != nil {
					u.task(target.ID, test.change)
				}
				if test.away {
					u.away = errAway
				}
				p.mustAdd(t, target)
				time.Sleep(test.after)
				if p.counts() != test.counts || p.pending() != 0 {
					t.Errorf("counts %v, want %v; pending %+v", p.counts(), test.counts, p.List())
				}
				warned := p.log.FilterField(zapWhy(test.why)).Len()
				if want := test.counts[1] + test.counts[2]; test.why != "" && warned != want {
					t.Errorf("%d warnings, want %d, in %+v", warned, want, p.log.All())
				}
			})
		})
	}
}

// A submission is accepted until an upstream has known it once.
func TestAccepted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		target := u.submit(1, time.Hour)
		u.task(target.ID, func(k *fakeTask) { k.known = time.Now().Add(time.Minute) })
		if p.Accepted(target.SubmitID) {
			t.Error("it is accepted before it was added")
		}
		p.mustAdd(t, target)
		time.Sleep(50 * time.Second)
		if !p.Accepted(target.SubmitID) {
			t.Error("it is not accepted")
		}
		time.Sleep(50 * time.Second)
		if p.Accepted(target.SubmitID) || p.pending() != 1 {
			t.Error("it is still unknown")
		}
	})
}

// A nudge asks at once, also while a question is under way.
func TestNudge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		u.latency = time.Second
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		target := u.submit(1, time.Hour)
		p.mustAdd(t, target)
		time.Sleep(10 * time.Minute)
		for !u.idle() {
			time.Sleep(100 * time.Millisecond)
		}
		before := u.questions()
		p.Nudge(target.ID)
		p.Nudge(ID{SubmitID: "another"})
		synctest.Wait()
		if u.questions() != before+1 {
			t.Errorf("%d questions after a nudge", u.questions()-before)
		}
		p.Nudge(target.ID)
		time.Sleep(time.Second)
		synctest.Wait()
		if u.questions() != before+2 {
			t.Errorf("%d questions after two nudges", u.questions()-before)
		}
	})
}

// What is given up is not followed any longer, even if it is asked for at the moment.
func TestGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		u.latency = time.Second
		m := storagetest.New(storagetest.FileSystem)
		p := u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		target := u.submit(1, time.Hour)
		if time.Sleep(time.Second); !p.mustAdd(t, target) {
			t.Fatal("it is not noted")
		}
		for u.idle() {
			time.Sleep(100 * time.Millisecond)
		}
		if !p.GiveUp(target.ID) || p.GiveUp(target.ID) {
			t.Error("it is not given up")
		}
		time.Sleep(time.Minute)
		if p.counts() != [3]int{0, 0, 1} || p.logged("is given up") != 1 || u.questions() != 1 || len(noted(m)) != 0 {
			t.Errorf("counts %v, %d questions, notes %q", p.counts(), u.questions(), noted(m))
		}
	})
}

// A target is pending until its reports are in the storage, which costs the upstream nothing.
func TestSaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		begun := time.Now()
		u.saved = func() bool { return time.Since(begun) > time.Hour }
		m := storagetest.New(storagetest.FileSystem)
		p := u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Second)
		target := u.submit(1, 10*time.Second)
		p.mustAdd(t, target)
		time.Sleep(30 * time.Minute)
		k := u.task(target.ID, func(*fakeTask) {})
		if list := p.List(); len(list) != 1 || !list[0].Finished || len(noted(m)) != 1 || k.told != 1 || k.asked[1] != 1 {
			t.Errorf("%+v, %+v", list, k)
		}
		asked := u.questions()
		time.Sleep(31 * time.Minute)
		if p.counts() != [3]int{1} || len(noted(m)) != 0 || u.questions() != asked {
			t.Errorf("counts %v, notes %q", p.counts(), noted(m))
		}
	})
}

// A configuration that follows another is used for what is pending, and asks for the kinds that it wants.
func TestAttach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		u.latency = time.Second
		p := u.start(nil, Config{}, func(s *Source) { s.Complete = false })
		defer p.stop()
		target := u.submit(1, time.Minute)
		p.mustAdd(t, target)
		for u.idle() {
			time.Sleep(100 * time.Millisecond)
		}
		p.mu.Lock()
		old := p.sources[0]
		p.mu.Unlock()
		other := newUpstream()
		other.tasks[target.ID] = &fakeTask{finished: time.Now().Add(time.Minute)}
		s := other.source(nil, old.Logger)
		s.Summary = false
		p.Attach(s)
		p.Detach(old)
		synctest.Wait()
		if other.questions() == 0 {
			t.Error("what was asked for is not asked for again")
		}
		time.Sleep(2 * time.Minute)
		k := other.task(target.ID, func(*fakeTask) {})
		if u.questions() != 1 || k.kept != [2]bool{false, true} || p.counts() != [3]int{1} || p.pending() != 0 {
			t.Errorf("%d questions to the old one, %+v", u.questions(), k)
		}
	})
}

// Without a source, nothing is asked.
func TestDetach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		p.mustAdd(t, u.submit(1, time.Minute))
		p.Detach(p.sources[0])
		time.Sleep(time.Hour)
		if list := p.List(); u.questions() != 0 || len(list) != 1 || list[0].Finished {
			t.Errorf("%d questions, pending %+v", u.questions(), list)
		}
	})
}

// 10,000 targets are each asked for at least every 30 seconds, at a bounded rate, and none is missed.
func TestMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		u.latency = 50 * time.Millisecond
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		const many = 10_000
		for i := range many {
			p.mustAdd(t, u.submit(i, 8*time.Minute))
		}
		time.Sleep(2 * time.Minute)
		before := u.questions()
		time.Sleep(5 * time.Minute)
		perSecond := float64(u.questions()-before) / 300
		time.Sleep(2 * time.Minute)
		widest := time.Duration(0)
		u.mu.Lock()
		defer u.mu.Unlock()
		for _, k := range u.tasks {
			widest = max(widest, k.widest)
		}
		if p.counts() != [3]int{many} || widest > 30*time.Second || perSecond > 400 || u.most > maxInFlight {
			t.Errorf("counts %v, up to %s apart, %.0f a second, %d at once", p.counts(), widest, perSecond, u.most)
		}
		busiest := 0
		for i, j := 0, 0; i < len(u.times); i++ {
			for u.times[i].Sub(u.times[j]) >= time.Second {
				j++
			}
			busiest = max(busiest, i-j+1)
		}
		if busiest > questionsPerSecond+burst {
			t.Errorf("%d questions in a second", busiest)
		}
		t.Logf("%d questions, %.0f a second while 10,000 were pending, at most %d in a second and %d at once, up to %s apart",
			u.asked, perSecond, busiest, u.most, widest)
	})
}

// With 10,000 pending, 100 a second finish and as many come.
func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		u.latency = 50 * time.Millisecond
		p := u.start(nil, Config{}, nil)
		defer p.stop()
		const life, perSecond, seconds = 100 * time.Second, 100, 160
		most := 0
		for second := range seconds {
			for i := range perSecond {
				p.mustAdd(t, u.submit(second*perSecond+i, life))
				time.Sleep(time.Second / perSecond)
			}
			most = max(most, p.count())
		}
		finished := p.counts()[0]
		widest := time.Duration(0)
		u.mu.Lock()
		defer u.mu.Unlock()
		for _, k := range u.tasks {
			widest = max(widest, k.widest)
		}
		if due := (seconds - 100 - 35) * perSecond; finished < due || widest > 30*time.Second {
			t.Errorf("%d of %d have finished, up to %s apart", finished, due, widest)
		}
		t.Logf("up to %d pending, %d finished in %d seconds, %.0f questions a second, up to %s apart",
			most, finished, seconds, float64(u.asked)/float64(seconds), widest)
	})
}
