package harvest

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// New returns a follower. It does nothing until a source is attached, and must be closed.
func New(c Config) *Follower {
	if c.Metrics == nil {
		c.Metrics = NewMetrics()
	}
	for c.Seed == 0 {
		c.Seed = rand.Uint64() //nolint:gosec // it need not be unpredictable
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	f := &Follower{
		Config:   c,
		jitter:   rand.New(rand.NewPCG(c.Seed, 0)), //nolint:gosec // it need not be unpredictable
		items:    make(map[ID]*item),
		saving:   make(map[task.Key]saving),
		schedule: newSchedule(questionsPerSecond, maxInFlight),
	}
	f.ctx, f.stop = context.WithCancel(context.Background())
	f.wake = time.AfterFunc(time.Hour, f.pump)
	f.wake.Stop()
	c.Metrics.add(f)
	return f
}

// Attach makes s the source that is used. The first source with a storage resumes what this instance followed before. From
// now on, nobody waits for the log of s.
func (f *Follower) Attach(s *Source) {
	s.Logger = f.log.Logger(s.Logger)
	s.ctx, s.stop = context.WithCancel(f.ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	f.sources = append(f.sources, s)
	f.chooseStorage()
	for _, it := range f.items {
		if !it.asking {
			f.put(s, it, it.due)
		}
	}
	f.startTelling()
	f.dispatch()
}

// Pause ends the questions to s. What it is asked at the moment is asked again later, of another source. What has ended, or
// is added, is still noted.
func (f *Follower) Pause(s *Source) {
	defer f.log.Flush() // when s is paused, its log may be closed
	f.mu.Lock()
	defer f.mu.Unlock()
	s.paused = true
	if s.stop != nil {
		s.stop()
	}
	f.chooseStorage()
}

// Detach ends the use of s. What it is asked at the moment is asked again later, of another source.
func (f *Follower) Detach(s *Source) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sources = slices.DeleteFunc(f.sources, func(other *Source) bool { return other == s })
	if s.stop != nil {
		s.stop()
	}
	f.chooseStorage()
}

// chooseStorage begins to keep notes where the source wants them that is used now. Those in another storage are left there:
// other instances may use it, and this one may come back to it. The caller holds the mutex.
func (f *Follower) chooseStorage() {
	s := f.source()
	if s == nil || s.Notes == f.notes || f.closed {
		return
	}
	if f.notebook != nil {
		f.endNotes()
		f.notebook.close()
		f.notebook = nil
		for _, it := range f.items {
			it.notes = nil
		}
	}
	if f.notes = s.Notes; f.notes != nil {
		f.openNotebook(s.Logger)
	}
}

// openNotebook begins to keep notes. The caller holds the mutex.
func (f *Follower) openNotebook(logger *zap.Logger) {
	if f.lease == nil {
		f.lease = newLease(f.Config, f.jitter, logger)
	} else {
		f.lease = f.lease.unrenewed()
	}
	a := &adopter{Follower: f, notes: f.notes, lease: f.lease, peers: make(map[string]*peer), told: make(map[string]bool)}
	a.ctx, f.endNotes = context.WithCancel(f.ctx)
	a.notebook = newNotebook(a.ctx, &f.work, a.storage, f.lease)
	f.notebook = a.notebook
	for _, it := range f.items { // from the time without this storage
		f.notebook.add(f.newNotes([]*item{it})...)
	}
	f.work.Go(a.renewLease)
	f.work.Go(a.resumeAll)
	f.work.Go(a.lookAll)
}

// Close ends the follower, and waits until all it does has ended, but not for long until what it has logged is written. What is
// pending stays noted. It ends the use of all sources.
func (f *Follower) Close() {
	f.mu.Lock()
	notebook, lease, closed := f.notebook, f.lease, f.closed
	f.closed = true
	f.wake.Stop()
	for _, s := range f.sources {
		s.stop()
	}
	f.mu.Unlock()
	if closed {
		return
	}
	if notebook != nil {
		f.Flush()
		notebook.close()
	}
	f.stop()
	f.work.Wait()
	f.Metrics.remove(f)
	if lease != nil {
		lease.release()
	}
	f.log.Flush()
}
