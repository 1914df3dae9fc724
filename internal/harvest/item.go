package harvest

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	// maxDelay is the longest delay between two questions for a target. The rest of 30 seconds is for its turn.
	maxDelay = 27 * time.Second

	// MaxAge is how old the answer to a question may be, at the most. It is less than the longest delay with its jitter, so an
	// upstream is asked about each target that often, although others keep its answers.
	MaxAge = 24 * time.Second

	// The delay before a finished report is asked for again to see whether it is in the storage.
	firstSaveDelay = 250 * time.Millisecond
	lastSaveDelay  = 5 * time.Second

	// maxUnknown is the number of times in a row that a target must be unknown, after it was known, until it is given up.
	maxUnknown = 3
)

// item is a target that is followed.
type item struct {
	Target
	place
	began   time.Time    // when it was accepted, by the monotonic clock
	kinds   [2]kindState // by task.Kind
	keys    [2]task.Key  // by task.Kind, of finished reports that were not saved at once
	told    bool         // Source.Finished was called, or is to be
	telling bool         // Source.Finished has not returned yet
	over    bool         // all that is missing is that it returns
	unknown int          // how often in a row no upstream has known it
	delay   time.Duration
	asking  bool
	urgent  bool // it is asked for again at once
	asked   int
	problem string  // the last one, until an upstream answers
	notes   []*note // in Follower.notebook; none without a storage, or when the following has ended
}

// kindState is what is known of one kind of report.
type kindState struct{ finished, saved bool }

// question is what is asked next.
type question struct {
	kind   task.Kind
	saving bool // whether the report is saved is all that is asked
	none   bool // there is nothing left to ask
}

// question returns what is to be asked for an item.
func (it *item) question(s *Source) question {
	wanted := [...]bool{task.Summary: s.Summary, task.Complete: s.Complete}
	for kind, state := range it.kinds {
		if wanted[kind] && !state.finished {
			return question{kind: task.Kind(kind)}
		}
	}
	for kind, state := range it.kinds {
		if wanted[kind] && !state.saved {
			return question{kind: task.Kind(kind), saving: true}
		}
	}
	return question{none: true}
}

// ending says how the following of a target ends. The zero value means that it goes on.
type ending struct {
	how ended
	why string
}

type ended uint8

const (
	endedNot ended = iota
	endedFinished
	endedFailed
	endedGivenUp
)

// judge notes the outcome of a question and returns whether the following ends.
func (it *item) judge(s *Source, q question, out Outcome, err error, now time.Time) ending {
	if err != nil {
		it.problem = err.Error()
	} else if e := it.note(s, q, out); e.how != endedNot {
		return e
	}
	if now.Sub(it.began) < s.For {
		return ending{}
	}
	why := fmt.Sprintf("it is not finished after %s", s.For)
	switch {
	case it.problem != "":
		why += ": " + it.problem
	case q.saving || it.question(s).saving:
		why = fmt.Sprintf("its report is not in the storage after %s", s.For)
	case !it.Known:
		why = fmt.Sprintf("no upstream has known it for %s", s.For)
	}
	return ending{endedGivenUp, why}
}

// note notes an outcome that is no problem.
func (it *item) note(s *Source, q question, out Outcome) ending {
	it.problem = ""
	before := it.kinds[q.kind]
	it.kinds[q.kind] = kindState{}
	if out.State != Unknown {
		it.unknown = 0
	}
	switch out.State {
	case Failed:
		return ending{endedFailed, "it has failed"}
	case Unknown:
		if it.unknown++; it.Known && it.unknown >= maxUnknown {
			return ending{endedGivenUp, "no upstream knows it any more"}
		}
	case Unfinished:
		it.Known = true
	case Finished:
		it.Known = true
		it.kinds[q.kind] = kindState{finished: true, saved: out.Saved}
		next := it.question(s)
		if next.none {
			return ending{how: endedFinished}
		}
		if !before.finished {
			it.delay, it.urgent = 0, !next.saving
		}
	}
	return ending{}
}

// dueAfter returns when an item is due that was asked for, given what is asked next.
func (it *item) dueAfter(s *Source, next question, retryAfter time.Duration, now time.Time, jitter *rand.Rand) time.Time {
	first, last := min(s.PollInterval, maxDelay), maxDelay
	switch {
	case it.urgent:
		it.urgent = false
		it.hurry(now)
		return now
	case next.saving:
		first, last = firstSaveDelay, lastSaveDelay
	}
	it.delay = min(max(2*it.delay, first), last)
	delay := it.delay - time.Duration(jitter.Int64N(int64(it.delay/10)+1))
	delay = max(delay, min(retryAfter, maxDelay))
	// The delay counts from one question to the next, but a slow upstream gets a pause.
	due, pause := it.since.Add(delay), now.Add(min(delay, first))
	if due.Before(pause) {
		return pause
	}
	return due
}

// headStart is by how much an item that is urgent comes earlier in the schedule. It comes before those that were asked for
// lately, but holds up none that was not asked for in a long time.
const headStart = 20 * time.Second

// hurry makes an item urgent.
func (it *item) hurry(now time.Time) {
	if since := now.Add(-headStart); since.Before(it.since) {
		it.since = since
	}
}

// firstDue returns when an item is due that was accepted just now.
func (it *item) firstDue(s *Source, jitter *rand.Rand) time.Time {
	if s == nil {
		return it.since
	}
	return it.dueAfter(s, question{}, 0, it.since, jitter)
}
