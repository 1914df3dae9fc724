package harvest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// upstream is a broker with the tasks of a test. Several followers may ask it.
type upstream struct {
	mu      sync.Mutex
	tasks   map[ID]*fakeTask
	latency time.Duration
	away    error // what it answers, if it is away
	asked   int
	flying  int
	most    int         // questions under way at once
	times   []time.Time // of all questions
	saved   func() bool // whether reports are in the storage

	volatile bool // who asks must keep the report
}

// fakeTask is a task of an upstream.
type fakeTask struct {
	known, finished, gone time.Time // when it is; zero means always, never, never
	failed                bool
	kept                  [2]bool
	asked                 [2]int
	last                  time.Time     // when it was asked for
	widest                time.Duration // between two questions
	told                  int
}

var errAway = errors.New("the broker is away")

func newUpstream() *upstream {
	return &upstream{tasks: make(map[ID]*fakeTask), saved: func() bool { return true }}
}

func (*upstream) id(id int) ID { return ID{SubmitID: fmt.Sprintf("submission-%d", id)} }

// submit accepts a file whose report is finished after a while.
func (u *upstream) submit(id int, finished time.Duration) Target {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	t := Target{ID: u.id(id), Client: "client", Accepted: now}
	u.tasks[t.ID] = &fakeTask{finished: now.Add(finished), last: now}
	return t
}

// task returns a task, to be changed.
func (u *upstream) task(id ID, change func(*fakeTask)) fakeTask {
	u.mu.Lock()
	defer u.mu.Unlock()
	change(u.tasks[id])
	return *u.tasks[id]
}

func (u *upstream) fetch(ctx context.Context, t Target, kind task.Kind) (Outcome, error) {
	u.mu.Lock()
	now := time.Now()
	k := u.tasks[t.ID]
	if k.kept[kind] { // memory has it
		defer u.mu.Unlock()
		return Outcome{State: Finished, Report: testReport, Saved: u.saved()}, nil
	}
	k.widest = max(k.widest, now.Sub(k.last))
	k.last = now
	k.asked[kind]++
	u.asked++
	u.times = append(u.times, now)
	u.flying++
	u.most = max(u.most, u.flying)
	latency := u.latency
	u.mu.Unlock()
	sleep(ctx, latency)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.flying--
	if ctx.Err() != nil {
		return Outcome{}, ctx.Err()
	}
	if u.away != nil {
		return Outcome{}, u.away
	}
	now = time.Now()
	switch {
	case k.failed:
		return Outcome{State: Failed}, nil
	case now.Before(k.known) || !k.gone.IsZero() && !now.Before(k.gone):
		return Outcome{State: Unknown}, nil
	case k.finished.IsZero() || now.Before(k.finished):
		return Outcome{State: Unfinished}, nil
	}
	k.kept[kind] = !u.volatile
	return Outcome{State: Finished, Report: testReport, Saved: u.saved()}, nil
}

// questions returns how many questions were asked.
func (u *upstream) questions() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.asked
}

// idle reports whether no question is under way.
func (u *upstream) idle() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.flying == 0
}

var testReport = task.NewReport(task.Document{Hash: "0123456789abcdef0123456789abcdef"})

// source returns a source that asks the upstream.
func (u *upstream) source(notes *archive.Archive, logger *zap.Logger) *Source {
	return &Source{
		Fetch: u.fetch, Upstream: func(Target) string { return "broker" },
		Finished: func(t Target) { u.task(t.ID, func(k *fakeTask) { k.told++ }) },
		Summary:  true, Complete: true, PollInterval: 2 * time.Second, For: 24 * time.Hour,
		Notes: notes, Logger: logger,
	}
}

// process is a process that follows.
type process struct {
	*Follower
	faulty  *storagetest.Faulty
	archive *archive.Archive
	log     *observer.ObservedLogs
}

// start starts a process without a storage, or with one. It must be stopped.
func (u *upstream) start(m *storagetest.Memory, c Config, change func(*Source)) *process {
	core, log := observer.New(zapcore.DebugLevel)
	p := &process{log: log}
	logger := zap.New(core)
	if m != nil {
		p.use(m, logger)
	}
	c.Namespace = "tested"
	p.Follower = New(c)
	s := u.source(p.archive, logger)
	if change != nil {
		change(s)
	}
	p.Attach(s)
	return p
}

// use lets the process use a storage.
func (p *process) use(m *storagetest.Memory, logger *zap.Logger) {
	p.faulty = storagetest.NewFaulty(m)
	p.archive = archive.New(archive.Config{Namespace: "tested"})
	p.archive.Attach(&archive.Backend{Storage: p.faulty.Storage(), Logger: logger, Retention: time.Hour})
}

// stop stops the process in good order.
func (p *process) stop() {
	p.Close()
	if p.archive != nil {
		p.archive.Close()
	}
}

// kill ends the process as kill -9 does.
func (p *process) kill(effect storagetest.Effect) {
	p.faulty.Crash(func(storagetest.Call) storagetest.Effect { return effect })
	p.stop()
}

// logged returns how many lines have a text in their messages, when all are written.
func (p *process) logged(text string) int {
	synctest.Wait()
	return p.log.FilterMessageSnippet(text).Len()
}

// zapWhy returns the field that says why a target has ended.
func zapWhy(why string) zap.Field { return zap.String("why", why) }

func (p *process) pending() int { return len(p.List()) }

// counts returns how many targets have finished, failed and were given up.
func (p *process) counts() [3]int {
	m := p.Metrics
	return [3]int{
		int(testutil.ToFloat64(m.finished)), int(testutil.ToFloat64(m.failed)), int(testutil.ToFloat64(m.givenUp)),
	}
}

// isLease reports whether the name of a value is that of a lease.
func isLease(name string) bool { return strings.Contains(name, "/"+leases+"/") }

// failing returns a decision that lets calls for some names fail.
func failing(fails func(name string) bool) func(storagetest.Call) storagetest.Fault {
	return func(c storagetest.Call) storagetest.Fault {
		if fails(c.Name) {
			return storagetest.Failing(storagetest.ErrInjected)(c)
		}
		return storagetest.Fault{}
	}
}

// noted returns the names of the notes in the storage.
func noted(m *storagetest.Memory) (names []string) {
	for _, name := range m.Names("fsbroker_task/tested/notes/") {
		if !isLease(name) {
			names = append(names, name)
		}
	}
	return names
}

// mustAdd adds targets, and reports whether they are noted.
func (p *process) mustAdd(t *testing.T, targets ...Target) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	return p.Add(ctx, targets) == nil
}
