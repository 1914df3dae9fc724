package archive

import (
	"context"
	"fmt"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
)

// writeAll stores what is queued, one value after the other, until the archive is closed.
func (a *Archive) writeAll() {
	var retry backoff
	for {
		if a.holdWrites(a.ctx) != nil {
			return
		}
		w := a.next()
		stored := w != nil && a.store(w)
		a.releaseWrites()
		if w == nil {
			select {
			case <-a.wake:
				continue
			case <-a.ctx.Done():
				return
			}
		}
		if stored {
			retry.reset()
			continue
		}
		select {
		case <-time.After(retry.next()):
		case <-a.flush:
			retry.reset()
		case <-a.ctx.Done():
			return
		}
	}
}

// holdWrites waits for the write under way to end and holds back the next.
func (a *Archive) holdWrites(ctx context.Context) error {
	select {
	case a.writes <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *Archive) releaseWrites() { <-a.writes }

func (a *Archive) next() *write {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.queue.front()
}

// store stores a value and removes it from the queue, unless a newer value has replaced it. A value that fails goes to
// the end of the queue, so it does not hold up the others.
func (a *Archive) store(w *write) bool {
	b := a.backend()
	if b == nil {
		return false
	}
	value, err := Encode(w.key, w.report)
	if err == nil {
		ctx, cancel := context.WithTimeout(a.ctx, writeTimeout)
		defer cancel()
		err = a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
			return storage.Store(ctx, a.layout.key(w.key), value)
		})
	}
	if err != nil {
		failuresTotal.Inc()
		a.setFailing(b, fmt.Errorf("storing %s: %w", a.layout.key(w.key), err))
		a.postpone(w)
		return false
	}
	writesTotal.Inc()
	if a.finish(b, w) {
		a.setFailing(b, nil)
	}
	return true
}

func (a *Archive) postpone(w *write) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.queue.postpone(w.key)
}

// finish removes a write that is done and reports whether the queue is empty.
func (a *Archive) finish(b *Backend, w *write) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.queue.get(w.key) == w {
		a.queue.remove(w.key)
		a.notifyDequeued()
	}
	if a.queue.len() > 0 {
		return false
	}
	if a.refused > 0 {
		b.Logger.Warn("the queue to the storage is empty again", zap.Int("refused", a.refused))
		a.refused = 0
	}
	return true
}

// notifyDequeued wakes those who wait for a value to leave the queue. The caller holds the mutex.
func (a *Archive) notifyDequeued() {
	close(a.dequeued)
	a.dequeued = make(chan struct{})
}
