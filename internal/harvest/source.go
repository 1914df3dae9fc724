package harvest

import (
	"context"
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
	// limit its own time, and return when ctx ends. An answer that it keeps must not be older than MaxAge. It must not take the
	// target for known because it is pending. An error is a problem that may pass; it is shown to operators.
	Fetch func(ctx context.Context, t Target, kind task.Kind) (Outcome, error)

	// Upstream returns the name of the upstream that Fetch asks first. The bounds are those of one upstream. It is called with
	// the mutex of the follower, so it must not wait.
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
