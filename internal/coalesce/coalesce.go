// Package coalesce runs one call at a time for each key and gives its result to every caller that asked for it.
//
// It differs from golang.org/x/sync/singleflight in four ways: a caller may leave before the call ends, a call is
// canceled when its last caller leaves, a caller that wants a fresh result never joins a call that began before it came, and
// a call that panics is an error for its callers. The package does not know what the calls do.
package coalesce

import (
	"context"
	"errors"
	"sync"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
)

// ErrAbandoned is the cause with which the context of a call is canceled after all its callers have left.
var ErrAbandoned = errors.New("all callers have left")

// Func is a call. Its context belongs to the call and not to a caller. It is fresh if a caller wants no kept result.
type Func[V any] func(ctx context.Context, fresh bool) (V, error)

// Group coalesces calls by key. The zero value is ready to use.
type Group[K comparable, V any] struct {
	mu    sync.Mutex
	slots map[K]*slot[V]
}

// slot holds the calls of one key: the one that runs, and the one that follows it if a caller waits for that.
type slot[V any] struct {
	current, next *call[V]
}

// call is a call and its callers.
type call[V any] struct {
	fn      Func[V]
	logger  *zap.Logger
	ctx     context.Context
	cancel  context.CancelCauseFunc
	fresh   bool // a caller wants no kept result
	callers int
	done    chan struct{}
	value   V
	err     error
}

// Do returns the result of fn, or of the call of another caller with the same key. A fresh caller joins only a call that
// has not begun. If ctx ends first, Do returns its cause. joined reports whether the call is another caller's. If fn panics,
// logger says where, and the error is guard.ErrPanic.
func (g *Group[K, V]) Do(ctx context.Context, logger *zap.Logger, key K, fresh bool, fn Func[V]) (value V, joined bool, err error) {
	c, joined := g.join(logger, key, fresh, fn)
	select {
	case <-c.done:
		return c.value, joined, c.err
	case <-ctx.Done():
		g.leave(key, c)
		return value, joined, context.Cause(ctx)
	}
}

// Callers returns the number of callers that wait for a call.
func (g *Group[K, V]) Callers() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.slots {
		n += s.current.callers
		if s.next != nil {
			n += s.next.callers
		}
	}
	return n
}

// join returns a call to wait for, which it starts if there is none to join.
func (g *Group[K, V]) join(logger *zap.Logger, key K, fresh bool, fn Func[V]) (c *call[V], joined bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.slots[key]
	switch {
	case s == nil:
		if g.slots == nil {
			g.slots = make(map[K]*slot[V])
		}
		c = newCall(logger, fn)
		c.fresh = fresh
		s = &slot[V]{current: c}
		g.slots[key] = s
		go g.run(key, s)
	case !fresh && s.current.callers > 0:
		c, joined = s.current, true
	default:
		joined = s.next != nil
		if !joined {
			s.next = newCall(logger, fn)
		}
		c = s.next
		c.fresh = c.fresh || fresh
	}
	c.callers++
	return c, joined
}

func newCall[V any](logger *zap.Logger, fn Func[V]) *call[V] {
	c := &call[V]{fn: fn, logger: logger, done: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// run runs the current call of a slot, and then the next, until there is none.
func (g *Group[K, V]) run(key K, s *slot[V]) {
	growStack()
	for c := s.current; c != nil; {
		c.value, c.err = guard.Call(c.logger, func() (V, error) { return c.fn(c.ctx, c.fresh) })
		c.cancel(nil)

		ended := c
		g.mu.Lock()
		s.current, s.next = s.next, nil
		if c = s.current; c == nil {
			delete(g.slots, key)
		}
		g.mu.Unlock()
		close(ended.done)
	}
}

// growStack makes the stack of a new goroutine grow to 4 KiB, which calls need. Growing later takes longer, because the
// frames of the call are copied then (BenchmarkStored).
//
//go:noinline
func growStack() {
	var frame [2 << 10]byte
	use(frame[:])
}

// use keeps the compiler from leaving out what is not used otherwise.
//
//go:noinline
func use([]byte) {}

// leave removes a caller from a call.
func (g *Group[K, V]) leave(key K, c *call[V]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.callers--; c.callers > 0 {
		return
	}
	c.cancel(ErrAbandoned)
	if s := g.slots[key]; s != nil && s.next == c {
		s.next = nil
	}
}
