package archive

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// newFixtureWithLog returns an archive whose log hangs for a line. It must be closed.
func newFixtureWithLog(line string) (f *fixture, log testenv.HangingLog) {
	f = newFixtureWith(func(f *fixture, _ *Config) {
		log = testenv.NewHangingLog(f.backend.Logger.Core(), line)
		f.backend.Logger = zap.New(log)
	})
	return f, log
}

// While the log hangs, the archive can be used, and goes on with what it does itself.
func TestLogThatHangs(t *testing.T) {
	fill := func(f *fixture) {
		f.storage.fail(errAway)
		i := 0
		for f.Save(item(i, 2<<20)) {
			i++
		}
	}
	refuse := func(f *fixture, minutes int) {
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			fault := refuseLarge(c)
			fault.Before = 0 // no time passes while others are waited for
			return fault
		})
		f.Save(item(0, 20_000))
		for i := range minutes {
			f.Save(item(1+i, 100))
			time.Sleep(time.Minute)
		}
	}
	for name, test := range map[string]struct {
		line string
		do   func(f *fixture) // leads to the line
	}{
		"a full queue": {"the queue to the storage is full", fill},
		"room again": {"the queue to the storage has room again", func(f *fixture) {
			fill(f)
			f.storage.Mend()
		}},
		"a refused value":  {"it is retried", func(f *fixture) { refuse(f, 5) }},
		"a value given up": {"it is given up", func(f *fixture) { refuse(f, 100) }},
		"a lost report":    {"are lost", func(f *fixture) { f.Lose("s1", report(10)) }},
		"the index": {"writing the index", func(f *fixture) {
			f.storage.Set(func(c storagetest.Call) storagetest.Fault {
				if strings.HasPrefix(c.Name, tested.indexFolder()) {
					return storagetest.Failing(errAway)(c)
				}
				return storagetest.Fault{}
			})
			f.Save(item(0, 100))
		}},
		"an outage": {"the storage fails", func(f *fixture) {
			f.storage.fail(errAway)
			for i := range tripAfter {
				f.Save(item(i, 100))
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			hung := testenv.Context(t).Done() // made here, since the bubble has no real time
			synctest.Test(t, func(t *testing.T) {
				f, log := newFixtureWithLog(test.line)
				defer f.Close()
				var doing sync.WaitGroup
				doing.Go(func() { test.do(f) })
				defer doing.Wait()
				<-log.Hangs()
				went := make(chan struct{})
				go func() {
					defer close(went)
					useAll(t, f)
				}()
				select {
				case <-went:
				case <-hung:
					t.Error("others wait for the log")
					log.Release()
					return
				}
				doing.Wait()
				f.storage.Mend()
				time.Sleep(time.Minute)
				if queued := f.Stats().Queued; queued != 0 {
					t.Errorf("%d reports are not stored", queued)
				}
				f.Archive.Close()
				log.Release()
				if f.logged(test.line) == 0 {
					t.Error("the line is not written in the end")
				}
			})
		})
	}
}

// useAll calls what must never wait for the log.
func useAll(t *testing.T, f *fixture) {
	grow := func(int64) error { return nil }
	_, _ = f.Load(t.Context(), numbered(-1), grow)
	_, _ = f.Newest(t.Context(), [32]byte{1}, task.Summary, time.Time{}, grow)
	f.Save(item(-1, 100))
	f.Lose(fmt.Sprint(numbered(-1)), report(10))
	f.Stats()
	f.IsQueued(numbered(-1))
	f.Queued()
	f.Logger()
}

// When an archive has been drained or closed, what it has logged is written.
func TestLogIsWrittenInTheEnd(t *testing.T) {
	for name, end := range map[string]func(f *fixture){
		"drained": func(f *fixture) { _ = f.Drain(f.backend) },
		"closed":  func(f *fixture) { f.Archive.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, log := newFixtureWithLog("are lost")
				defer f.Close()
				f.Lose("s1", report(10))
				<-log.Hangs()
				time.AfterFunc(100*time.Millisecond, log.Release)
				if end(f); f.log.FilterMessageSnippet("are lost").Len() != 1 {
					t.Error("the line is not written")
				}
			})
		})
	}
}
