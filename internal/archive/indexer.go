package archive

import (
	"context"
	"time"
)

const (
	// indexDelay is the time after which what was stored is in the index at the latest. What is lost in a crash before is
	// found by the scan.
	indexDelay = 5 * time.Minute

	// maxBatches bounds the batches that wait to be written to the index.
	maxBatches = 16
)

// index notes that a value was stored.
func (a *Archive) index(p place, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := &a.batch
	if len(b.places) == 0 {
		a.indexIn(a.indexDelay())
	}
	b.places = append(b.places, p)
	if at.After(b.newest) {
		b.newest = at
	}
	if len(b.places) == maxIndexed {
		a.writeIndex()
	}
}

// indexDelay is shorter if values are kept for a short time only. The caller holds the mutex.
func (a *Archive) indexDelay() time.Duration {
	if b := a.current(); b != nil {
		return min(indexDelay, sweepInterval(b.Retention)/2)
	}
	return indexDelay
}

// indexIn writes the index after a delay. The caller holds the mutex.
func (a *Archive) indexIn(delay time.Duration) {
	b := &a.batch
	if b.timer == nil {
		b.timer = time.AfterFunc(delay, func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.writeIndex()
		})
		return
	}
	b.timer.Reset(delay)
}

// writeIndex begins to write what was stored to the index. The caller holds the mutex.
func (a *Archive) writeIndex() {
	b := &a.batch
	if len(b.places) > 0 {
		b.number++
		b.full = append(b.full, indexObject{name: a.layout.indexName(b.newest, a.writer, b.number), newest: b.newest, places: b.places})
		b.places, b.newest = nil, time.Time{}
		if len(b.full) > maxBatches {
			b.full = b.full[1:] // the scan finds them
		}
	}
	if backend := a.current(); len(b.full) > 0 && !b.writing && backend != nil && a.ctx.Err() == nil {
		b.writing = true
		go a.writeBatch(backend, b.full[0])
	}
}

// writeBatch writes one object of the index, and begins to write the next.
func (a *Archive) writeBatch(backend *Backend, o indexObject) {
	ctx, cancel := context.WithTimeout(a.ctx, writeTimeout)
	defer cancel()
	err := backend.Storage.Store(ctx, o.name, encodeIndex(o.newest, o.places))
	a.mu.Lock()
	defer a.mu.Unlock()
	b := &a.batch
	b.writing = false
	defer a.notify()
	if err != nil {
		backend.Logger.Debug("writing the index of the storage", errorField(err))
		a.indexIn(b.backoff.next(time.Second, indexDelay, a.jitter))
		return
	}
	b.backoff = backoff{}
	if len(b.full) > 0 && b.full[0].name == o.name {
		b.full = b.full[1:]
	}
	if len(b.full) > 0 {
		a.writeIndex()
	}
}
