package archive

import (
	"sync"
	"time"

	"go.uber.org/zap"
)

// Task is something that is done with the storage in the background again and again. Nobody waits for it, so nobody would see
// that it fails.
type Task string

// The tasks.
const (
	TaskSweep  Task = "sweep"  // deletes what is old
	TaskResume Task = "resume" // reads what is pending
	TaskLook   Task = "look"   // looks at the leases of other instances
	TaskLease  Task = "lease"  // renews the lease of this instance
)

// consequences says what it means that a task fails.
var consequences = map[Task]string{
	TaskSweep:  "what is older than its retention is not deleted",
	TaskResume: "what was pending before a restart is not followed",
	TaskLook:   "what an instance followed that has ended is not taken over",
	TaskLease:  "what is pending is not noted, and other instances may take it over",
}

const (
	// tellTaskAfter is the number of failures in a row after which the log tells of them.
	tellTaskAfter = 3

	tellTaskEvery = 10 * time.Minute
)

// failures are the failures of the tasks.
type failures struct {
	mu sync.Mutex
	of map[Task]*failure
}

// failure is how a task fails.
type failure struct {
	times int // in a row
	told  bool
	next  time.Time // when it may be told again
}

// note notes how a try of a task has ended. It logs if the task fails again and again, and when it works again.
func (fs *failures) note(logger *zap.Logger, t Task, err error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.of[t]
	if f == nil {
		if f = new(failure); fs.of == nil {
			fs.of = make(map[Task]*failure)
		}
		fs.of[t] = f
	}
	task := zap.String("task", string(t))
	if err == nil {
		if f.told {
			logger.Info("a background task works again", task, zap.Int("failures", f.times))
		}
		f.times, f.told = 0, false
		return
	}
	f.times++
	if now := time.Now(); f.times >= tellTaskAfter && !now.Before(f.next) {
		f.told, f.next = true, now.Add(tellTaskEvery)
		logger.Warn("a background task fails: "+consequences[t], task, zap.Int("failures", f.times), errorField(err))
	}
}
