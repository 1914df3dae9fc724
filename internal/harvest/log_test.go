package harvest

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// loggingProcess is a process whose log hangs for a line. It has no storage yet.
type loggingProcess struct {
	*process
	upstream *upstream
	hanging  testenv.HangingLog
}

// newLoggingProcess starts a process. It must be stopped.
func newLoggingProcess(line, lockDir string) *loggingProcess {
	p := &loggingProcess{upstream: newUpstream()}
	p.process = p.upstream.start(nil, Config{Instance: "a", LockDir: lockDir}, func(s *Source) {
		p.hanging = testenv.NewHangingLog(s.Logger.Core(), line)
		s.Logger = zap.New(p.hanging)
		s.For = time.Hour
	})
	return p
}

// note lets the process note what is pending in a storage.
func (p *loggingProcess) note() {
	logger := zap.New(p.hanging)
	p.use(storagetest.New(storagetest.FileSystem), logger)
	p.Attach(p.upstream.source(p.archive, logger))
	time.Sleep(time.Second)
}

// follow lets the process follow a submission whose report is finished after a while.
func (p *loggingProcess) follow(finished time.Duration) ID {
	target := p.upstream.submit(1, finished)
	p.Follow(target)
	return target.ID
}

// useAll calls what must never wait for the log.
func (p *loggingProcess) useAll() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // it does not wait for the note
	one, two := p.upstream.submit(-1, time.Second), p.upstream.submit(-2, time.Second)
	_ = p.Add(ctx, []Target{one})
	p.Follow(two)
	p.List()
	p.Nudge(one.ID)
	p.Accepted(two.SubmitID)
	p.Saved(nil, task.Key{})
	p.GiveUp(two.ID)
	p.count()
	p.oldest()
}

// While the log hangs, the follower can be used, and goes on with what it does itself.
func TestLogThatHangs(t *testing.T) {
	noFolder := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(noFolder, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refuseNotes := func(p *loggingProcess) {
		p.note()
		p.faulty.Set(failing(func(name string) bool { return !isLease(name) }))
		p.follow(time.Hour)
	}
	for name, test := range map[string]struct {
		line, lockDir string
		do            func(p *loggingProcess) // leads to the line
	}{
		"too many": {line: "too much is pending", do: func(p *loggingProcess) {
			targets := make([]Target, maxPending+1)
			for i := range targets {
				targets[i] = p.upstream.submit(i, time.Hour)
			}
			p.Follow(targets...)
		}},
		"a failure": {line: "has failed", do: func(p *loggingProcess) {
			p.upstream.task(p.follow(time.Hour), func(k *fakeTask) { k.failed = true })
		}},
		"a late report": {line: "is given up", do: func(p *loggingProcess) { p.follow(2 * time.Hour) }},
		"an operator":   {line: "is given up", do: func(p *loggingProcess) { p.GiveUp(p.follow(time.Hour)) }},
		"no slot":       {line: "cannot be told from others", lockDir: noFolder, do: (*loggingProcess).note},
		"no notes":      {line: "cannot be noted", do: refuseNotes},
		"notes again": {line: "can be noted in the storage again", do: func(p *loggingProcess) {
			refuseNotes(p)
			time.Sleep(time.Minute)
			p.faulty.Mend()
		}},
		"a note of others": {line: "cannot be read", do: func(p *loggingProcess) {
			p.note()
			_ = p.archive.StoreNote(context.Background(), "a-0", "strange", []byte(`{"a": 1}`))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			hung := testenv.Context(t).Done() // made here, since the bubble has no real time
			synctest.Test(t, func(t *testing.T) {
				p := newLoggingProcess(test.line, test.lockDir)
				defer p.stop()
				var doing sync.WaitGroup
				doing.Go(func() { test.do(p) })
				defer doing.Wait()
				<-p.hanging.Hangs()
				went := make(chan struct{})
				go func() {
					defer close(went)
					p.useAll()
				}()
				select {
				case <-went:
				case <-hung:
					t.Error("others wait for the log")
					p.hanging.Release()
					return
				}
				doing.Wait()
				time.Sleep(5 * lookEvery) // what it does itself goes on
				p.stop()
				p.hanging.Release()
				if p.logged(test.line) == 0 {
					t.Error("the line is not written in the end")
				}
			})
		})
	}
}

// When a source has been paused or the follower closed, what was logged is written.
func TestLogIsWrittenInTheEnd(t *testing.T) {
	for name, end := range map[string]func(p *loggingProcess){
		"paused": func(p *loggingProcess) { p.Pause(p.source()) },
		"closed": func(p *loggingProcess) { p.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newLoggingProcess("is given up", "")
				defer p.stop()
				p.GiveUp(p.follow(time.Hour))
				<-p.hanging.Hangs()
				time.AfterFunc(100*time.Millisecond, p.hanging.Release)
				if end(p); p.log.FilterMessageSnippet("is given up").Len() != 1 {
					t.Error("the line is not written")
				}
			})
		})
	}
}
