package archive

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

func TestSaveAndLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.delay = 20 * time.Millisecond
		want := report(1000)
		if !f.Save(numbered(1), want) {
			t.Fatal("there is no room")
		}
		// While it is queued, it is read from the queue.
		if got, ttl, err := f.Load(t.Context(), numbered(1), time.Second); got != want || ttl != 24*time.Hour || err != nil {
			t.Errorf("queued: %v, %s, %v", got, ttl, err)
		}
		time.Sleep(time.Hour)
		if stats := f.Stats(); stats != (Stats{}) {
			t.Errorf("the queue is %+v", stats)
		}
		r, ttl, err := f.Load(t.Context(), numbered(1), time.Second)
		if err != nil || ttl > 23*time.Hour || ttl < 22*time.Hour {
			t.Fatalf("stored: %s, %v", ttl, err)
		}
		if got := r.Document(); !bytes.Equal(got.Body, want.Document().Body) || !got.At.Equal(want.At()) {
			t.Errorf("got %+v", got)
		}
		if value, _, err := f.Load(t.Context(), numbered(2), time.Second); value != nil || err != nil {
			t.Errorf("never stored: %v, %v", value, err)
		}
		time.Sleep(24 * time.Hour)
		if value, _, err := f.Load(t.Context(), numbered(1), time.Second); value != nil || err != nil {
			t.Errorf("after its retention: %v, %v", value, err)
		}
	})
}

func TestFailedReadsPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.err = errors.New("away")
		for range 3 {
			if _, _, err := f.Load(t.Context(), numbered(1), 10*time.Second); !errors.Is(err, ErrUnreadable) {
				t.Errorf("got %v", err)
			}
		}
		if f.storage.loads != 1 {
			t.Errorf("the storage was read %d times", f.storage.loads)
		}
		f.storage.set(func() { f.storage.err = nil })
		time.Sleep(10 * time.Second)
		if _, _, err := f.Load(t.Context(), numbered(1), 10*time.Second); err != nil {
			t.Errorf("after the pause: %v", err)
		}
	})
}

// A caller that leaves says nothing about the storage.
func TestLeavingDoesNotPauseReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.delay = time.Second
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, cancel)
		if _, _, err := f.Load(ctx, numbered(1), time.Minute); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if _, _, err := f.Load(t.Context(), numbered(1), time.Minute); err != nil {
			t.Errorf("the next caller: %v", err)
		}
	})
}

// A value that the storage refuses does not hold up the others, and is stored when the storage takes it.
func TestRefusedValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.max = 4000
		f.Save(numbered(0), report(20_000))
		const small = 20
		for i := range small {
			f.Save(numbered(1+i), report(100))
		}
		time.Sleep(time.Minute)
		if n := f.storage.len(); n != small {
			t.Errorf("%d values are stored", n)
		}
		f.storage.set(func() { f.storage.max = 0 })
		time.Sleep(time.Minute)
		if n := f.storage.len(); n != small+1 {
			t.Errorf("%d values are stored in the end", n)
		}
		if fails, works := f.logged("the storage fails"), f.logged("the storage works again"); fails != 1 || works != 1 {
			t.Errorf("logged %d times that it fails and %d times that it works again", fails, works)
		}
	})
}

// A stop does not wait for the delay before the next retry.
func TestDrainRetriesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.err = errors.New("away")
		f.Save(numbered(1), report(100))
		time.Sleep(10 * time.Minute) // the delay is long by now
		f.storage.set(func() { f.storage.err = nil })
		begin := time.Now()
		if err := f.Drain(t.Context(), f.backend); err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took > time.Second || f.storage.len() != 1 {
			t.Errorf("draining took %s, %d values are stored", took, f.storage.len())
		}
	})
}

func TestDrainEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.err = errors.New("away")
		f.Save(numbered(1), report(100))
		begin := time.Now()
		if err := f.Drain(t.Context(), f.backend); err == nil || time.Since(begin) != drainTimeout {
			t.Errorf("error %v after %s", err, time.Since(begin))
		}
	})
}

// When another backend stays, draining does not wait, and the queue goes to that one.
func TestDrainLeavesTheQueueToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		f.storage.err = errors.New("away")
		other := &Backend{Storage: new(fakeStorage), Logger: f.backend.Logger, Retention: time.Hour}
		f.Save(numbered(1), report(100))
		time.Sleep(time.Second)
		f.Attach(other)
		if err := f.Drain(t.Context(), f.backend); err != nil {
			t.Error(err)
		}
		f.Detach(f.backend)
		time.Sleep(time.Minute)
		if n := other.Storage.(*fakeStorage).len(); n != 1 {
			t.Errorf("%d values are stored in the other storage", n)
		}
	})
}

func TestPurge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Close()
		for i := range 3 {
			f.Save(numbered(i), report(100))
		}
		time.Sleep(time.Minute)
		f.storage.set(func() { f.storage.err = errors.New("away") })
		f.Save(numbered(3), report(100))
		time.Sleep(time.Second)
		f.storage.set(func() { f.storage.err = nil })
		if queued, stored, err := f.Purge(t.Context(), []task.Key{numbered(1)}); queued != 0 || stored != 1 || err != nil {
			t.Errorf("one: %d queued, %d stored, error %v", queued, stored, err)
		}
		if queued, stored, err := f.Purge(t.Context(), nil); queued != 1 || stored != 2 || err != nil {
			t.Errorf("all: %d queued, %d stored, error %v", queued, stored, err)
		}
		if f.storage.len() != 0 || f.Stats().Queued != 0 {
			t.Errorf("%d values are left in the storage, %d in the queue", f.storage.len(), f.Stats().Queued)
		}
	})
}

func TestWithoutBackend(t *testing.T) {
	a := New("tested")
	defer a.Close()
	if a.Save(numbered(1), report(1)) {
		t.Error("a value is saved, although there is no backend")
	}
	if _, _, err := a.Load(t.Context(), numbered(1), time.Second); !errors.Is(err, ErrUnreadable) {
		t.Errorf("got %v", err)
	}
}
