package archive

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

var errHeld = errors.New("the lock is held")

// locking is a storage whose locks do what a test wants.
type locking struct {
	certmagic.Storage
	take func(ctx context.Context) error

	mu      sync.Mutex
	calls   int // of Lock
	pending int // of them, under way
	unlocks int
	held    map[string]context.Context // with which a lock was taken
}

func (l *locking) Lock(ctx context.Context, name string) error {
	l.mu.Lock()
	l.calls++
	l.pending++
	l.mu.Unlock()
	err := l.take(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending--
	if err == nil {
		l.held[name] = ctx
	}
	return err
}

func (l *locking) Unlock(_ context.Context, name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unlocks++
	held := l.held[name]
	delete(l.held, name)
	if held == nil || held.Err() != nil {
		return errors.New("the lock has been released")
	}
	return nil
}

func newLocking() *locking {
	return &locking{Storage: storagetest.New(storagetest.FileSystem).Storage(), held: make(map[string]context.Context)}
}

func (l *locking) state() (calls, pending, unlocks int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls, l.pending, l.unlocks
}

// archiveOver returns an archive over a storage.
func archiveOver(storage certmagic.Storage) *Archive {
	a := New(Config{Namespace: "tested", Seed: 1})
	a.Attach(&Backend{Name: "tested", Storage: storage, Logger: zap.NewNop(), Retention: time.Hour})
	return a
}

// A lock is waited for in whatever way a storage has locks.
func TestLockIsWaitedFor(t *testing.T) {
	for name, test := range map[string]struct {
		take   func(ctx context.Context, begun time.Time) error
		locked bool
		err    error
		took   time.Duration
	}{
		"free": {take: func(context.Context, time.Time) error { return nil }, locked: true},
		"freed for a caller that waits": {take: func(ctx context.Context, _ time.Time) error {
			return wait(ctx, 20*time.Second)
		}, locked: true, took: 20 * time.Second},
		"error at once, until it is freed": {take: func(_ context.Context, begun time.Time) error {
			if time.Since(begun) < 15*time.Second {
				return errHeld
			}
			return nil
		}, locked: true, took: 16 * time.Second},
		"error at once": {take: func(context.Context, time.Time) error { return errHeld }, err: errHeld, took: 44 * time.Second},
		"held":          {take: func(ctx context.Context, _ time.Time) error { return wait(ctx, time.Hour) }, took: lockPatience},
		"held, with a limit of the module": {take: func(ctx context.Context, _ time.Time) error {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			return wait(ctx, time.Hour)
		}, took: 46 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				l := newLocking()
				l.take = func(ctx context.Context) error { return test.take(ctx, begun) }
				a := archiveOver(l)
				defer a.Close()
				unlock, locked, err := a.LockNotes(t.Context(), "folder")
				if locked != test.locked || !errors.Is(err, test.err) || min(time.Since(begun), lockPatience) != min(test.took, lockPatience) {
					t.Errorf("locked %v after %s, error %v", locked, time.Since(begun), err)
				}
				if !locked {
					return
				}
				time.Sleep(5 * time.Minute)
				if err := unlock(); err != nil {
					t.Errorf("after some minutes: %v", err)
				}
			})
		})
	}
}

// wait waits for a time unless ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A lock that never returns costs one goroutine. If it returns after all, it is released, and can be taken again.
func TestLockThatNeverReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		returns := make(chan struct{})
		l := newLocking()
		l.take = func(context.Context) error {
			<-returns
			return nil
		}
		a := archiveOver(l)
		goroutines := runtime.NumGoroutine()
		if _, locked, err := a.LockNotes(t.Context(), "folder"); locked || err != nil {
			t.Errorf("locked %v, error %v", locked, err)
		}
		for range 10 {
			begun := time.Now()
			if _, locked, err := a.LockNotes(t.Context(), "folder"); locked || !errors.Is(err, errLockHangs) || time.Since(begun) > 0 {
				t.Errorf("locked %v after %s, error %v", locked, time.Since(begun), err)
			}
		}
		calls, pending, _ := l.state()
		if n := runtime.NumGoroutine() - goroutines; calls != 1 || pending != 1 || n > 1 || len(a.notes) != 0 {
			t.Errorf("%d calls, %d of them under way, %d goroutines, %d slots", calls, pending, n, len(a.notes))
		}
		close(returns)
		synctest.Wait()
		if _, pending, unlocks := l.state(); pending != 0 || unlocks != 1 {
			t.Errorf("%d are under way, %d are released", pending, unlocks)
		}
		unlock, locked, err := a.LockNotes(t.Context(), "folder")
		if !locked || err != nil {
			t.Fatalf("locked %v, error %v", locked, err)
		}
		if _, again, err := a.LockNotes(t.Context(), "folder"); again || err != nil {
			t.Errorf("it is taken twice: error %v", err)
		}
		if err := unlock(); err != nil {
			t.Error(err)
		}
		a.Close()
	})
}

// Who does not wait any more for a lock does not get it.
func TestLockWhoseCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocking()
		l.take = func(ctx context.Context) error { return wait(ctx, time.Hour) }
		a := archiveOver(l)
		defer a.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, locked, err := a.LockNotes(ctx, "folder"); locked || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("locked %v, error %v", locked, err)
		}
		synctest.Wait()
		if _, pending, _ := l.state(); pending != 0 {
			t.Error("it is still waited for")
		}
	})
}

// What an instance held the lock for that was killed during a sweep is swept again.
func TestSweepAfterACrashDuringASweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, begun := newLocking(), time.Now()
		l.take = func(ctx context.Context) error {
			if time.Since(begun) > time.Hour { // it has been freed once
				return nil
			}
			return wait(ctx, 20*time.Second)
		}
		a := archiveOver(l)
		defer a.Close()
		a.Save(item(0, 100))
		time.Sleep(2 * time.Hour)
		if !l.Exists(t.Context(), tested.sweepCursor()) {
			t.Error("nothing was swept")
		}
	})
}
