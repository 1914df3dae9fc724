package archive

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap/zapcore"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// A storage that panics is one that fails: for writes, reads, lists, notes, locks, purges and the sweep.
func TestPanics(t *testing.T) {
	for _, kind := range []storagetest.Kind{storagetest.Redis, storagetest.S3} { // with TryLock, and without
		t.Run(kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixtureOver(storagetest.New(kind), 0, 1)
				defer f.Close()
				var panics atomic.Bool
				f.storage.Observe(func(e storagetest.Event) {
					if e.Phase == storagetest.Began && panics.Load() {
						panic("https://storage.example.com/" + e.Call.Name + "?sig=the-secret")
					}
				})
				f.Save(item(1, 100))
				time.Sleep(time.Minute)
				panics.Store(true)
				f.Save(item(2, 100))
				errs := map[string]error{}
				_, errs["a read"] = f.find(t, numbered(1))
				_, errs["a list"] = f.Newest(t.Context(), [32]byte{1}, task.Summary, time.Time{}, func(int64) error { return nil })
				_, errs["a purge"] = f.Purge(t.Context(), Selection{}, 0)
				errs["a note"] = f.StoreNote(t.Context(), "folder", "note", nil)
				_, _, errs["a lock"] = f.LockNotes(t.Context(), "folder")
				for what, err := range errs {
					if !errors.Is(err, guard.ErrPanic) {
						t.Errorf("%s: %v", what, err)
					}
				}
				f.Save(item(2, 100))       // the purge has removed it
				time.Sleep(48 * time.Hour) // the sweep goes on as well
				if n := len(f.storage.stored()); n != 1 || f.Stats().Queued != 1 {
					t.Errorf("%d are stored, the stats are %+v", n, f.Stats())
				}
				for _, line := range f.log.All() {
					if text := fmt.Sprint(line.Message, line.ContextMap()); strings.Contains(text, "the-secret") {
						t.Fatalf("the log has the value of the panic: %s", text)
					}
				}
				if line := f.lines("panicked").All()[0]; line.Level != zapcore.ErrorLevel {
					t.Errorf("the log has %v", line)
				}
				panics.Store(false)
				time.Sleep(time.Hour)
				if _, err := f.find(t, numbered(2)); err != nil || f.Stats().Queued != 0 {
					t.Errorf("after the panics: %v, the stats are %+v", err, f.Stats())
				}
			})
		})
	}
}

// A value whose write panics is retried, and holds up no other.
func TestPanicOfOneValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		bad := tested.name(place{kind: inPartition, key: numbered(3)})
		f.storage.Observe(func(e storagetest.Event) {
			if e.Phase == storagetest.Began && e.Call.Name == bad {
				panic("a value")
			}
		})
		for i := range 20 {
			f.Save(item(i, 100))
			time.Sleep(time.Second)
		}
		if n := len(f.storage.stored()); n != 19 || f.Stats().Queued != 1 || f.Stats().Failing {
			t.Errorf("%d are stored, the stats are %+v", n, f.Stats())
		}
		f.storage.Observe(func(storagetest.Event) {})
		time.Sleep(time.Minute)
		if n := len(f.storage.stored()); n != 20 || f.Stats().Queued != 0 {
			t.Errorf("after the panics, %d are stored, the stats are %+v", n, f.Stats())
		}
	})
}
