package coalesce

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
)

// step is a call that a test controls.
type step struct {
	ctx   context.Context
	fresh bool
	end   chan string // its value
	panic chan any
}

// group is a Group whose calls wait for the test.
type group struct {
	Group[string, string]
	t     *testing.T
	began []*step
	log   *zap.Logger // that of nothing by default
}

// outcome is what Do returned.
type outcome struct {
	value  string
	joined bool
	err    error
}

// caller calls Do in a goroutine of its own.
type caller struct {
	leave func()
	done  chan outcome
}

func (g *group) call(key string, fresh bool) *caller {
	ctx, cancel := context.WithCancelCause(g.t.Context())
	c := &caller{leave: func() { cancel(errLeft) }, done: make(chan outcome, 1)}
	go func() {
		var o outcome
		o.value, o.joined, o.err = g.Do(ctx, cmp.Or(g.log, zap.NewNop()), key, fresh, func(ctx context.Context, fresh bool) (string, error) {
			s := &step{ctx: ctx, fresh: fresh, end: make(chan string), panic: make(chan any)}
			g.began = append(g.began, s)
			select {
			case value := <-s.end:
				return value, nil
			case value := <-s.panic:
				panic(value)
			case <-ctx.Done():
				return "", context.Cause(ctx)
			}
		})
		c.done <- o
	}()
	synctest.Wait()
	return c
}

var errLeft = errors.New("left")

func (g *group) wantBegan(want int) {
	g.t.Helper()
	synctest.Wait()
	if len(g.began) != want {
		g.t.Fatalf("%d calls began, want %d", len(g.began), want)
	}
}

func (g *group) wantEmpty() {
	g.t.Helper()
	synctest.Wait()
	if len(g.slots) > 0 {
		g.t.Errorf("%d slots are left", len(g.slots))
	}
}

func (c *caller) want(t *testing.T, value string, joined bool) {
	t.Helper()
	if o := <-c.done; o.value != value || o.joined != joined || o.err != nil {
		t.Errorf("got %q, joined %v, error %v; want %q, joined %v", o.value, o.joined, o.err, value, joined)
	}
}

func (c *caller) wantError(t *testing.T, want error) {
	t.Helper()
	if o := <-c.done; !errors.Is(o.err, want) {
		t.Errorf("got %q, error %v, want error %v", o.value, o.err, want)
	}
}

func TestJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		first, second, other := g.call("a", false), g.call("a", false), g.call("b", false)
		g.wantBegan(2)
		g.began[0].end <- "one"
		first.want(t, "one", false)
		second.want(t, "one", true)
		if g.began[0].ctx.Err() == nil {
			t.Error("the context of a call does not end with the call")
		}
		g.began[1].end <- "other"
		other.want(t, "other", false)
		g.wantEmpty()

		third := g.call("a", false) // what has ended is not joined
		g.wantBegan(3)
		g.began[2].end <- "two"
		third.want(t, "two", false)
		g.wantEmpty()
	})
}

func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		first, second := g.call("a", false), g.call("a", false)
		first.leave()
		first.wantError(t, errLeft)
		if err := g.began[0].ctx.Err(); err != nil {
			t.Errorf("the call has ended with %v, although a caller waits for it", err)
		}
		g.began[0].end <- "one"
		second.want(t, "one", true)
		g.wantBegan(1)
		g.wantEmpty()
	})
}

func TestAbandon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		first, second := g.call("a", false), g.call("a", false)
		first.leave()
		second.leave()
		first.wantError(t, errLeft)
		second.wantError(t, errLeft)
		if cause := context.Cause(g.began[0].ctx); !errors.Is(cause, ErrAbandoned) {
			t.Errorf("the call was canceled with %v, want %v", cause, ErrAbandoned)
		}
		g.wantEmpty()
	})
}

// abandon makes a call whose only caller has left. It goes on until end is called.
func abandon(t *testing.T, g *Group[string, string], key string) (end func()) {
	winding := make(chan struct{})
	ctx, leave := context.WithCancel(t.Context())
	go func() {
		_, _, _ = g.Do(ctx, zap.NewNop(), key, false, func(ctx context.Context, _ bool) (string, error) {
			<-ctx.Done()
			<-winding
			return "late", nil
		})
	}()
	synctest.Wait()
	leave()
	synctest.Wait()
	return func() { close(winding) }
}

// A caller that comes while an abandoned call winds down gets a call of its own, after it.
func TestAbandonedCallIsNotJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, string]
		end := abandon(t, &g, "a")
		done := make(chan outcome, 1)
		go func() {
			var o outcome
			o.value, o.joined, o.err = g.Do(t.Context(), zap.NewNop(), "a", false, func(context.Context, bool) (string, error) { return "new", nil })
			done <- o
		}()
		synctest.Wait()
		select {
		case o := <-done:
			t.Fatalf("two calls of one key ran at once: %+v", o)
		default:
		}
		end()
		if o := <-done; o.value != "new" || o.joined || o.err != nil {
			t.Errorf("got %+v", o)
		}
	})
}

// What is fresh for one caller is fresh for all that join it, whoever comes first.
func TestFreshForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		only := g.call("a", true)
		g.wantBegan(1)
		end := abandon(t, &g.Group, "b")
		fresh, joins := g.call("b", true), g.call("b", false)
		end()
		g.wantBegan(2)
		if !g.began[0].fresh || !g.began[1].fresh {
			t.Errorf("the calls are fresh: %v and %v", g.began[0].fresh, g.began[1].fresh)
		}
		g.began[0].end <- "one"
		only.want(t, "one", false)
		g.began[1].end <- "two"
		fresh.want(t, "two", false)
		joins.want(t, "two", true)
	})
}

func TestFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		stale := g.call("a", false)
		fresh, alsoFresh := g.call("a", true), g.call("a", true)
		g.wantBegan(1) // one at a time
		g.began[0].end <- "stale"
		stale.want(t, "stale", false)
		g.wantBegan(2)
		if g.began[0].fresh || !g.began[1].fresh {
			t.Errorf("the calls are fresh: %v and %v", g.began[0].fresh, g.began[1].fresh)
		}
		late := g.call("a", false) // it joins the fresh call
		g.began[1].end <- "fresh"
		fresh.want(t, "fresh", false)
		alsoFresh.want(t, "fresh", true)
		late.want(t, "fresh", true)
		g.wantEmpty()
	})
}

// A call that all its callers have left before it began never begins.
func TestLeaveBeforeItBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		first, waiting := g.call("a", false), g.call("a", true)
		waiting.leave()
		waiting.wantError(t, errLeft)
		g.began[0].end <- "one"
		first.want(t, "one", false)
		g.wantBegan(1)
		g.wantEmpty()
	})
}

// Those who wait for the next call get it, although all callers of the one before have left.
func TestLeaveBeforeTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		first, waiting := g.call("a", false), g.call("a", true)
		first.leave()
		first.wantError(t, errLeft)
		g.wantBegan(2)
		g.began[1].end <- "two"
		waiting.want(t, "two", false)
		g.wantEmpty()
	})
}

// A caller may leave at the moment at which its call ends.
func TestLeaveAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &group{t: t}
		for range 1000 {
			ctx, leave := context.WithCancelCause(t.Context())
			value, _, err := g.Do(ctx, zap.NewNop(), "a", false, func(context.Context, bool) (string, error) {
				leave(errLeft)
				return "one", nil
			})
			if (value != "one" || err != nil) && !errors.Is(err, errLeft) {
				t.Fatalf("got %q, error %v", value, err)
			}
		}
		g.wantEmpty()
	})
}

func TestError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, string]
		want := errors.New("failed")
		if _, _, err := g.Do(t.Context(), zap.NewNop(), "a", false, func(context.Context, bool) (string, error) { return "", want }); !errors.Is(err, want) {
			t.Errorf("got %v", err)
		}
	})
}

// A call that panics is an error for all its callers, and the next call begins.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zapcore.ErrorLevel)
		g := &group{t: t, log: zap.New(core)}
		first, second, fresh := g.call("a", false), g.call("a", false), g.call("a", true)
		g.began[0].panic <- http.ErrAbortHandler // which is no special case: it is not the callers' goroutine
		first.wantError(t, guard.ErrPanic)
		second.wantError(t, guard.ErrPanic)
		g.wantBegan(2)
		if err := g.began[0].ctx.Err(); err == nil {
			t.Error("the context of the call has not ended")
		}
		g.began[1].end <- "one"
		fresh.want(t, "one", false)
		g.wantEmpty()
		if log.Len() != 1 {
			t.Errorf("the log has %v", log.All())
		}
	})
}
