package archive

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	// maxWrites is the number of writes at once. A write is up to three operations: with 20 ms each, it still keeps up with
	// 600 reports a second.
	maxWrites = 48

	// The delay before a failed write is retried. It doubles with each failure.
	firstRetry = 250 * time.Millisecond
	lastRetry  = 30 * time.Second

	// giveUpAfter is how long a value is retried that fails while others are stored. Time counts if another value was stored
	// in it, at most maxCounted at once, so that nothing is given up in an outage.
	giveUpAfter = time.Hour
	maxCounted  = 5 * time.Minute

	// reportAfter is the number of failures after which a value is logged that fails while others are stored.
	reportAfter = 3

	// inlineLimit is the size of a document up to which it is stored in one value, in bytes. A larger one is referred to, so
	// the memory for it can be reserved before it is read.
	inlineLimit = 128 << 10
)

// Save queues a report to be stored. It replaces an older one that is queued under the key. It reports whether there is
// room: if not, Room is called when there is.
func (a *Archive) Save(i Item) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.backends) == 0 {
		return false
	}
	if _, ok := a.alone[i.Key]; ok {
		return true
	}
	if !a.queue.push(i) {
		a.Metrics.refused.Inc()
		if now := time.Now(); a.refused == 0 && now.After(a.tellFull) {
			a.tellFull, a.toldFull = now.Add(complainEvery), true
			a.current().Logger.Warn("the queue to the storage is full: memory keeps reports until there is room again",
				zap.Int("queued", a.queue.len()))
		}
		a.refused++
		return false
	}
	a.startWrites()
	return true
}

// pump starts the writes that are due.
func (a *Archive) pump() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.startWrites()
}

// startWrites starts the writes that are due, and sets a timer for those that will be. While the storage fails, there is
// one at a time: a value that has not failed yet, or a probe. The caller holds the mutex.
func (a *Archive) startWrites() {
	b := a.current()
	if b == nil || a.ctx.Err() != nil {
		return
	}
	now := time.Now()
	for {
		limit, probe := maxWrites, time.Duration(0)
		if a.writes.open() {
			limit, probe = min(a.hanging+1, maxWrites), a.writes.untilProbe(now)
		}
		if a.writing >= limit {
			return // the end of a write starts the next
		}
		w := a.queue.next(now, probe == 0)
		if w == nil {
			if at, ok := a.queue.retryAt(); ok {
				a.wake.Reset(max(at.Sub(now), probe))
			}
			return
		}
		a.writing++
		go a.write(b, w, w.Item)
	}
}

// write tries to store an item.
func (a *Archive) write(b *Backend, w *write, i Item) {
	ctx, cancel := context.WithTimeout(a.ctx, writeTimeout)
	defer cancel()
	// A storage that ignores the context may hang for longer. Then the write still holds its place, but is no probe.
	var hangs, returned bool // guarded by a.mu
	overdue := time.AfterFunc(writeTimeout+time.Second, func() {
		a.noteFailedWrite(b, i.Key, errTimeout)
		a.mu.Lock()
		defer a.mu.Unlock()
		if !returned {
			hangs = true
			a.hanging++
			a.startWrites()
		}
	})
	err := a.store(ctx, b, i)
	overdue.Stop()
	if err != nil && ctx.Err() != nil {
		err = timedOut(err)
	}
	if a.ctx.Err() != nil {
		return
	}
	refused := errors.Is(err, errTooLarge) || err != nil && a.isRefused(w)
	if err == nil {
		a.Metrics.written.Inc()
		if a.Stored != nil {
			a.Stored(i)
		}
		if a.writes.succeed() {
			a.tellClosed(b, a.writes.operation)
		}
	} else {
		a.Metrics.failed.Inc()
		if !refused {
			a.noteFailedWrite(b, i.Key, err)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.writing--
	if returned = true; hangs {
		a.hanging--
	}
	now := time.Now()
	switch a.failing = err != nil && !refused; {
	case err == nil:
		a.stored++
		a.storedAt = now
		a.queue.finish(w)
	case w.dropped():
		a.queue.finish(w)
	default:
		a.retry(b, w, now, err)
	}
	a.queueChanged(b)
}

// isRefused reports whether a write has failed before, although others have succeeded since. When it fails again, that says
// nothing about the storage, unless nothing else can be stored any more.
func (a *Archive) isRefused(w *write) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return (w.failedFor > 0 || w.tries > 0 && a.storedAt.After(w.failedAt)) && !a.writes.open()
}

// queueChanged wakes those who wait for the queue, offers the room that it has, and starts the writes that are due. The
// caller holds the mutex.
func (a *Archive) queueChanged(b *Backend) {
	a.notify()
	a.offerRoom(b)
	a.startWrites()
}

// noteFailedWrite tells the breaker of a write that has failed or hangs.
func (a *Archive) noteFailedWrite(b *Backend, k task.Key, err error) {
	err = a.writes.explain(err)
	if a.writes.fail(k, time.Now(), err) {
		a.tellOpened(b, a.writes.operation, err)
	}
}

// retry schedules another try of a write that has failed, unless it is given up. The caller holds the mutex.
func (a *Archive) retry(b *Backend, w *write, now time.Time, err error) {
	if w.tries++; w.tries == 1 {
		w.failedAt = now
	}
	if a.storedAt.After(w.failedAt) {
		w.failedFor += min(now.Sub(w.failedAt), maxCounted)
		w.failedAt = now
	}
	field := zap.String("key", a.layout.name(place{kind: inPartition, key: w.Key}))
	if (w.tries >= reportAfter && w.failedFor > 0 || errors.Is(err, errTooLarge)) && !w.reported {
		w.reported = true
		b.Logger.Warn("the storage does not take a report: it is retried", field, errorField(err))
	}
	if w.failedFor >= giveUpAfter {
		a.Metrics.givenUp.Inc()
		b.Logger.Warn("the storage does not take a report: it is given up", field, errorField(err))
		a.queue.finish(w)
		return
	}
	last := lastRetry
	if a.leaving() {
		last = firstRetry
	}
	a.queue.retry(w, now.Add(w.backoff.next(firstRetry, last, a.jitter)))
}

// offerRoom calls Room if reports were refused and a quarter of the queue is free. The caller holds the mutex.
func (a *Archive) offerRoom(b *Backend) {
	if a.refused == 0 || a.queue.len() > maxQueue*3/4 || a.queue.bytes > maxQueueBytes*3/4 {
		return
	}
	if a.toldFull {
		b.Logger.Info("the queue to the storage has room again", zap.Int("refused", a.refused))
	}
	a.refused, a.toldFull = 0, false
	if a.Room != nil {
		go a.Room()
	}
}

// store stores an item: its report, or a reference to it.
func (a *Archive) store(ctx context.Context, b *Backend, i Item) error {
	r := i.Report
	at := place{kind: inPartition, key: i.Key}
	doc := at // where the report is
	if i.Target != nil {
		doc.key = *i.Target
	}
	length := len(r.Document().Body)
	if length > inlineLimit {
		doc.kind = large
	}
	size := int64(length + valueOverhead)
	if i.Target == nil {
		if err := a.storeValue(ctx, b, doc, value{kind: kindDocument, at: r.At(), key: i.Key, report: r}); err != nil {
			return err
		}
	}
	if doc != at {
		if err := a.storeValue(ctx, b, at, value{kind: kindReference, at: r.At(), key: i.Key, target: doc, size: size}); err != nil {
			return err
		}
	}
	if file := r.File(); i.Target == nil && file != [32]byte{} {
		k := task.FileKey(task.FileSource(a.Namespace, file, i.Kind), i.Key)
		ref := place{kind: ofFile, key: k, at: r.At().UnixNano()}
		return a.storeValue(ctx, b, ref, value{kind: kindReference, at: r.At(), key: k, target: doc, size: size})
	}
	return nil
}

// storeValue stores a value, and notes it for the index.
func (a *Archive) storeValue(ctx context.Context, b *Backend, p place, v value) error {
	name := a.layout.name(p)
	stored, err := encode(v, name, b.Keyring)
	if err != nil {
		return err
	}
	if err := b.store(ctx, name, stored); err != nil {
		return fmt.Errorf("storing %s: %w", name, err)
	}
	a.index(p, v.at)
	return nil
}

const (
	// drainPatience is how long a drain goes on without a stored value.
	drainPatience = 5 * time.Second

	drainTimeout = time.Minute
)

// Flush begins to drain: b is leaving. If it is the last backend, what is queued is tried at once.
func (a *Archive) Flush(b *Backend) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.leaving = true
	if !a.leaving() {
		return
	}
	a.queue.flush(time.Now())
	a.writes.probeNow()
	a.startWrites()
}

// Drain waits until the queue and the index are stored if b is the last backend. If another backend stays, that one is used
// from then on. It ends when nothing has been stored for a while. The error says how much is left.
//
// A context has no say in it: the grace period of the server may be over already.
func (a *Archive) Drain(b *Backend) error {
	a.Flush(b)
	defer a.log.Flush() // after a drain, the log may be closed
	defer a.tellLost()  // Close does not
	ctx, cancel := context.WithTimeout(a.ctx, drainTimeout)
	defer cancel()
	patience := time.AfterFunc(drainPatience, cancel)
	defer patience.Stop()
	stored, indexing := uint64(0), false
	for {
		a.mu.Lock()
		leaving, queued, changed := a.leaving(), a.queue.len(), a.changed
		progress := a.stored != stored
		stored = a.stored
		if leaving && queued == 0 && (!indexing || len(a.batch.places) > 0) { // what fails is tried again after a while
			indexing = true
			a.writeIndex()
		}
		indexed := a.batch.empty()
		a.mu.Unlock()
		if !leaving || queued == 0 && indexed {
			return nil
		}
		if progress {
			patience.Reset(drainPatience)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return drainError(queued)
		}
	}
}

func drainError(queued int) error {
	if queued == 0 {
		return errors.New("all reports are stored, but the index was not written in time")
	}
	return fmt.Errorf("%d reports could not be stored in time", queued)
}
