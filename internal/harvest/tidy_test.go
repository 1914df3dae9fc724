package harvest

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// A process that ends in good order leaves nothing to be told again, although other targets of the same note are pending. What
// was given up is not followed again, even after a crash.
func TestEndedTargetsOfANote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		p := u.start(m, Config{Instance: "one"}, nil)
		p.mustAdd(t, u.submit(1, time.Second), u.submit(2, time.Hour), u.submit(3, time.Hour))
		time.Sleep(time.Minute)
		p.GiveUp(u.id(2))
		p.stop()
		p = u.start(m, Config{Instance: "one"}, nil)
		defer p.stop()
		time.Sleep(time.Minute)
		if told := u.task(u.id(1), func(*fakeTask) {}).told; told != 1 {
			t.Errorf("it was told %d times", told)
		}
		if list := p.List(); len(list) != 1 || list[0].ID != u.id(3) {
			t.Errorf("pending is %+v", list)
		}
	})
}

// What was given up is not followed again after a crash, although nothing else of its note has ended, nor after a second one.
func TestGivenUpTargetsOfANote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		p := u.start(m, Config{Instance: "one"}, nil)
		p.mustAdd(t, u.submit(1, time.Hour), u.submit(2, time.Hour), u.submit(3, time.Hour))
		for id := range 2 {
			p.GiveUp(u.id(id + 1))
			time.Sleep(time.Second)
			p.kill(storagetest.None)
			p = u.start(m, Config{Instance: "one"}, nil)
			time.Sleep(time.Minute)
			if list := p.List(); len(list) != 2-id || list[0].ID != u.id(id+2) {
				t.Errorf("pending is %+v", list)
			}
		}
		p.stop()
	})
}

// A process that ends in good order between the two reports of a target leaves nothing to be told again.
func TestToldBeforeItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		p := u.start(m, Config{Instance: "one"}, func(s *Source) {
			fetch := s.Fetch
			s.Fetch = func(ctx context.Context, target Target, kind task.Kind) (Outcome, error) {
				if kind == task.Complete {
					return Outcome{}, errAway
				}
				return fetch(ctx, target, kind)
			}
		})
		target := u.submit(1, time.Second)
		p.mustAdd(t, target)
		time.Sleep(30 * time.Second)
		p.stop()
		p = u.start(m, Config{Instance: "one"}, nil)
		defer p.stop()
		time.Sleep(time.Minute)
		if told := u.task(target.ID, func(*fakeTask) {}).told; told != 1 || p.pending() != 0 || len(noted(m)) != 0 {
			t.Errorf("it was told %d times; %d are pending", told, p.pending())
		}
	})
}

// What is left of a long answer takes less and less room, however many targets end.
func TestEndedTargetsOfALongAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		p := u.start(m, Config{Instance: "one"}, nil)
		defer p.stop()
		const many = 1000
		targets := make([]Target, many)
		for i := range targets {
			targets[i] = u.submit(i, time.Duration(i)*time.Second)
			targets[i].Name = strings.Repeat("x", 1000)
		}
		p.mustAdd(t, targets...)
		before := len(noted(m))
		if before < 4 {
			t.Fatalf("there are only %d notes", before)
		}
		for range 4 {
			time.Sleep(many / 5 * time.Second)
			if notes := len(noted(m)); notes > 2*before { // the old, and the new
				t.Errorf("%d are pending in %d notes", p.pending(), notes)
			}
		}
		if notes := len(noted(m)); notes > before {
			t.Errorf("%d are pending in %d notes", p.pending(), notes)
		}
		time.Sleep(many / 5 * time.Second)
		time.Sleep(time.Minute)
		if notes := noted(m); p.pending() != 0 || len(notes) != 0 {
			t.Errorf("%d are pending, noted is %q", p.pending(), notes)
		}
	})
}
