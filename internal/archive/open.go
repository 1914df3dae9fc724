package archive

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// New returns an archive. It does nothing until a backend is attached, and must be closed.
func New(c Config) *Archive {
	if c.Metrics == nil {
		c.Metrics = NewMetrics()
	}
	for c.Seed == 0 {
		c.Seed = rand.Uint64() //nolint:gosec // it need not be unpredictable
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	a := &Archive{
		Config:  c,
		layout:  newLayout(c.Namespace),
		slots:   make(chan struct{}, maxReads),
		notes:   make(chan struct{}, maxNotes),
		changed: make(chan struct{}),
		alone:   make(map[task.Key]struct{}),
	}
	a.writer = fmt.Sprintf("%016x", a.random("writer").Uint64())
	a.jitter = a.random("retries")
	a.reads, a.lists, a.writes = newBreaker("read", a.random("reads")), newBreaker("list", a.random("lists")), newBreaker("write", a.random("writes"))
	a.ctx, a.stop = context.WithCancel(context.Background())
	a.wake = time.AfterFunc(time.Hour, a.pump)
	a.wake.Stop()
	a.lost.tell = time.AfterFunc(time.Hour, a.tellLost)
	a.lost.tell.Stop()
	return a
}

// Close ends the archive. Values that are still queued are lost. It does not wait for operations under way, which may hang, and
// not for long until what is logged is written.
func (a *Archive) Close() {
	a.stop()
	a.mu.Lock()
	a.wake.Stop()
	a.lost.tell.Stop()
	a.batch.stop()
	a.mu.Unlock()
	a.log.Flush()
}

// Attach makes b the backend that is used. From now on, a panic of its storage is an error of the operation, and nobody waits
// for its log.
func (a *Archive) Attach(b *Backend) {
	b.Logger = a.log.Logger(b.Logger)
	b.whole.Store(math.MaxInt64)
	b.Storage = guardStorage(b.Storage, b.Logger, &b.whole)
	b.lister.storage = b.Storage
	a.mu.Lock()
	a.backends = append(a.backends, b)
	a.mu.Unlock()
	a.sweepOnce.Do(func() {
		go a.sweepAll()
		go a.renewAll()
	})
	go a.try(b)
	a.pump()
}

// Detach ends the use of b.
func (a *Archive) Detach(b *Backend) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.backends = slices.DeleteFunc(a.backends, func(other *Backend) bool { return other == b })
}
