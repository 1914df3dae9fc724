package archive

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

var errAway = errors.New("away")

// Reports are stored as they come, at 600 a second over a storage of 20 ms.
func TestWritesKeepUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(20 * time.Millisecond)
		const reports = 6000
		most := 0
		for i := range reports {
			if !f.Save(Item{Key: numbered(i), Report: reportOf(100, [32]byte{byte(i), byte(i >> 8)})}) {
				t.Fatal("there is no room")
			}
			time.Sleep(time.Second / 600)
			most = max(most, f.Stats().Queued)
		}
		time.Sleep(time.Second)
		if n := f.confirmations(); n != reports || most > 100 {
			t.Errorf("%d reports are stored, up to %d were queued", n, most)
		}
	})
}

// What has no room is told when there is.
func TestRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		n := 0
		for f.Save(item(n, 2<<20)) {
			n++
		}
		if f.Save(item(n, 2<<20)) || f.logged("the queue to the storage is full") != 1 {
			t.Error("a full queue has room, or says more than once that it has none")
		}
		time.Sleep(time.Minute)
		if f.room.Load() != 0 {
			t.Error("room is offered although there is none")
		}
		f.storage.Mend()
		time.Sleep(time.Minute)
		if f.room.Load() != 1 || f.confirmations() != n || f.logged("has room again") != 1 {
			t.Errorf("room was offered %d times, %d of %d reports are stored", f.room.Load(), f.confirmations(), n)
		}
	})
}

// A queue that is full again and again is logged once in a while.
func TestRoomIsLoggedRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(20 * time.Millisecond)
		small, saved := report(1), 0
		for range 12 {
			for f.Save(Item{Key: numbered(saved), Report: small}) {
				saved++
			}
			time.Sleep(2 * time.Second)
		}
		if full, room := f.logged("the queue to the storage is full"), f.logged("has room again"); full != 1 || room != 1 || f.room.Load() < 10 {
			t.Errorf("logged %d times that it is full and %d times that it has room, which was offered %d times", full, room, f.room.Load())
		}
	})
}

// A report is confirmed after it was stored, not before.
func TestConfirmation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		f.Save(item(0, 100))
		time.Sleep(time.Hour)
		if f.confirmations() != 0 {
			t.Error("a report is confirmed that is not stored")
		}
		f.storage.Mend()
		time.Sleep(lastRetry)
		if f.confirmations() != 1 || len(f.storage.stored()) != 1 {
			t.Error("a report is not stored when the storage works again")
		}
	})
}

// Values that the storage refuses hold up nothing, are logged once each, and are given up.
func TestRefusedValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.Set(refuseLarge)
		const refused = 20
		for i := range refused {
			f.Save(item(i, 20_000))
		}
		time.Sleep(10 * time.Second)
		for i := range 100 {
			begin := time.Now()
			f.Save(item(refused+i, 100))
			synctest.Wait()
			for f.confirmations() == i {
				time.Sleep(time.Millisecond)
			}
			if took := time.Since(begin); took > time.Second {
				t.Errorf("a report that the storage takes waited for %s", took)
			}
			time.Sleep(time.Minute)
		}
		if n := f.logged("does not take a report: it is retried"); n != refused {
			t.Errorf("%d values are logged", n)
		}
		if fails, works := f.logged("the storage fails"), f.logged("the storage works again"); fails != 1 || works != 1 {
			t.Errorf("logged %d times that the storage fails and %d times that it works again", fails, works)
		}
		if n := f.logged("it is given up"); n != refused || f.Stats().Queued != 0 {
			t.Errorf("%d values are given up, %d are queued", n, f.Stats().Queued)
		}
	})
}

// A value that the storage refuses is not given up in an outage either, although others were stored before.
func TestNothingIsGivenUpInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.Set(refuseLarge)
		f.Save(item(0, 20_000))
		time.Sleep(time.Second)
		f.Save(item(1, 100))
		time.Sleep(time.Minute)
		f.storage.fail(errAway)
		time.Sleep(5 * time.Hour)
		if n := f.logged("it is given up"); n != 0 || f.Stats().Queued != 1 {
			t.Error("a report is given up in an outage")
		}
		f.storage.Mend()
		time.Sleep(time.Minute)
		if n := f.confirmations(); n != 2 {
			t.Errorf("%d reports are stored in the end", n)
		}
	})
}

// In an outage, nothing is given up, and the storage is not flooded.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		const reports = 500
		for i := range reports {
			f.Save(item(i, 100))
		}
		time.Sleep(5 * time.Hour)
		before := f.storage.Calls(storagetest.Store)
		time.Sleep(time.Minute)
		if tries := f.storage.Calls(storagetest.Store) - before; tries > 60 {
			t.Errorf("the storage is tried %d times a minute", tries)
		}
		f.storage.Mend()
		time.Sleep(time.Minute)
		if n := f.confirmations(); n != reports || f.Stats().Failing {
			t.Errorf("%d of %d reports are stored in the end", n, reports)
		}
		if fails, works := f.logged("the storage fails"), f.logged("the storage works again"); fails != 1 || works != 1 {
			t.Errorf("logged %d times that it fails and %d times that it works again", fails, works)
		}
	})
}

// A write that hangs, with or without regard to its context, is not overtaken by a newer one of the same key, which it
// could overwrite. It holds up no others.
func TestWriteThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		name := tested.name(place{kind: inPartition, key: numbered(0)})
		var hung atomic.Bool
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			if c.Op == storagetest.Store && c.Name == name && !hung.Swap(true) {
				return storagetest.Fault{Before: 10 * time.Minute, Deaf: true}
			}
			return storagetest.Fault{}
		})
		f.Save(item(0, 100))
		time.Sleep(time.Second)
		newest := item(0, 300)
		f.Save(newest)
		for i := range 100 {
			f.Save(item(1+i, 100))
		}
		time.Sleep(time.Second)
		if n := f.confirmations(); n != 100 {
			t.Errorf("%d other reports are stored", n)
		}
		time.Sleep(20 * time.Minute)
		other := f.reopen()
		defer other.Close()
		if got, err := other.find(t, numbered(0)); err != nil || got.Report == nil || len(got.Report.Document().Body) != 300 {
			t.Errorf("found %+v, error %v", got, err)
		}
	})
}

// A write that hangs for longer than its time does not keep the others from finding out that the storage works again.
func TestProbeThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		const reports = 10
		for i := range reports {
			f.Save(item(i, 100))
		}
		time.Sleep(time.Minute)
		f.storage.Set(storagetest.On(storagetest.Hanging(true), storagetest.Store))
		time.Sleep(time.Minute)
		hanging := f.storage.Pending(storagetest.Store)
		f.storage.Set(storagetest.Delayed(time.Millisecond))
		time.Sleep(2 * time.Minute)
		if n := f.confirmations(); n < reports-hanging {
			t.Errorf("%d reports are stored while %d writes hang", n, hanging)
		}
	})
}

// At a stop, 10,000 reports are stored over a storage of 20 ms.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(20 * time.Millisecond)
		for i := range maxQueue {
			f.Save(item(i, 100))
		}
		begin := time.Now()
		if err := f.Drain(f.backend); err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took > 10*time.Second || f.confirmations() != maxQueue {
			t.Errorf("draining took %s, %d reports are stored", took, f.confirmations())
		}
		if n := len(f.storage.Names(tested.indexFolder())); n != 3 {
			t.Errorf("the index has %d objects", n)
		}
	})
}

// A stop waits for no delay before a retry, and ends if nothing can be stored.
func TestDrainAfterAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Save(item(100, 100))
		time.Sleep(time.Second)
		f.storage.fail(errAway)
		for i := range 100 {
			f.Save(item(i, 100))
		}
		time.Sleep(10 * time.Minute) // the delays are long by now
		begin := time.Now()
		if err := f.Drain(f.backend); err == nil || !strings.Contains(err.Error(), "100 reports") || time.Since(begin) != drainPatience {
			t.Errorf("error %v after %s", err, time.Since(begin))
		}
		f.storage.Mend()
		begin = time.Now()
		if err := f.Drain(f.backend); err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took > time.Second || f.confirmations() != 101 {
			t.Errorf("draining took %s, %d reports are stored", took, f.confirmations())
		}
	})
}

// Values that the storage refuses do not keep others from being stored at a stop.
func TestDrainWithRefusedValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(20 * time.Millisecond)
		f.storage.Set(refuseLarge)
		for i := range 20 {
			f.Save(item(i, 20_000))
		}
		time.Sleep(time.Minute)
		for i := range 2000 {
			f.Save(item(20+i, 100))
		}
		if err := f.Drain(f.backend); err == nil || !strings.Contains(err.Error(), "20 reports") || f.confirmations() != 2000 {
			t.Errorf("%d reports are stored, error %v", f.confirmations(), err)
		}
	})
}

// When another backend stays, draining does not wait, and what is queued goes to that one.
func TestDrainLeavesTheQueueToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		f.Save(item(0, 100))
		time.Sleep(time.Second)
		newer := newTestStorage()
		other := &Backend{Storage: newer.Storage(), Logger: f.backend.Logger, Retention: time.Hour}
		f.Attach(other)
		if err := f.Drain(f.backend); err != nil {
			t.Error(err)
		}
		f.Detach(f.backend)
		time.Sleep(time.Minute)
		if n := len(newer.stored()); n != 1 {
			t.Errorf("%d values are stored in the other storage", n)
		}
	})
}

// Between two configurations, an archive does nothing. It goes on with the next.
func TestBetweenBackends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Detach(f.backend)
		time.Sleep(time.Hour)
		if n := f.storage.Calls(storagetest.Store); n != 0 {
			t.Errorf("%d writes without a backend", n)
		}
		f.Attach(f.backend)
		f.Save(item(0, 100))
		time.Sleep(time.Minute)
		if f.confirmations() != 1 {
			t.Error("a report is not stored")
		}
	})
}

// What is saved when an archive is closed is not written.
func TestSaveAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		f.Close()
		f.Save(item(0, 100))
		time.Sleep(time.Hour)
		if n := f.storage.Calls(storagetest.Store); n != 0 {
			t.Errorf("%d writes", n)
		}
	})
}

// A write that times out has the error that the storage gave before.
func TestTimeoutOfAWriteAfterAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		f.Save(item(0, 100))
		synctest.Wait()
		f.storage.Set(storagetest.Hanging(true))
		for i := range tripAfter {
			f.Save(item(i, 100))
		}
		time.Sleep(2 * writeTimeout)
		lines := f.lines("the storage fails").All()
		if len(lines) != 1 {
			t.Fatalf("it is logged %d times", len(lines))
		}
		if text := fmt.Sprint(lines[0].ContextMap()["error"]); !strings.Contains(text, "takes too long; before that: ") || !strings.Contains(text, errAway.Error()) {
			t.Errorf("logged is %q", text)
		}
	})
}

func TestWithoutBackend(t *testing.T) {
	a := New(Config{Namespace: "tested"})
	defer a.Close()
	if a.Save(item(1, 1)) {
		t.Error("a report is saved, although there is no backend")
	}
	if _, err := a.Load(t.Context(), numbered(1), nil); !errors.Is(err, ErrUnreadable) {
		t.Errorf("got %v", err)
	}
	if _, err := a.Purge(t.Context(), Selection{}, 0); err == nil {
		t.Error("a purge without a backend succeeds")
	}
}
