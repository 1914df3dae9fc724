// Package harvest follows submissions and tasks until their reports are finished, so that the reports are kept although
// nobody asks for them in time.
//
// A Follower asks for the reports of its targets again and again, at a bounded rate and fairly. Where there is a storage, it
// notes its targets there, and so outlives a crash: it resumes its own targets when it starts again, and takes over those of
// an instance that has ended. The package does not know Caddy's HTTP handlers: a Source says how a report is asked for.
package harvest

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Config configures a Follower.
type Config struct {
	// Namespace is the namespace whose submissions are followed.
	Namespace string

	// Instance is the name of the instance among all that use the storage. It stays the same when the process is started
	// again. It has letters, digits, dashes, underscores and dots.
	Instance string

	// LockDir is a directory for the files that tell processes with the same Instance apart. Default: there are none
	LockDir string

	// Metrics counts what the follower does. Default: metrics of its own
	Metrics *Metrics

	// Seed is the seed of all jitter, and of the names of notes, which must be unique. Default: random
	Seed uint64

	// Now is the wall clock, which tells the age of a target after a restart. Delays and deadlines are monotonic. Default:
	// time.Now
	Now func() time.Time
}

// Source is what a configuration lets a Follower use. It must not change after it has been attached.
type Source struct {
	// Fetch asks for the report of a target, the complete one or the high-level one. It is called by several goroutines, must
	// limit its own time, and return when ctx ends. It must not take the target for known because it is pending. An error is a
	// problem that may pass; it is shown to operators.
	Fetch func(ctx context.Context, t Target, all bool) (Outcome, error)

	// Upstream returns the name of the upstream that Fetch asks first. The bounds are those of one upstream.
	Upstream func(Target) string

	// Finished is called when the first finished report of a target is kept. It may take its time: it delays no question, but
	// few are called at once. A target stays pending until it has returned, so a crash can make it called again. The target
	// has the sum of its file if the report has it. Default: none
	Finished func(Target)

	// Summary and Complete are the kinds of reports that are wanted. The first is asked for until it is finished, then the
	// other.
	Summary, Complete bool

	// PollInterval is the first delay between two questions for a target.
	PollInterval time.Duration

	// For is how long a target is followed.
	For time.Duration

	// Notes keeps what must outlive the process. It is nil if there is no storage.
	Notes *archive.Archive

	Logger *zap.Logger

	ctx     context.Context // ends when the source is paused or detached
	stop    context.CancelFunc
	paused  bool // guarded by Follower.mu
	tellers int  // goroutines that call Finished; guarded by Follower.mu
}

// Outcome is the outcome of a question.
type Outcome struct {
	State State

	// Report is the report if it is finished.
	Report *task.Report

	// Saved reports whether a finished report is in the storage, or there is no storage. Until then the target stays pending.
	Saved bool

	// Key is the key of a finished report that is not saved yet. See Follower.Saved.
	Key task.Key

	// RetryAfter is how long the upstream wants to be left alone, if it has said so.
	RetryAfter time.Duration
}

// State is what is known of a report.
type State uint8

// The states.
const (
	Unfinished State = iota // an upstream knows the target
	Finished                // the report is finished, and kept
	Unknown                 // no upstream knows the target
	Failed                  // there will be no report
)

// Follower follows the targets of a namespace. It outlives a configuration: it uses the source that was attached last, and
// asks nothing without one.
type Follower struct {
	Config
	ctx  context.Context
	stop context.CancelFunc
	work sync.WaitGroup

	mu       sync.Mutex         // guards the fields below
	notes    *archive.Archive   // that the notebook uses
	notebook *notebook          // nil without a storage
	endNotes context.CancelFunc // ends what uses the notebook
	lease    *lease             // nil until a source with a storage is attached
	jitter   *rand.Rand
	sources  []*Source
	items    map[ID]*item
	saving   map[task.Key]saving // the finished reports that are not saved yet
	schedule *schedule
	wake     *time.Timer
	refuse   time.Time // when it may be logged again that there is no room for more
	untold   []*item   // to be told by Source.Finished
	closed   bool
}

// saving is a finished report that is not saved yet.
type saving struct {
	*item
	kind int
}

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

// Attach makes s the source that is used. The first source with a storage resumes what this instance followed before.
func (f *Follower) Attach(s *Source) {
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

// source returns the newest source, preferably one that is not paused. It returns nil if there is none. The caller holds the
// mutex.
func (f *Follower) source() *Source {
	var newest *Source
	for _, s := range f.sources {
		if newest == nil || newest.paused || !s.paused {
			newest = s
		}
	}
	return newest
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

// flushTimeout bounds the time in which Flush notes what was added and what has ended.
const flushTimeout = 5 * time.Second

// Flush waits until it is noted in the storage what was added and what has ended, unless the storage fails.
func (f *Follower) Flush() {
	f.mu.Lock()
	notebook := f.notebook
	f.mu.Unlock()
	if notebook == nil {
		return
	}
	f.tidy(notebook)
	notebook.flush(flushTimeout)
	f.tidy(notebook)
	notebook.flush(flushTimeout)
}

// tidy replaces the notes of which some targets have ended, so that these are not followed again after a restart. It takes two
// calls: an old note is deleted when the new one is stored.
func (f *Follower) tidy(nb *notebook) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.notebook != nb {
		return
	}
	nb.replacements = slices.DeleteFunc(nb.replacements, func(r replacement) bool {
		if slices.ContainsFunc(r.by, func(n *note) bool { return !n.isStored() }) {
			return false
		}
		for _, it := range r.items {
			if f.items[it.ID] == it {
				it.notes = slices.DeleteFunc(it.notes, func(n *note) bool { return slices.Contains(r.old, n) })
				for _, n := range r.old {
					nb.release(n)
				}
			}
		}
		return true
	})
	partials := nb.partials()
	if len(partials) == 0 {
		return
	}
	for _, it := range f.items {
		for _, n := range it.notes {
			if items, ok := partials[n]; ok && !n.leaving {
				partials[n] = append(items, it)
			}
		}
	}
	for n, items := range partials {
		if len(items) > 0 {
			n.leaving = true
			by := f.newNotes(items)
			nb.add(by...)
			nb.replacements = append(nb.replacements, replacement{n.pages, by, items})
		}
	}
}

// Close ends the follower, and waits until all it does has ended. What is pending stays noted. It ends the use of all sources.
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
}
