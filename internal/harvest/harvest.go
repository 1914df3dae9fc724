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
	"sync"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/logqueue"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Follower follows the targets of a namespace. It outlives a configuration: it uses the source that was attached last, and
// asks nothing without one.
type Follower struct {
	Config
	ctx  context.Context
	stop context.CancelFunc
	work sync.WaitGroup
	log  logqueue.Queue // lines are logged while locks are held

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
	kind task.Kind
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
