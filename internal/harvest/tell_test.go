package harvest

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// An event handler that hangs holds up no question. Its targets stay pending, so that another process tells of them.
func TestHandlerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		hang, calls := make(chan struct{}), 0
		p := u.start(m, Config{Instance: "one"}, func(s *Source) {
			tell := s.Finished
			s.Finished = func(target Target) {
				u.mu.Lock()
				calls++
				u.mu.Unlock()
				<-hang
				tell(target)
			}
		})
		const many = 200
		for i := range many {
			p.mustAdd(t, u.submit(i, time.Second))
		}
		time.Sleep(time.Minute)
		u.mu.Lock()
		kept, begun := 0, calls
		for _, k := range u.tasks {
			if k.kept[0] && k.kept[1] {
				kept++
			}
		}
		u.mu.Unlock()
		if kept != many || begun != maxTelling || p.pending() != many {
			t.Errorf("%d of %d are kept, %d handlers run, %d are pending", kept, many, begun, p.pending())
		}
		for _, item := range p.List() {
			if !item.Finished {
				t.Fatalf("%+v is not finished", item)
			}
		}
		p.stop() // although the handlers hang
		close(hang)
		synctest.Wait()
		p = u.start(m, Config{Instance: "one"}, nil)
		defer p.stop()
		time.Sleep(10 * time.Second)
		told := 0
		for i := range many {
			told += u.task(u.id(i), func(*fakeTask) {}).told
		}
		if p.pending() != 0 || told != many+maxTelling {
			t.Errorf("%d are pending; %d were told, want %d, and again %d that were told while the process ended", p.pending(), told, many, maxTelling)
		}
	})
}

// The handlers of a source that hang do not hold up those of the next.
func TestHandlerThatHangsAndAnotherSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		hang := make(chan struct{})
		var hangs *Source
		p := u.start(nil, Config{}, func(s *Source) {
			hangs = s
			s.Finished = func(Target) { <-hang }
		})
		defer p.stop()
		for i := range maxTelling + 1 { // the last one waits
			p.mustAdd(t, u.submit(i, time.Second))
			time.Sleep(time.Second)
		}
		time.Sleep(time.Minute)
		p.Attach(u.source(nil, zap.NewNop()))
		p.Pause(hangs)
		p.Detach(hangs)
		synctest.Wait()
		if n := u.task(u.id(maxTelling), func(*fakeTask) {}).told; n != 1 {
			t.Errorf("the one that waited was told %d times", n)
		}
		target := u.submit(maxTelling+1, time.Second)
		p.mustAdd(t, target)
		time.Sleep(time.Minute)
		if n := u.task(target.ID, func(*fakeTask) {}).told; n != 1 || p.pending() != maxTelling {
			t.Errorf("it was told %d times, %d are pending", n, p.pending())
		}
		close(hang)
		synctest.Wait()
		if n := p.pending(); n != 0 {
			t.Errorf("%d are pending", n)
		}
	})
}

// An event handler may return when its target was given up, and a configuration without a storage is used.
func TestHandlerReturnsAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		hang := make(chan struct{})
		var hangs *Source
		p := u.start(m, Config{Instance: "one"}, func(s *Source) {
			hangs = s
			s.Finished = func(Target) { <-hang }
		})
		defer p.stop()
		p.mustAdd(t, u.submit(1, time.Second), u.submit(2, time.Hour)) // in one note
		time.Sleep(time.Minute)
		if !p.GiveUp(u.id(1)) {
			t.Fatal("it is not pending")
		}
		time.Sleep(time.Minute)
		p.Attach(u.source(nil, zap.NewNop()))
		p.Pause(hangs)
		p.Detach(hangs)
		close(hang)
		synctest.Wait()
		if list := p.List(); len(list) != 1 || list[0].ID != u.id(2) {
			t.Errorf("pending is %+v", list)
		}
	})
}

// A question that panics is asked again. An event handler that panics holds up nothing, and is not called again.
func TestPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		panicked := 0
		p := u.start(nil, Config{}, func(s *Source) {
			fetch, tell := s.Fetch, s.Finished
			s.Fetch = func(ctx context.Context, target Target, kind task.Kind) (Outcome, error) {
				if panicked++; panicked == 1 {
					panic("a question")
				}
				return fetch(ctx, target, kind)
			}
			s.Finished = func(target Target) {
				tell(target)
				panic("an event")
			}
		})
		defer p.stop()
		target := u.submit(1, time.Second)
		p.mustAdd(t, target)
		time.Sleep(3 * time.Second)
		if list := p.List(); len(list) != 1 || list[0].Problem != guard.ErrPanic.Error() {
			t.Errorf("after a question that has panicked: %+v", list)
		}
		time.Sleep(time.Minute)
		if told := u.task(target.ID, func(*fakeTask) {}).told; told != 1 || p.pending() != 0 || p.counts() != [3]int{1} {
			t.Errorf("it was told %d times; pending is %+v", told, p.List())
		}
		if n := p.logged("panicked"); n != 2 {
			t.Errorf("the log has %d panics", n)
		}
	})
}

// A source that is paused is told nothing more.
func TestHandlerOfAPausedSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		hang, told := make(chan struct{}), 0
		var source *Source
		p := u.start(nil, Config{}, func(s *Source) {
			source = s
			s.Finished = func(Target) {
				<-hang
				u.mu.Lock()
				defer u.mu.Unlock()
				told++
			}
		})
		defer p.stop()
		for i := range 2 * maxTelling {
			p.mustAdd(t, u.submit(i, time.Second))
		}
		time.Sleep(time.Minute)
		p.Pause(source)
		close(hang)
		synctest.Wait()
		if told != maxTelling || p.pending() != maxTelling {
			t.Errorf("%d were told, want those that were under way, %d; %d are pending", told, maxTelling, p.pending())
		}
	})
}

// What the storage has in the end is noted without another question, even when the source is paused.
func TestSavedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		saved := false
		u.saved = func() bool { return saved }
		var source *Source
		p := u.start(m, Config{Instance: "one"}, func(s *Source) {
			source = s
			fetch := s.Fetch
			s.Fetch = func(ctx context.Context, target Target, kind task.Kind) (Outcome, error) {
				out, err := fetch(ctx, target, kind)
				out.Key = keyOf(kind)
				return out, err
			}
		})
		defer p.stop()
		target := u.submit(1, time.Second)
		p.mustAdd(t, target)
		time.Sleep(time.Minute)
		p.Pause(source)
		synctest.Wait()
		p.Saved(p.archive, keyOf(task.Summary))
		if list := p.List(); len(list) != 1 || !list[0].Finished {
			t.Errorf("pending is %+v, want one that is finished", list)
		}
		p.Saved(p.archive, task.NewKey("another"))
		p.Saved(p.archive, keyOf(task.Complete))
		begun := time.Now()
		if p.Flush(); time.Since(begun) > 0 {
			t.Errorf("what is noted at once was waited for, %s", time.Since(begun))
		}
		if p.pending() != 0 || p.counts() != [3]int{1} || len(noted(m)) != 0 {
			t.Errorf("pending is %+v, counts %v, notes %v", p.List(), p.counts(), noted(m))
		}
	})
}

func keyOf(kind task.Kind) task.Key {
	if kind == task.Complete {
		return task.NewKey("complete")
	}
	return task.NewKey("summary")
}

// A source that is paused is asked nothing, but what is added meanwhile is noted. The one before is asked again.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		var before *Source
		p := u.start(m, Config{Instance: "one"}, func(s *Source) { before = s })
		defer p.stop()
		failed := u.source(p.archive, before.Logger) // a configuration that does not start
		p.Attach(failed)
		p.Pause(failed)
		p.mustAdd(t, u.submit(1, time.Second))
		time.Sleep(10 * time.Second)
		if p.pending() != 0 || p.counts() != [3]int{1} {
			t.Errorf("pending is %+v", p.List())
		}
		p.Detach(failed)
		p.Pause(before)
		asked := u.questions()
		if !p.mustAdd(t, u.submit(2, time.Second)) {
			t.Error("it is not noted")
		}
		time.Sleep(10 * time.Second)
		if p.pending() != 1 || u.questions() != asked || len(noted(m)) != 1 {
			t.Errorf("pending is %+v, %d questions, notes %v", p.List(), u.questions()-asked, noted(m))
		}
	})
}

// The number of targets is bounded.
func TestTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		p := u.start(nil, Config{}, func(s *Source) { s.PollInterval = time.Hour })
		defer p.stop()
		targets := make([]Target, maxPending+10)
		for i := range targets {
			targets[i] = Target{ID: u.id(i), Accepted: time.Now()}
		}
		if err := p.Add(t.Context(), targets); err != nil {
			t.Error(err)
		}
		p.Follow(Target{ID: u.id(-1), Accepted: time.Now()})
		if p.pending() != maxPending || testutil.ToFloat64(p.Metrics.refused) != 11 || p.logged("too much is pending") != 1 {
			t.Errorf("%d are pending, %v refused, %d lines", p.pending(), testutil.ToFloat64(p.Metrics.refused), p.logged("too much is pending"))
		}
	})
}
