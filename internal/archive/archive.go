// Package archive is the storage tier: it keeps finished reports in a storage, where they outlive the process and other
// instances find them.
//
// The storage may be a network away, refuse values, fail or hang. Writes are asynchronous and never delay a response: a
// storage that fails costs only what it would have kept. The package does not know Caddy's HTTP handlers, upstreams or
// callers.
package archive

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/logqueue"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Config configures an Archive.
type Config struct {
	Namespace string

	// Metrics counts what the archive does. Default: metrics of its own
	Metrics *Metrics

	// Seed is the seed of all jitter, and of the name of the archive as a writer, which must be unique. Default: random
	Seed uint64

	// Now is the wall clock that decides the age of values. Delays and deadlines are monotonic. Default: time.Now
	Now func() time.Time

	// Stored is called after an item has been stored. It must not block. Default: none
	Stored func(Item)

	// Room is called when the queue has room again after it has refused a report. It must not block. Default: none
	Room func()
}

// Archive reads values from a storage and writes them to it. It outlives a configuration: it uses the backend that was
// attached last, and holds nothing else of a configuration.
type Archive struct {
	Config
	layout layout
	writer string // the name of the archive in the storage, beside those of other instances

	ctx    context.Context
	stop   context.CancelFunc
	reads  *breaker
	lists  *breaker // of lists that callers wait for: a storage may be unable to list, and yet be read
	writes *breaker
	slots  chan struct{} // one for each read
	notes  chan struct{} // one for each operation on a note
	proof  proof
	peers  peers
	locks  locks
	failed failures       // of what is done in the background
	log    logqueue.Queue // lines are logged while locks are held

	mu        sync.Mutex // guards the fields below
	backends  []*Backend
	queue     queue
	jitter    *rand.Rand // of retries
	writing   int        // writes under way
	hanging   int        // those of them whose time is over
	wake      *time.Timer
	refused   int           // reports refused since Room was called
	tellFull  time.Time     // when it may be logged again that the queue is full
	toldFull  bool          // that the queue is full
	lost      losses        // since the log was told
	changed   chan struct{} // closed and replaced when the queue or the index batches change
	stored    uint64        // writes that have succeeded
	storedAt  time.Time     // the last one
	failing   bool          // the last write failed
	batch     batch
	alone     map[task.Key]struct{} // values that must be left alone
	undeleted map[place]struct{}    // values that a purge could not delete
	complain  time.Time             // when a failed read may be logged again
	sweepOnce sync.Once
}

// Backend is what a configuration lets an Archive use.
type Backend struct {
	Name      string // of the storage's module, which stats and errors have
	Storage   certmagic.Storage
	Logger    *zap.Logger
	Retention time.Duration // how long values are kept
	Keyring   *Keyring      // seals values; nil if they are not sealed

	lister lister       // of Storage
	whole  atomic.Int64 // the size up to which it keeps values whole, as far as is known
	tried  atomic.Bool  // whether that is known

	leaving  bool     // guarded by Archive.mu
	warnings []string // guarded by Archive.mu
}

const (
	writeTimeout = 30 * time.Second

	// complainEvery is how often what goes on failing is logged.
	complainEvery = time.Minute
)

// timeout returns the error of an operation whose time is over, with what the storage said before, since it last worked.
func (a *Archive) timeout() error {
	if a.writes.lastError() == nil {
		return a.reads.explain(errTimeout)
	}
	return a.writes.explain(errTimeout)
}

// random returns random numbers for one purpose, so that none depends on when another is drawn.
func (a *Archive) random(purpose string) *rand.Rand {
	k := task.NewKey(purpose)
	return rand.New(rand.NewPCG(a.Seed, uint64(k[0])<<8|uint64(k[1]))) //nolint:gosec // it need not be unpredictable
}

// Logger returns the logger of the backend in use, whose lines name the storage. Who logs with it does not wait for the log. It
// returns nil if there is no backend.
func (a *Archive) Logger() *zap.Logger {
	if b := a.backend(); b != nil {
		return b.Logger
	}
	return nil
}

// backend returns the newest backend, preferably one that is not leaving. It returns nil if there is none.
func (a *Archive) backend() *Backend {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.current()
}

// current is backend for callers that hold the mutex.
func (a *Archive) current() *Backend {
	var newest *Backend
	for _, b := range a.backends {
		if newest == nil || newest.leaving || !b.leaving {
			newest = b
		}
	}
	return newest
}

// leaving reports whether all backends are leaving. The caller holds the mutex.
func (a *Archive) leaving() bool {
	return !slices.ContainsFunc(a.backends, func(b *Backend) bool { return !b.leaving })
}

// leaveAlone makes sure that a value is not overwritten, and reports whether it was not known before. The number of such
// values that are remembered is bounded.
func (a *Archive) leaveAlone(k task.Key) (first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.alone[k]; ok {
		return false
	}
	if len(a.alone) >= maxQueue {
		clear(a.alone)
	}
	a.alone[k] = struct{}{}
	return true
}

// queued returns the item that is queued under k, whose report may have left memory.
func (a *Archive) queued(k task.Key) *Item {
	a.mu.Lock()
	defer a.mu.Unlock()
	return clone(a.queue.get(k))
}

// IsQueued reports whether a report is queued under k.
func (a *Archive) IsQueued(k task.Key) bool { return a.queued(k) != nil }

// queuedOf returns the newest item that is queued of a file, or nil.
func (a *Archive) queuedOf(sum [32]byte, kind task.Kind) *Item {
	a.mu.Lock()
	defer a.mu.Unlock()
	return clone(a.queue.newest(sum, kind))
}

// clone copies an item of the queue, which may be replaced as soon as the mutex is released.
func clone(i *Item) *Item {
	if i == nil {
		return nil
	}
	c := *i
	return &c
}

// Queued returns all items that are queued, in no order.
func (a *Archive) Queued() []Item {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.queue.items()
}

// Stats describes a storage and the queue to it.
type Stats struct {
	Module      string `json:"module"`
	Queued      int    `json:"queued"`
	QueuedBytes int    `json:"queued_bytes"`
	Failing     bool   `json:"failing"`
	Error       string `json:"error,omitempty"` // the last one, while the storage fails

	// Warnings are what was found when the storage was tried: that it does not keep large values.
	Warnings []string `json:"warnings,omitempty"`
}

// Stats returns the current stats.
func (a *Archive) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Stats{Queued: a.queue.len(), QueuedBytes: a.queue.bytes, Failing: a.failing || a.reads.open() || a.writes.open()}
	if b := a.current(); b != nil {
		s.Module, s.Warnings = b.Name, slices.Clone(b.warnings)
	}
	if err := cmp.Or(a.writes.lastError(), a.reads.lastError()); s.Failing && err != nil {
		s.Error = shownError{err}.Error()
	}
	return s
}

// notify wakes those who wait for a change. The caller holds the mutex.
func (a *Archive) notify() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// tellOpened logs that the breaker of an operation has opened.
func (a *Archive) tellOpened(b *Backend, operation string, err error) {
	b.Logger.Warn("the storage fails: answers go on without it",
		zap.String("operation", operation), zap.Int("queued", a.Stats().Queued), errorField(err))
}

// tellClosed logs that the breaker of an operation has closed.
func (a *Archive) tellClosed(b *Backend, operation string) {
	b.Logger.Info("the storage works again", zap.String("operation", operation), zap.Int("queued", a.Stats().Queued))
}

// NoteTask notes how a try of a task has ended. The log tells if it fails again and again, and when it works again.
func (a *Archive) NoteTask(t Task, err error) {
	logger := a.Logger()
	if a.ctx.Err() != nil || logger == nil {
		return
	}
	if err != nil {
		a.Metrics.background.WithLabelValues(string(t)).Inc()
	}
	a.failed.note(logger, t, err)
}

// sleep reports whether a time has passed without the end of the archive.
func (a *Archive) sleep(d time.Duration) bool {
	ctx, cancel := context.WithTimeout(a.ctx, d)
	defer cancel()
	<-ctx.Done()
	return a.ctx.Err() == nil
}

// sweepInterval returns the time between two passes. Each scans one of the 4096 partitions, so a round of the scan takes 28
// days if values are kept for more than 40 minutes.
func sweepInterval(retention time.Duration) time.Duration {
	return min(max(retention/4, time.Second), 10*time.Minute)
}
