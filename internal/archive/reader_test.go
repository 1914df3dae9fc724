package archive

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// storedFixture returns an archive over a storage that has n reports, which nothing but the storage has.
func storedFixture(t *testing.T, n int) *fixture {
	t.Helper()
	first := newFixture()
	defer first.Close()
	for i := range n {
		first.Save(item(i, 100))
	}
	time.Sleep(time.Minute)
	if first.confirmations() != n {
		t.Fatalf("%d of %d reports are stored", first.confirmations(), n)
	}
	return first.reopen()
}

func TestSaveAndLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(20 * time.Millisecond)
		for size, k := range map[int]task.Key{1000: numbered(1), inlineLimit + 1: numbered(2), 5 << 20: numbered(3)} {
			want := report(size)
			f.Save(Item{Key: k, Report: want})
			if got, err := f.find(t, k); got.Report != want || got.TTL != 24*time.Hour || err != nil {
				t.Errorf("queued: %+v, %v", got, err)
			}
			time.Sleep(time.Hour)
			var held int64
			got, err := f.Load(t.Context(), k, func(n int64) error { held = n; return nil })
			if err != nil || got.Report == nil || got.Target != nil || got.TTL > 23*time.Hour || got.TTL < 22*time.Hour {
				t.Fatalf("stored: %+v, %v", got, err)
			}
			if d := got.Report.Document(); !bytes.Equal(d.Body, want.Document().Body) || !d.At.Equal(want.At()) {
				t.Errorf("got %+v", d)
			}
			if held < int64(size) {
				t.Errorf("memory for %d of %d bytes was reserved", held, size)
			}
		}
		if got, err := f.find(t, numbered(9)); got.Report != nil || err != nil {
			t.Errorf("never stored: %v, %v", got, err)
		}
		time.Sleep(24 * time.Hour)
		if got, err := f.find(t, numbered(1)); got.Report != nil || err != nil {
			t.Errorf("after its retention: %v, %v", got, err)
		}
	})
}

// The memory for a large document is reserved before it is read.
func TestNoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Save(item(0, 1<<20))
		time.Sleep(time.Minute)
		full := errors.New("full")
		before := f.storage.Calls(storagetest.Load)
		_, err := f.Load(t.Context(), numbered(0), func(n int64) error {
			if n > inlineLimit {
				return full
			}
			return nil
		})
		if reads := f.storage.Calls(storagetest.Load) - before; !errors.Is(err, full) || reads != 1 {
			t.Errorf("error %v after %d reads", err, reads)
		}
	})
}

// A submission's report is stored once, under its task.
func TestReference(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, size := range []int{1000, 1 << 20} {
			f := newFixture()
			r, target := report(size), numbered(0)
			f.Save(Item{Key: numbered(1), Report: r, Target: &target})
			f.Save(Item{Key: target, Report: r})
			time.Sleep(time.Minute)
			got, err := f.find(t, numbered(1))
			if err != nil || got.Report == nil || !bytes.Equal(got.Report.Document().Body, r.Document().Body) || got.Target == nil || *got.Target != target {
				t.Errorf("found %+v, error %v", got, err)
			}
			documents := 0
			for _, name := range f.storage.Names("") {
				if len(f.storage.Get(name)) > size {
					documents++
				}
			}
			if documents != 1 {
				t.Errorf("the document is stored %d times", documents)
			}
			if _, err := f.Purge(t.Context(), Selection{Keys: []task.Key{target}}, 0); err != nil {
				t.Error(err)
			}
			if got, err := f.find(t, numbered(1)); got.Report != nil || err != nil {
				t.Errorf("after the report was purged, its reference finds %+v, error %v", got, err)
			}
			f.Close()
		}
	})
}

// What is queued counts as well, even while the storage cannot be read. What is not newer than what the caller has is not read.
func TestNewestOfTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		file := [32]byte{7}
		old := reportOf(100, file)
		f.Save(Item{Key: numbered(1), Report: old})
		time.Sleep(time.Minute)
		f.storage.fail(errors.New("away"))
		queued := reportOf(101, file)
		f.Save(Item{Key: numbered(2), Report: queued})
		time.Sleep(time.Second)
		f.Save(Item{Key: numbered(3), Report: reportOf(102, file), Kind: task.Complete})
		newest := func(after time.Time) (Found, error) {
			return f.Newest(t.Context(), file, task.Summary, after, func(int64) error { return nil })
		}
		if got, err := newest(time.Time{}); got.Report != queued || *got.Target != numbered(2) || err != nil {
			t.Errorf("found %+v, %v", got, err)
		}
		if got, err := newest(queued.At()); got.Report != nil || !errors.Is(err, ErrUnreadable) {
			t.Errorf("not newer: found %+v, %v", got, err)
		}
		f.storage.slow(0)
		time.Sleep(time.Minute)
		before := f.storage.Calls(storagetest.Load)
		if got, err := newest(old.At()); got.Report == nil || got.Report.Length() != 101 || err != nil {
			t.Errorf("stored: found %+v, %v", got, err)
		}
		read := f.storage.Calls(storagetest.Load) - before
		if got, err := newest(queued.At()); got.Report != nil || err != nil || f.storage.Calls(storagetest.Load) != before+read {
			t.Errorf("not newer than what is stored: found %+v, %v", got, err)
		}
	})
}

// The newest report of a file is found, high-level and complete apart, however many there are.
func TestNewest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		file := [32]byte{7}
		for i := range 30 {
			f.Save(Item{Key: numbered(i), Report: reportOf(100+i, file), Kind: task.Kind(i % 2)})
			time.Sleep(time.Minute)
		}
		f.Save(Item{Key: numbered(99), Report: reportOf(1, [32]byte{8})})
		time.Sleep(time.Minute)
		newest := func(sum [32]byte, kind task.Kind) Found {
			t.Helper()
			got, err := f.Newest(t.Context(), sum, kind, time.Time{}, func(int64) error { return nil })
			if err != nil {
				t.Error(err)
			}
			return got
		}
		before := f.storage.Calls(storagetest.Load)
		for kind, want := range map[task.Kind]int{task.Summary: 28, task.Complete: 29} {
			if got := newest(file, kind); got.Report == nil || got.Report.Length() != 100+want || got.Target == nil || *got.Target != numbered(want) {
				t.Errorf("kind %d: found %+v", kind, got)
			}
		}
		if n := f.storage.Calls(storagetest.Load) - before; n != 4 {
			t.Errorf("the storage was read %d times", n)
		}
		if got := newest([32]byte{9}, task.Summary); got.Report != nil {
			t.Errorf("of an unknown file: %+v", got)
		}
		if _, err := f.Purge(t.Context(), Selection{Keys: []task.Key{numbered(28)}}, 0); err != nil {
			t.Error(err)
		}
		if got := newest(file, task.Summary); got.Report == nil || got.Report.Length() != 126 {
			t.Errorf("after the newest was purged: %+v", got)
		}
	})
}

// The newest report of a file is found among those of other files in the same folder, which are not read.
func TestNewestBesideOtherFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		file := [32]byte{7}
		folder, other := tested.fileFolder(task.FileSource("tested", file, task.Summary)), [32]byte{}
		for i := uint32(1); tested.fileFolder(task.FileSource("tested", other, task.Summary)) != folder; i++ {
			binary.BigEndian.PutUint32(other[8:], i)
		}
		f.Save(Item{Key: numbered(1), Report: reportOf(100, file)})
		time.Sleep(time.Minute)
		f.Save(Item{Key: numbered(2), Report: reportOf(101, other)})
		time.Sleep(time.Minute)
		before := f.storage.Calls(storagetest.Load)
		got, err := f.Newest(t.Context(), file, task.Summary, time.Time{}, func(int64) error { return nil })
		if err != nil || got.Report == nil || got.Report.Length() != 100 {
			t.Errorf("found %+v, error %v", got, err)
		}
		if n := f.storage.Calls(storagetest.Load) - before; n != 2 {
			t.Errorf("the storage was read %d times", n)
		}
	})
}

// A reference finds its report, even if that has become large since.
func TestReferenceToWhatHasGrown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		target := numbered(0)
		small := report(100)
		f.Save(Item{Key: target, Report: small})
		f.Save(Item{Key: numbered(1), Report: small, Target: &target})
		time.Sleep(time.Minute)
		f.Save(item(0, 1<<20))
		time.Sleep(time.Minute)
		if got, err := f.find(t, numbered(1)); err != nil || got.Report == nil || got.Report.Length() != 1<<20 {
			t.Errorf("found %+v, error %v", got, err)
		}
	})
}

// References that refer to each other find nothing.
func TestReferencesInACircle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		for i := range 2 {
			p := place{kind: inPartition, key: numbered(i)}
			ref := value{kind: kindReference, at: time.Now(), key: p.key, target: place{kind: inPartition, key: numbered(1 - i)}}
			f.storage.Put(tested.name(p), mustEncode(t, ref, tested.name(p), nil))
		}
		if got, err := f.find(t, numbered(0)); err != nil || got.Report != nil {
			t.Errorf("found %+v, error %v", got, err)
		}
	})
}

// Callers wait for a full pool, which is no failure.
func TestManyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const reports, callers, latency = 1000, 300, 20 * time.Millisecond
		f := storedFixture(t, reports)
		defer f.Close()
		f.storage.slow(latency)
		next := make(chan int, reports)
		for i := range reports {
			next <- i
		}
		close(next)
		var mu sync.Mutex
		var took []time.Duration
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				for i := range next {
					begin := time.Now()
					if got, err := f.find(t, numbered(i)); err != nil || got.Report == nil {
						t.Errorf("found %+v, error %v", got, err)
					}
					mu.Lock()
					took = append(took, time.Since(begin))
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		slices.Sort(took)
		if p99 := took[len(took)*99/100]; p99 > 5*latency {
			t.Errorf("p99 is %s", p99)
		}
	})
}

// A value that takes long costs the others nothing, and is read itself.
func TestSlowValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		slow := tested.name(place{kind: inPartition, key: numbered(0)})
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			if c.Name == slow {
				return storagetest.Fault{Before: 3 * time.Second}
			}
			return storagetest.Fault{}
		})
		done := make(chan Found)
		go func() {
			got, err := f.find(t, numbered(0))
			if err != nil {
				t.Error(err)
			}
			done <- got
		}()
		for range 100 {
			for i := range 9 {
				if got, err := f.find(t, numbered(1+i)); err != nil || got.Report == nil {
					t.Errorf("another value: %+v, error %v", got, err)
				}
			}
			time.Sleep(30 * time.Millisecond)
		}
		if got := <-done; got.Report == nil {
			t.Error("the slow value is not found")
		}
	})
}

// While the storage fails, callers are told at once. The first success ends that.
func TestReadsDuringAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		before := f.storage.Calls(storagetest.Load)
		f.storage.fail(errAway)
		for i := range 10 {
			if _, err := f.find(t, numbered(i)); !errors.Is(err, ErrUnreadable) {
				t.Errorf("got %v", err)
			}
		}
		if n := f.storage.Calls(storagetest.Load) - before; n != tripAfter || !f.Stats().Failing {
			t.Errorf("the storage was read %d times", n)
		}
		f.storage.Mend()
		time.Sleep(lastProbe)
		for i := range 10 {
			if got, err := f.find(t, numbered(i)); err != nil || got.Report == nil {
				t.Errorf("after the outage: %+v, error %v", got, err)
			}
		}
	})
}

// A value that cannot be read again and again is logged once a minute.
func TestOneValueThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 2)
		defer f.Close()
		bad := tested.name(place{kind: inPartition, key: numbered(0)})
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			if c.Name == bad {
				return storagetest.Failing(errAway)(c)
			}
			return storagetest.Fault{}
		})
		for minute := range 3 {
			for range 10 {
				if _, err := f.find(t, numbered(0)); !errors.Is(err, errAway) {
					t.Errorf("error %v", err)
				}
				time.Sleep(time.Second)
			}
			if n := f.logged("a stored value could not be read"); n != minute+1 {
				t.Errorf("it is logged %d times in minute %d", n, minute)
			}
			time.Sleep(complainEvery)
		}
		if got, err := f.find(t, numbered(1)); err != nil || got.Report == nil || f.Stats().Failing {
			t.Errorf("another value: %+v, error %v, stats %+v", got, err, f.Stats())
		}
	})
}

// A storage that refuses connections is asked once.
func TestReadsThatAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		before := f.storage.Calls(storagetest.Load)
		f.storage.fail(&net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED})
		for i := range 10 {
			if _, err := f.find(t, numbered(i)); !errors.Is(err, ErrUnreadable) || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("got %v", err)
			}
		}
		if n := f.storage.Calls(storagetest.Load) - before; n != 1 {
			t.Errorf("the storage was read %d times", n)
		}
		if s := f.Stats(); !s.Failing || s.Module != "tested" || !strings.Contains(s.Error, "connection refused") {
			t.Errorf("the stats are %+v", s)
		}
	})
}

// A timeout has the error that the storage gave before.
func TestTimeoutAfterAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		f.storage.fail(errAway)
		if _, err := f.find(t, numbered(0)); !errors.Is(err, errAway) {
			t.Errorf("got %v", err)
		}
		f.storage.Set(storagetest.Hanging(true))
		for i := range tripAfter - 1 {
			if _, err := f.find(t, numbered(i)); !errors.Is(err, errTimeout) || !errors.Is(err, errAway) {
				t.Errorf("got %v", err)
			}
		}
		for _, line := range f.lines("the storage fails").All() {
			if text := fmt.Sprint(line.ContextMap()["error"]); !strings.Contains(text, "takes too long; before that: ") || !strings.Contains(text, errAway.Error()) {
				t.Errorf("logged is %q", text)
			}
		}
		if f.logged("the storage fails") == 0 {
			t.Error("it is not logged")
		}
	})
}

// An operation on a note that times out has the error that the storage gave before.
func TestNoteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 1)
		defer f.Close()
		f.storage.fail(errAway)
		if _, err := f.find(t, numbered(0)); !errors.Is(err, errAway) {
			t.Errorf("got %v", err)
		}
		f.storage.Set(storagetest.Hanging(true))
		if err := f.StoreNote(t.Context(), "folder", "note", nil); !errors.Is(err, errTimeout) || !errors.Is(err, errAway) {
			t.Errorf("got %v", err)
		}
	})
}

// An error of a storage may have a URL whose query holds a secret. No log line and no answer has it.
func TestSecretInAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		f.storage.fail(&url.Error{Op: "Get", URL: "https://storage.example.com/a?sig=the-secret", Err: errAway})
		for i := range 5 {
			_, _ = f.find(t, numbered(i))
			f.Save(item(i, 100))
		}
		time.Sleep(time.Minute)
		_, purge := f.Purge(t.Context(), Selection{}, 0)
		texts := []string{f.Stats().Error, fmt.Sprint(purge), fmt.Sprint(f.StoreNote(t.Context(), "folder", "note", nil))}
		for _, line := range f.lines("the storage fails").All() {
			texts = append(texts, fmt.Sprint(line.ContextMap()["error"]))
		}
		if len(texts) != 5 { // reads and writes fail
			t.Errorf("there are %d errors", len(texts))
		}
		for _, text := range texts {
			if strings.Contains(text, "the-secret") || !strings.Contains(text, `"https://storage.example.com/a?REDACTED": away`) {
				t.Errorf("shown is %s", text)
			}
		}
	})
}

// A storage that cannot list can still be read.
func TestListsThatFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Save(item(0, 100))
		time.Sleep(time.Minute)
		f.storage.Set(storagetest.On(storagetest.Failing(errAway), storagetest.List))
		for i := range 10 {
			if _, err := f.Newest(t.Context(), [32]byte{byte(i + 1)}, task.Summary, time.Time{}, func(int64) error { return nil }); !errors.Is(err, ErrUnreadable) {
				t.Errorf("a list that fails: error %v", err)
			}
		}
		if found, err := f.find(t, numbered(0)); err != nil || found.Report == nil {
			t.Errorf("found %v, error %v", found.Report, err)
		}
	})
}

// A storage that says that there is nothing when it cannot be reached is not believed.
func TestReadsFromAStorageThatLies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := storagetest.New(storagetest.S3Delimiter)
		f := newFixtureWith(func(f *fixture, _ *Config) { f.storage = testStorage{storagetest.NewFaulty(m), m} })
		defer f.Close()
		f.Save(item(0, 100))
		time.Sleep(time.Minute)
		if got, err := f.find(t, numbered(1)); got.Report != nil || err != nil {
			t.Errorf("what is not there: %+v, error %v", got, err)
		}
		before := f.storage.Calls(storagetest.Load)
		for range 40 {
			if got, err := f.find(t, numbered(1)); got.Report != nil || err != nil {
				t.Errorf("what is not there: %+v, error %v", got, err)
			}
		}
		if n := f.storage.Calls(storagetest.Load) - before; n != 40 {
			t.Errorf("the storage was read %d times for 40 values", n)
		}
		f.storage.fail(errAway)
		time.Sleep(time.Minute)
		for i := range 10 {
			if _, err := f.find(t, numbered(i)); !errors.Is(err, ErrUnreadable) {
				t.Errorf("while it cannot be reached: error %v", err)
			}
		}
		f.storage.Mend()
		time.Sleep(time.Minute)
		if got, err := f.find(t, numbered(0)); got.Report == nil || err != nil {
			t.Errorf("afterwards: %+v, error %v", got, err)
		}
	})
}

// When the storage hangs, those who wait are told after the time of a slow read, and others at once.
func TestReadsThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 300)
		defer f.Close()
		f.storage.Set(storagetest.Hanging(true))
		var wg sync.WaitGroup
		for i := range 300 {
			wg.Go(func() {
				begin := time.Now()
				_, err := f.find(t, numbered(i))
				if took := time.Since(begin); !errors.Is(err, ErrUnreadable) || took > slowRead {
					t.Errorf("error %v after %s", err, took)
				}
			})
		}
		wg.Wait()
		begin := time.Now()
		if _, err := f.find(t, numbered(0)); !errors.Is(err, ErrUnreadable) || time.Since(begin) > 0 {
			t.Errorf("error %v after %s", err, time.Since(begin))
		}
		f.storage.Mend()
		time.Sleep(lastProbe)
		if got, err := f.find(t, numbered(0)); err != nil || got.Report == nil {
			t.Errorf("after the outage: %+v, error %v", got, err)
		}
	})
}

// If the storage hangs and there are no other callers, a caller is told soon as well.
func TestSingleReadsThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, deaf := range []bool{false, true} {
			f := storedFixture(t, 10)
			f.storage.Set(storagetest.Hanging(deaf))
			time.Sleep(time.Minute)
			for i, most := range []time.Duration{slowRead + probeTimeout, slowRead, 0, 0} {
				begin := time.Now()
				_, err := f.find(t, numbered(i))
				if took := time.Since(begin); !errors.Is(err, ErrUnreadable) || took > most {
					t.Errorf("deaf %v, read %d: error %v after %s", deaf, i, err, took)
				}
			}
			f.storage.Mend()
			time.Sleep(time.Minute)
			if got, err := f.find(t, numbered(0)); got.Report == nil || err != nil {
				t.Errorf("afterwards: %+v, error %v", got, err)
			}
			f.Close()
		}
	})
}

// A caller that leaves says nothing about the storage.
func TestLeavingIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		f.storage.slow(time.Second)
		for i := range 10 {
			stop, leave := context.WithCancel(t.Context())
			time.AfterFunc(time.Millisecond, leave)
			if _, err := f.Load(stop, numbered(i), func(int64) error { return nil }); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		}
		if got, err := f.find(t, numbered(0)); err != nil || got.Report == nil {
			t.Errorf("the next caller: %+v, error %v", got, err)
		}
	})
}

// A probe whose caller has left does not keep others from probing.
func TestLeavingDuringAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 10)
		defer f.Close()
		f.storage.fail(errAway)
		for i := range tripAfter {
			_, _ = f.find(t, numbered(i))
		}
		f.storage.Set(storagetest.Hanging(false))
		time.Sleep(lastProbe)
		calls := f.storage.Calls(storagetest.Load)
		ctx, leave := context.WithCancel(t.Context())
		defer time.AfterFunc(time.Millisecond, leave).Stop()
		if _, err := f.Load(ctx, numbered(0), func(int64) error { return nil }); !errors.Is(err, context.Canceled) || f.storage.Calls(storagetest.Load) != calls+1 {
			t.Errorf("the probe: error %v", err)
		}
		f.storage.Mend()
		time.Sleep(lastProbe)
		if got, err := f.find(t, numbered(0)); err != nil || got.Report == nil {
			t.Errorf("after the outage: %+v, error %v", got, err)
		}
	})
}

// A value of a newer version is left alone: it is not set aside, and not overwritten.
func TestNewerVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 1)
		defer f.Close()
		name := tested.name(place{kind: inPartition, key: numbered(0)})
		newer := bytes.Clone(f.storage.Get(name))
		newer[4]++
		f.storage.Put(name, newer)
		for range 2 {
			if got, err := f.find(t, numbered(0)); got.Report != nil || err != nil {
				t.Errorf("found %+v, error %v", got, err)
			}
		}
		f.Save(item(0, 100))
		time.Sleep(3 * 24 * time.Hour)
		if !bytes.Equal(f.storage.Get(name), newer) || len(f.storage.stored()) != 1 {
			t.Error("the value was not left alone")
		}
		if n := f.logged("left alone"); n != 1 {
			t.Errorf("logged %d times", n)
		}
	})
}

// A damaged value is set aside, with a time of its own, and deleted in the end.
func TestDamagedValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 1)
		defer f.Close()
		name := tested.name(place{kind: inPartition, key: numbered(0)})
		f.storage.Put(name, f.storage.Get(name)[:70])
		if got, err := f.find(t, numbered(0)); got.Report != nil || err != nil {
			t.Errorf("found %+v, error %v", got, err)
		}
		aside := place{kind: damaged, key: numbered(0)}
		if got := f.storage.stored(); !slices.Equal(got, []place{aside}) {
			t.Fatalf("stored are %v", got)
		}
		v, err := decode(f.storage.Get(tested.name(aside)), tested.name(aside), numbered(0), nil)
		if err != nil || len(v.raw) != 70 {
			t.Errorf("set aside are %d bytes, error %v", len(v.raw), err)
		}
		time.Sleep(3 * 24 * time.Hour)
		if n := len(f.storage.stored()); n != 0 {
			t.Error("the damaged value is not deleted after its retention")
		}
	})
}

// A value that is stored while a damaged one is set aside stays.
func TestDamagedValueIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := storedFixture(t, 1)
		defer f.Close()
		name := tested.name(place{kind: inPartition, key: numbered(0)})
		sound := f.storage.Get(name)
		f.storage.Put(name, []byte("damaged"))
		f.storage.Set(storagetest.On(storagetest.Delayed(time.Second), storagetest.Store))
		time.AfterFunc(time.Second/2, func() { f.storage.Put(name, sound) })
		if got, err := f.find(t, numbered(0)); err != nil || got.Report != nil {
			t.Errorf("found %+v, error %v", got, err)
		}
		if got, err := f.find(t, numbered(0)); err != nil || got.Report == nil {
			t.Errorf("the other value: found %+v, error %v", got, err)
		}
	})
}
