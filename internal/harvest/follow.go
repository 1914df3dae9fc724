package harvest

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	// maxPending bounds the targets that are followed. Each takes up to 1 KiB of memory. With so many, the time between two
	// questions for a target is over two minutes.
	maxPending = 100_000

	// refuseEvery is how often it is logged that there is no room for more.
	refuseEvery = time.Minute
)

// Add follows targets from now on. Where there is a storage, it returns when all of them are noted there, which is as one
// value unless that gets large, or when ctx ends. What could not be noted in time is followed anyway and noted later. Targets
// that are followed already are left as they are.
func (f *Follower) Add(ctx context.Context, targets []Target) error {
	for _, n := range f.add(targets) {
		select {
		case <-n.done:
		case <-ctx.Done():
			return fmt.Errorf("noting what was accepted: %w", context.Cause(ctx))
		}
	}
	return nil
}

// Follow is like Add, but does not wait until the targets are noted.
func (f *Follower) Follow(targets ...Target) { f.add(targets) }

// add follows targets and returns the notes that must be stored.
func (f *Follower) add(targets []Target) (unstored []*note) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	var fresh []*item
	s := f.source()
	for i, t := range targets {
		if it := f.items[t.ID]; it != nil {
			unstored = append(unstored, it.notes...)
			continue
		}
		if len(f.items) >= maxPending {
			f.refuseAll(s, targets[i:])
			break
		}
		it := f.begin(t)
		f.put(s, it, it.firstDue(s, f.jitter))
		fresh = append(fresh, it)
	}
	if len(fresh) == 0 { // as for each caller that polls
		return unstored
	}
	if f.notebook != nil {
		notes := f.newNotes(fresh)
		f.notebook.add(notes...)
		unstored = append(unstored, notes...)
	}
	f.dispatch()
	return unstored
}

// refuseAll says that there is no room for targets. The caller holds the mutex.
func (f *Follower) refuseAll(s *Source, targets []Target) {
	f.Metrics.refused.Add(float64(len(targets)))
	if now := time.Now(); s != nil && now.After(f.refuse) {
		f.refuse = now.Add(refuseEvery)
		s.Logger.Warn("too much is pending: what is new is not followed",
			zap.Int("pending", len(f.items)), zap.Stringer("id", targets[0].ID), zap.Int("refused", len(targets)))
	}
}

// begin begins to follow a target, which is not scheduled yet. The caller holds the mutex.
func (f *Follower) begin(t Target) *item {
	age := max(0, f.Now().Sub(t.Accepted))
	now := time.Now()
	it := &item{Target: t, began: now.Add(-age), told: t.Told}
	it.since = now
	f.items[t.ID] = it
	return it
}

// newNotes returns notes of items. The caller holds the mutex.
func (f *Follower) newNotes(items []*item) (notes []*note) {
	targets := make([]Target, len(items))
	for i, it := range items {
		targets[i] = it.Target
	}
	for _, page := range encodeTargets(targets) {
		notes = append(notes, newNote(f.jitter.Uint64(), f.jitter.Uint64(), page))
	}
	notes[0].pages = notes
	// An item belongs to all of them: which has it does not matter.
	for _, it := range items {
		for _, n := range notes {
			n.open++
			it.notes = append(it.notes, n)
		}
	}
	return notes
}

// put schedules an item. The caller holds the mutex.
func (f *Follower) put(s *Source, it *item, due time.Time) {
	f.schedule.put(it, f.upstream(s, it), due)
}

// savingLane is the lane of those items whose reports are finished: asking for them costs an upstream nothing.
const savingLane = "\x00saving"

// upstream returns the lane of an item.
func (f *Follower) upstream(s *Source, it *item) string {
	switch {
	case s == nil:
		return ""
	case it.question(s).saving:
		return savingLane
	}
	return s.Upstream(it.Target)
}

// pump asks what is due.
func (f *Follower) pump() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dispatch()
}

// dispatch starts the questions that are due and sets a timer for the next. The caller holds the mutex.
func (f *Follower) dispatch() {
	s := f.source()
	if s == nil || s.paused || f.closed {
		return
	}
	for {
		now := time.Now()
		it, wait := f.schedule.next(now)
		if it == nil {
			if wait >= 0 {
				f.wake.Reset(wait)
			}
			return
		}
		it.asking, it.since = true, now
		it.asked++
		f.work.Go(func() { f.ask(s, it, it.lane) })
	}
}

// ask asks for an item.
func (f *Follower) ask(s *Source, it *item, l *lane) {
	f.mu.Lock()
	q, target := it.question(s), it.Target
	f.mu.Unlock()
	var out Outcome
	var err error
	if !q.none { // another source may want less
		out, err = guard.Call(s.Logger, func() (Outcome, error) { return s.Fetch(s.ctx, target, q.kind) })
	}
	f.settle(s, it, l, q, out, err)
}

// settle goes on after a question.
func (f *Follower) settle(s *Source, it *item, l *lane, q question, out Outcome, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	it.asking = false
	f.schedule.done(l)
	now := time.Now()
	switch {
	case f.items[it.ID] != it: // it was given up meanwhile
	case q.none:
		f.end(s, it, ending{how: endedFinished})
	case s.ctx.Err() != nil:
		f.put(f.source(), it, now)
	default:
		if err == nil && out.State == Finished {
			f.noteFinished(it, q, out)
		}
		if e := it.judge(s, q, out, err, now); e.how != endedNot {
			f.end(s, it, e)
			break
		}
		f.put(s, it, it.dueAfter(s, it.question(s), out.RetryAfter, now, f.jitter))
	}
	f.dispatch()
}

// noteFinished notes that a report of an item is finished. The caller holds the mutex.
func (f *Follower) noteFinished(it *item, q question, out Outcome) {
	if !out.Saved {
		it.keys[q.kind] = out.Key
		f.saving[out.Key] = saving{it, q.kind}
	}
	if it.told || out.Report == nil {
		return
	}
	if file := out.Report.File(); it.SHA256 == "" && file != [len(file)]byte{} {
		it.SHA256 = hex.EncodeToString(file[:])
	}
	it.told, it.telling = true, true
	f.untold = append(f.untold, it)
	f.startTelling()
}

// end ends the following of an item. What has finished must have been told before. The caller holds the mutex.
func (f *Follower) end(s *Source, it *item, e ending) {
	if it.over = e.how == endedFinished; it.over && it.telling {
		return
	}
	delete(f.items, it.ID)
	for _, k := range it.keys {
		delete(f.saving, k)
	}
	f.schedule.remove(it)
	for _, n := range it.notes {
		f.notebook.release(n)
	}
	it.notes = nil
	fields := []zap.Field{
		zap.Stringer("id", it.ID), zap.String("client", it.Client), zap.String("sha256", it.SHA256),
		zap.Duration("age", it.age()), zap.Int("questions", it.asked), zap.String("why", e.why),
	}
	switch e.how {
	case endedNot:
	case endedFinished:
		f.Metrics.finished.Inc()
	case endedFailed:
		f.Metrics.failed.Inc()
		s.Logger.Warn("a submission has failed and is not followed any longer", fields...)
	case endedGivenUp:
		f.Metrics.givenUp.Inc()
		s.Logger.Warn("a submission is given up", fields...)
	}
}

// age returns how long ago an item was accepted.
func (it *item) age() time.Duration { return time.Since(it.began).Round(time.Millisecond) }

// Nudge asks for a target at once if it is followed: its report may be finished.
func (f *Follower) Nudge(id ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	it := f.items[id]
	switch {
	case it == nil:
	case it.asking:
		it.urgent = true
	default:
		now := time.Now()
		it.hurry(now)
		f.put(f.source(), it, now)
		f.dispatch()
	}
}

// Saved notes that finished reports are in a storage, given their keys. It does not wait for a source to be asked, so that a
// process that ends in good order leaves nothing to be told again.
func (f *Follower) Saved(in *archive.Archive, keys ...task.Key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.source()
	if s == nil || s.Notes != in { // it was the storage of another configuration
		return
	}
	for _, k := range keys {
		report, ok := f.saving[k]
		if !ok {
			continue
		}
		delete(f.saving, k)
		report.kinds[report.kind].saved = true
		if report.question(s).none && !report.asking {
			f.end(s, report.item, ending{how: endedFinished})
		}
	}
}

// GiveUp ends the following of a target, and reports whether it was followed.
func (f *Follower) GiveUp(id ID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	it, s := f.items[id], f.source()
	if it == nil || s == nil {
		return false
	}
	f.end(s, it, ending{endedGivenUp, "an operator has given it up"})
	if f.notebook != nil && !f.closed {
		f.work.Go(f.Flush)
	}
	return true
}

// Accepted reports whether a submission is followed here and no upstream has known it yet. A caller that asks for it should
// ask again later.
func (f *Follower) Accepted(submitID string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	it := f.items[ID{SubmitID: submitID}]
	return it != nil && !it.Known
}

// Pending is a target that is followed.
type Pending struct {
	Target
	Age       time.Duration
	Questions int    // that were asked
	Problem   string // the last one, until an upstream answers
	Noted     bool   // whether it outlives the process
	Finished  bool   // whether it is finished: only the storage or an event handler is waited for
}

// List returns what is pending, the oldest first.
func (f *Follower) List() []Pending {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.source()
	list := make([]Pending, 0, len(f.items))
	for _, it := range f.items {
		p := Pending{Target: it.Target, Age: it.age(), Questions: it.asked, Problem: it.problem, Noted: len(it.notes) > 0}
		for _, n := range it.notes {
			p.Noted = p.Noted && n.isStored()
		}
		p.Finished = s != nil && (it.over || it.question(s).saving)
		list = append(list, p)
	}
	slices.SortFunc(list, func(p, q Pending) int {
		return cmp.Or(cmp.Compare(q.Age, p.Age), cmp.Compare(p.ID.String(), q.ID.String()))
	})
	return list
}

// count returns the number of pending targets.
func (f *Follower) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.items)
}

// oldest returns the age of the oldest pending target, or 0 if there is none.
func (f *Follower) oldest() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	first := now
	for _, it := range f.items {
		if it.began.Before(first) {
			first = it.began
		}
	}
	return now.Sub(first)
}
