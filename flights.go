package fsbroker

import (
	"context"
	"errors"
	"sync"
)

// errAbandoned is the cause for which a question is dropped: all who waited for its answer have left.
var errAbandoned = errors.New("all callers have left")

// flights asks one question at a time for each key, however many callers wait for the answer. Unlike
// golang.org/x/sync/singleflight it lets callers leave, drops a question when the last one has, and never gives a
// caller who wants a fresh answer one that was asked for before he came.
type flights[K comparable, V any] struct {
	mu    sync.Mutex
	lanes map[K]*lane[V]
}

func newFlights[K comparable, V any]() *flights[K, V] {
	return &flights[K, V]{lanes: make(map[K]*lane[V])}
}

// lane is the questions of one key: the one under way, and the one to ask after it, if anybody waits for that.
type lane[V any] struct {
	current, next *flight[V]
}

// flight is one question, with those who wait for its answer.
type flight[V any] struct {
	ask     func(ctx context.Context, fresh bool) (V, error)
	ctx     context.Context
	cancel  context.CancelCauseFunc
	fresh   bool // somebody who waits wants no kept answer
	waiting int
	done    chan struct{}
	value   V
	err     error
}

// do gives the answer to the question that ask asks, or that another caller is asking under k already. A fresh caller
// joins only what has not been asked yet. When ctx ends first, so does the wait, with its cause.
// It tells whether the answer came from a question of somebody else.
func (fs *flights[K, V]) do(ctx context.Context, k K, fresh bool, ask func(context.Context, bool) (V, error)) (value V, joined bool, err error) {
	f, joined := fs.board(k, fresh, ask)
	select {
	case <-f.done:
		return f.value, joined, f.err
	case <-ctx.Done():
		fs.leave(k, f)
		return value, joined, context.Cause(ctx)
	}
}

// board finds a flight to wait for, or starts one.
func (fs *flights[K, V]) board(k K, fresh bool, ask func(context.Context, bool) (V, error)) (f *flight[V], joined bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	l := fs.lanes[k]
	switch {
	case l == nil:
		f = newFlight(ask)
		f.fresh = fresh
		fs.lanes[k] = &lane[V]{current: f}
		go fs.fly(k, fs.lanes[k])
	case !fresh && l.current.waiting > 0:
		f, joined = l.current, true
	default:
		joined = l.next != nil
		if !joined {
			l.next = newFlight(ask)
		}
		f = l.next
		f.fresh = f.fresh || fresh
	}
	f.waiting++
	return f, joined
}

func newFlight[V any](ask func(context.Context, bool) (V, error)) *flight[V] {
	f := &flight[V]{ask: ask, done: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	return f
}

// fly asks the current question of a lane, and after it the one that has come up meanwhile, until there is none.
func (fs *flights[K, V]) fly(k K, l *lane[V]) {
	for f := l.current; f != nil; {
		f.value, f.err = f.ask(f.ctx, f.fresh)
		f.cancel(nil)

		landed := f
		fs.mu.Lock()
		l.current, l.next = l.next, nil
		if f = l.current; f == nil {
			delete(fs.lanes, k)
		}
		fs.mu.Unlock()
		close(landed.done)
	}
}

// leave is for a caller that waits no longer.
func (fs *flights[K, V]) leave(k K, f *flight[V]) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f.waiting--; f.waiting > 0 {
		return
	}
	f.cancel(errAbandoned)
	if l := fs.lanes[k]; l != nil && l.next == f {
		l.next = nil
	}
}
