package archive

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

// saveAll saves reports of all kinds, and returns how many values they are.
func saveAll(t *testing.T, f *fixture) (values int) {
	t.Helper()
	for i := range 100 {
		f.Save(Item{Key: numbered(i), Report: reportOf(100, [32]byte{byte(i), 1})})
		target := numbered(i)
		f.Save(Item{Key: numbered(1000 + i), Report: reportOf(100, [32]byte{byte(i), 1}), Target: &target})
	}
	f.Save(item(200, 1<<20))
	time.Sleep(time.Minute)
	values = 100 + 100 + 100 + 2
	if n := len(f.storage.stored()); n != values {
		t.Fatalf("%d values are stored, want %d", n, values)
	}
	return values
}

// What the index has is deleted as soon as its retention is over, and nothing before.
func TestSweepByIndex(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(20 * time.Millisecond)
		values := saveAll(t, f)
		time.Sleep(24*time.Hour - 2*time.Minute)
		if n := len(f.storage.stored()); n != values {
			t.Errorf("before their retention is over, %d of %d values are left", n, values)
		}
		f.Save(item(300, 100))
		time.Sleep(30 * time.Minute)
		if n := len(f.storage.stored()); n != 1 {
			t.Errorf("after their retention, %d old values are left", n-1)
		}
		if n := len(f.storage.Names(tested.indexFolder())); n != 1 {
			t.Errorf("the index has %d objects", n)
		}
	})
}

// A day of the index of which something is left is swept again, and the whole index is listed once.
func TestSweepOfADayAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		bad := tested.name(place{kind: inPartition, key: numbered(0)})
		var lists atomic.Int32
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			if c.Op == storagetest.List && c.Name == tested.indexFolder() {
				lists.Add(1)
			}
			if c.Op == storagetest.Delete && c.Name == bad {
				return storagetest.Failing(errAway)(c)
			}
			return storagetest.Fault{}
		})
		f.Save(item(0, 100))
		time.Sleep(24*time.Hour - time.Minute)
		f.Save(item(1, 100)) // at the end of the same day
		time.Sleep(3 * 24 * time.Hour)
		if left := f.storage.stored(); len(left) != 1 || left[0].key != numbered(0) || lists.Load() != 1 {
			t.Errorf("%d values are left, the index was listed %d times", len(left), lists.Load())
		}
		f.storage.Mend()
		time.Sleep(time.Hour)
		if n := len(f.storage.stored()); n != 0 {
			t.Error("what could not be deleted is left")
		}
	})
}

// An object of the index that could not be written is written later.
func TestIndexIsWrittenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Save(item(0, 100))
		time.Sleep(time.Second)
		f.storage.fail(errAway)
		time.Sleep(2 * indexDelay)
		f.storage.Mend()
		time.Sleep(indexDelay)
		if n := len(f.storage.Names(tested.indexFolder())); n != 1 {
			t.Errorf("the index has %d objects", n)
		}
	})
}

// A value that was stored again is not deleted because of an old object of the index.
func TestSweepSparesWhatIsStoredAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Save(item(0, 100))
		time.Sleep(20 * time.Hour)
		f.Save(item(0, 100))
		time.Sleep(20 * time.Hour)
		if n := len(f.storage.stored()); n != 1 {
			t.Error("a young value is deleted")
		}
		time.Sleep(5 * time.Hour)
		if n := len(f.storage.stored()); n != 0 {
			t.Error("an old value is left")
		}
	})
}

// A round of the scan finds what the index has lost.
func TestSweepByScan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		saveAll(t, f)
		time.Sleep(time.Hour)
		for _, name := range f.storage.Names(tested.indexFolder()) {
			f.storage.Remove(name)
		}
		time.Sleep(60 * 24 * time.Hour)
		if n := len(f.storage.stored()); n != 0 {
			t.Errorf("%d values are left", n)
		}
	})
}

// The sweep keeps up with 43 million values a day over a storage of 20 ms: that is 500 a second.
func TestSweepKeepsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		const reports = 20_000
		for i := range reports {
			for !f.Save(item(i, 10)) {
				time.Sleep(time.Second)
			}
		}
		time.Sleep(time.Hour)
		f.storage.slow(20 * time.Millisecond)
		time.Sleep(23*time.Hour - 10*time.Minute)
		before := f.storage.Calls(storagetest.Delete)
		for f.storage.Calls(storagetest.Delete) == before {
			time.Sleep(time.Second)
		}
		begin := time.Now()
		for f.storage.Calls(storagetest.Delete) < before+reports {
			time.Sleep(time.Second)
		}
		if rate := reports / time.Since(begin).Seconds(); rate < 500 {
			t.Errorf("%.0f values a second are deleted", rate)
		}
	})
}

// Values that cannot be read or deleted keep no others from being deleted.
func TestSweepWithBadValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		bad := make(map[string]bool)
		for i := range 5 {
			bad[tested.name(place{kind: inPartition, key: numbered(i)})] = true
		}
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			if bad[c.Name] && c.Op != storagetest.Store {
				return storagetest.Fault{Effect: storagetest.None}
			}
			return storagetest.Fault{}
		})
		for i := range 10 * 24 {
			f.Save(item(i, 100))
			time.Sleep(time.Hour)
		}
		time.Sleep(25 * time.Hour)
		if left := len(f.storage.stored()); left != len(bad) {
			t.Errorf("%d values are left", left)
		}
		f.storage.Mend()
		time.Sleep(60 * 24 * time.Hour)
		if left := len(f.storage.stored()); left != 0 {
			t.Errorf("%d values are left in the end", left)
		}
	})
}

// A sweep that fails goes on where it was.
func TestSweepDuringAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		values := saveAll(t, f)
		var deletes atomic.Int32
		f.storage.Set(func(c storagetest.Call) storagetest.Fault {
			if c.Op == storagetest.Delete && deletes.Add(1) > 50 {
				return storagetest.Fault{Effect: storagetest.None}
			}
			return storagetest.Fault{}
		})
		time.Sleep(25 * time.Hour)
		if left := len(f.storage.stored()); left != values-50 {
			t.Errorf("%d of %d values are left", left, values)
		}
		f.storage.Mend()
		time.Sleep(30 * time.Minute)
		if left := len(f.storage.stored()); left != 0 {
			t.Errorf("after the outage, %d values are left", left)
		}
	})
}

// A lock that hangs costs one operation, and no reads and writes.
func TestLockThatHangs(t *testing.T) {
	for _, operation := range []storagetest.Op{storagetest.TryLock, storagetest.Unlock} {
		t.Run(operation.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture()
				defer f.Close()
				f.storage.Set(storagetest.On(storagetest.Hanging(true), operation))
				for i := range 200 {
					f.Save(item(i, 100))
					time.Sleep(10 * time.Minute)
					if got, err := f.find(t, numbered(i)); err != nil || got.Report == nil {
						t.Fatalf("found %+v, error %v", got, err)
					}
				}
				if n := f.storage.Calls(operation); n != 1 {
					t.Errorf("%d operations hang", n)
				}
				f.storage.Release()
			})
		})
	}
}

// Two instances that disagree about the retention are warned, and the longer one counts while both run.
func TestInstancesDisagreeAboutTheRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		long := newFixtureWith(func(f *fixture, _ *Config) { f.backend.Retention = 90 * 24 * time.Hour })
		short := newFixtureWith(func(f *fixture, c *Config) {
			f.storage, f.backend.Retention = long.storage, 2*time.Hour
			c.Seed = 2
		})
		defer short.Close()
		long.Save(item(0, 100))
		short.Save(item(1, 100))
		time.Sleep(10 * 24 * time.Hour)
		if n := len(long.storage.stored()); n != 2 {
			t.Errorf("%d of 2 values are left", n)
		}
		if got, err := short.find(t, numbered(1)); got.Report == nil || err != nil {
			t.Errorf("the instance with the short retention finds %+v, error %v", got, err)
		}
		const warning = "another instance uses this namespace"
		if one, two := long.logged(warning), short.logged(warning); one != 1 || two != 1 {
			t.Errorf("logged %d and %d times", one, two)
		}
		long.Close()
		time.Sleep(24 * time.Hour)
		if n := len(long.storage.stored()); n != 0 {
			t.Errorf("after the instance with the long retention has ended, %d values are left", n)
		}
		if n := len(long.storage.Names(strings.TrimSuffix(tested.recordName(""), "/"))); n != 1 {
			t.Errorf("%d records are left", n)
		}
	})
}

// An instance whose sweep hangs lives all the same: the others keep values for as long as it wants.
func TestInstanceWhoseLockHangsLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		long := newFixtureWith(func(f *fixture, _ *Config) { f.backend.Retention = 90 * 24 * time.Hour })
		defer long.Close()
		short := newFixtureWith(func(f *fixture, c *Config) {
			f.storage = testStorage{storagetest.NewFaulty(long.storage.Memory), long.storage.Memory}
			f.backend.Storage, f.backend.Retention = f.storage.Storage(), 2*time.Hour
			c.Seed = 2
		})
		defer short.Close()
		long.storage.Set(storagetest.On(storagetest.Hanging(true), storagetest.TryLock))
		long.Save(item(0, 100))
		time.Sleep(24 * time.Hour)
		if n := len(long.storage.stored()); n != 1 {
			t.Error("a value was deleted that an instance wants to keep")
		}
	})
}

// A clock that is wrong for a while does not stop anything: only the age of values depends on it.
func TestClockThatSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var step atomic.Int64
		f := newFixtureWith(func(_ *fixture, c *Config) {
			c.Now = func() time.Time { return time.Now().Add(time.Duration(step.Load())) }
		})
		defer f.Close()
		f.storage.fail(errAway)
		for i := range 10 {
			f.Save(item(i, 100))
			_, _ = f.find(t, numbered(100+i))
		}
		time.Sleep(time.Second)
		step.Store(-int64(time.Hour))
		f.storage.Mend()
		time.Sleep(lastProbe)
		if got, err := f.find(t, numbered(0)); got.Report == nil || err != nil {
			t.Errorf("found %+v, error %v", got, err)
		}
		time.Sleep(lastRetry)
		if f.confirmations() != 10 || f.Stats().Failing {
			t.Errorf("%d of 10 reports are stored", f.confirmations())
		}
	})
}
