// Package archive is the storage tier: it keeps finished reports in a storage, where they outlive the process and other
// instances find them.
//
// Writes are asynchronous and never delay a response: a storage that fails costs only what it would have kept. The
// package does not know Caddy's HTTP handlers, upstreams or callers.
package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Archive reads values from a storage and writes them to it. It outlives a configuration: it uses the backend that was
// attached last, and holds nothing else of a configuration.
type Archive struct {
	layout layout
	slots  chan struct{} // bounds the operations under way, including those that hang
	wake   chan struct{} // signals the writer that the queue is not empty
	flush  chan struct{} // signals the writer to retry without delay
	writes chan struct{} // full while a write runs or must not run
	ctx    context.Context
	stop   context.CancelFunc
	tasks  sync.WaitGroup // the writer and the sweeper
	reads  breaker

	mu       sync.Mutex // guards the fields below
	backends []*Backend
	queue    queue
	refused  int           // values refused since the queue was last empty
	dequeued chan struct{} // closed and replaced whenever a value leaves the queue
	failing  bool          // the state that was last logged
}

// Backend is what a configuration lets an Archive use.
type Backend struct {
	Storage   certmagic.Storage
	Logger    *zap.Logger
	Retention time.Duration // how long values are kept

	leaving bool
}

const (
	// maxOperations bounds the operations under way: a storage that ignores deadlines holds at most that many goroutines.
	maxOperations = 32

	readTimeout  = 2 * time.Second // a caller waits for it
	writeTimeout = 30 * time.Second
	purgeTimeout = time.Minute
	drainTimeout = 10 * time.Second // if the server has no grace period
)

var (
	// ErrUnreadable means that the storage cannot be read at the moment.
	ErrUnreadable = errors.New("the storage cannot be read")

	errTooManyOperations = errors.New("too many operations are waiting for the storage")
)

// New returns the archive of a namespace. It does nothing until a backend is attached, and must be closed.
func New(namespace string) *Archive {
	a := &Archive{
		layout:   newLayout(namespace),
		slots:    make(chan struct{}, maxOperations),
		wake:     make(chan struct{}, 1),
		flush:    make(chan struct{}, 1),
		writes:   make(chan struct{}, 1),
		dequeued: make(chan struct{}),
	}
	a.ctx, a.stop = context.WithCancel(context.Background())
	a.tasks.Go(a.writeAll)
	a.tasks.Go(a.sweepAll)
	return a
}

// Close ends the archive. Values that are still queued are lost.
func (a *Archive) Close() {
	a.stop()
	a.tasks.Wait()
}

// Attach makes b the backend that is used.
func (a *Archive) Attach(b *Backend) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.backends = append(a.backends, b)
}

// Detach ends the use of b.
func (a *Archive) Detach(b *Backend) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.backends = slices.DeleteFunc(a.backends, func(other *Backend) bool { return other == b })
}

// backend returns the newest backend, preferably one that is not leaving. It returns nil if there is none.
func (a *Archive) backend() *Backend {
	a.mu.Lock()
	defer a.mu.Unlock()
	var newest *Backend
	for _, b := range a.backends {
		if newest == nil || newest.leaving || !b.leaving {
			newest = b
		}
	}
	return newest
}

// try runs op on the storage. It returns when op has returned or ctx has ended, even if the storage ignores ctx.
func (a *Archive) try(ctx context.Context, op func(context.Context, certmagic.Storage) error) error {
	b := a.backend()
	if b == nil {
		return context.Canceled
	}
	select {
	case a.slots <- struct{}{}:
	default:
		return errTooManyOperations
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-a.slots }()
		done <- op(ctx, b.Storage)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Load returns the report that is stored or queued under k, and how long it may still be kept. It returns nil if there is
// none. After a failed read, reads fail for the duration of pause, so callers do not queue up behind a storage that is
// unavailable.
func (a *Archive) Load(ctx context.Context, k task.Key, pause time.Duration) (report *task.Report, ttl time.Duration, err error) {
	b := a.backend()
	if b == nil {
		return nil, 0, ErrUnreadable
	}
	if report = a.queued(k); report != nil {
		return report, b.Retention, nil
	}
	if a.reads.open(time.Now()) {
		return nil, 0, ErrUnreadable
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var stored []byte
	err = a.try(ctx, func(ctx context.Context, storage certmagic.Storage) (err error) {
		stored, err = storage.Load(ctx, a.layout.key(k))
		return err
	})
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, nil
	case errors.Is(err, context.Canceled): // all callers have left
		return nil, 0, err
	default:
		a.reads.trip(time.Now().Add(pause))
		a.setFailing(b, err)
		return nil, 0, ErrUnreadable
	}
	report, err = Decode(k, stored)
	if err != nil {
		b.Logger.Warn("a stored value is damaged and is set aside", zap.String("key", a.layout.key(k)), zap.Error(err))
		a.setAside(k, stored)
		return nil, 0, nil
	}
	if ttl = b.Retention - time.Since(report.At()); ttl <= 0 {
		return nil, 0, nil
	}
	return report, ttl, nil
}

// setAside moves a damaged value to a place where it can be examined until the sweep deletes it.
func (a *Archive) setAside(k task.Key, value []byte) {
	ctx, cancel := context.WithTimeout(a.ctx, readTimeout)
	defer cancel()
	err := a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
		if err := storage.Store(ctx, a.layout.damagedKey(k), value); err != nil {
			return err
		}
		return storage.Delete(ctx, a.layout.key(k))
	})
	if b := a.backend(); err != nil && b != nil {
		a.setFailing(b, err)
	}
}

// Save queues a report to be stored. It replaces an older one that is queued under k. It reports whether there is room.
func (a *Archive) Save(k task.Key, report *task.Report) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.backends) == 0 {
		return false
	}
	if a.queue.push(k, report) {
		signal(a.wake)
		return true
	}
	refusedTotal.Inc()
	if a.refused++; a.refused == 1 {
		a.backends[len(a.backends)-1].Logger.Warn("the queue to the storage is full: reports stay in memory only until they are requested again",
			zap.Int("queued", a.queue.len()))
	}
	return false
}

// queued returns the report that is queued under k, which may have left memory.
func (a *Archive) queued(k task.Key) *task.Report {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := a.queue.get(k); w != nil {
		return w.report
	}
	return nil
}

// setFailing logs when the storage begins to fail and when it works again.
func (a *Archive) setFailing(b *Backend, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	a.mu.Lock()
	changed := a.failing != (err != nil)
	a.failing = err != nil
	queued := a.queue.len()
	a.mu.Unlock()
	switch {
	case changed && err != nil:
		b.Logger.Warn("the storage fails: answers go on without it", zap.Int("queued", queued), zap.Error(err))
	case changed:
		b.Logger.Info("the storage works again", zap.Int("queued", queued))
	}
}

// Stats describes the queue to a storage.
type Stats struct {
	Queued      int  `json:"queued"`
	QueuedBytes int  `json:"queued_bytes"`
	Failing     bool `json:"failing"`
}

// Stats returns the current stats.
func (a *Archive) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return Stats{Queued: a.queue.len(), QueuedBytes: a.queue.bytes, Failing: a.failing}
}

// Drain waits until the queue is empty if b is the last backend. If another backend stays, the writer goes on with that.
// If ctx ends first, the error says how much is left.
func (a *Archive) Drain(ctx context.Context, b *Backend) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, drainTimeout)
		defer cancel()
	}
	signal(a.flush)
	for {
		a.mu.Lock()
		b.leaving = true
		others := slices.ContainsFunc(a.backends, func(b *Backend) bool { return !b.leaving })
		queued, dequeued := a.queue.len(), a.dequeued
		a.mu.Unlock()
		if others || queued == 0 {
			return nil
		}
		select {
		case <-dequeued:
		case <-ctx.Done():
			return fmt.Errorf("%d reports could not be stored in time", queued)
		}
	}
}

// signal sends to a channel that has room for one signal.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
