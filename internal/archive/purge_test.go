package archive

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// filled returns an archive with the reports of two nodes.
func filled(t *testing.T) (f *fixture, node, other task.Source) {
	t.Helper()
	f = newFixture()
	node, other = task.NodeSource("tested", "node-1"), task.NodeSource("tested", "node-2")
	for i := range 20 {
		name := string(rune('a' + i))
		f.Save(Item{Key: task.ReportKey(node, name, task.Summary), Report: reportOf(100, [32]byte{1, byte(i % 2)})})
		f.Save(Item{Key: task.ReportKey(node, name, task.Complete), Report: reportOf(1<<20, [32]byte{1, byte(i % 2)})})
		f.Save(Item{Key: task.ReportKey(other, name, task.Summary), Report: reportOf(100, [32]byte{2})})
	}
	time.Sleep(time.Minute)
	return f, node, other
}

func (f *fixture) reports() (n int) {
	for _, p := range f.storage.stored() {
		if p.kind == inPartition {
			n++
		}
	}
	return n
}

func TestPurge(t *testing.T) {
	node, other := task.NodeSource("tested", "node-1"), task.NodeSource("tested", "node-2")
	for name, test := range map[string]struct {
		selection Selection
		deleted   int
	}{
		"everything":  {Selection{}, 60},
		"a task":      {Selection{Keys: []task.Key{task.ReportKey(node, "a", task.Summary), task.ReportKey(node, "a", task.Complete)}}, 2},
		"unknown":     {Selection{Keys: []task.Key{numbered(0)}}, 0},
		"a node":      {Selection{Source: &node}, 40},
		"the other":   {Selection{Source: &other}, 20},
		"a file":      {Selection{File: &[32]byte{1, 1}}, 20},
		"no file":     {Selection{File: &[32]byte{3}}, 0},
		"older":       {Selection{Before: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)}, 60},
		"none is old": {Selection{Before: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, _, _ := filled(t)
				defer f.Close()
				got, err := f.Purge(t.Context(), test.selection, 0)
				if err != nil || got.Stored != test.deleted || got.Next != Partitions {
					t.Errorf("got %+v, error %v, want %d", got, err, test.deleted)
				}
				if n := f.reports(); n != 60-test.deleted {
					t.Errorf("%d reports are left", n)
				}
			})
		})
	}
}

// A purge ends in time, and goes on from where it was.
func TestPurgeInSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _, _ := filled(t)
		defer f.Close()
		f.storage.slow(time.Second)
		steps, deleted, next := 0, 0, 0
		for next < Partitions {
			begin := time.Now()
			got, err := f.Purge(t.Context(), Selection{}, next)
			if err != nil || time.Since(begin) > purgeTimeout+5*time.Second || got.Next <= next {
				t.Fatalf("got %+v after %s, error %v", got, time.Since(begin), err)
			}
			next = got.Next
			deleted += got.Stored
			steps++
		}
		if deleted != 60 || len(f.storage.stored()) != 0 || steps < 2 {
			t.Errorf("%d reports are deleted in %d steps, %d values are left", deleted, steps, len(f.storage.stored()))
		}
	})
}

// A selection matches a report under its own key, and under that of the report that it refers to.
func TestSelectionMatches(t *testing.T) {
	node, other := task.NodeSource("tested", "node-1"), task.NodeSource("tested", "node-2")
	key, another := task.ReportKey(node, "a", task.Summary), task.ReportKey(other, "a", task.Summary)
	ref, file := task.SubmissionKey(task.SubmissionSource("tested"), "a", task.Summary), [32]byte{1}
	r := task.NewReport(task.Document{At: noon, File: file})
	for name, test := range map[string]struct {
		selection Selection
		target    *task.Key
		report    *task.Report
		want      bool
	}{
		"everything":               {selection: Selection{}, want: true},
		"its key":                  {selection: Selection{Keys: []task.Key{another, ref}}, want: true},
		"its target":               {selection: Selection{Keys: []task.Key{key}}, target: &key, want: true},
		"another target":           {selection: Selection{Keys: []task.Key{key}}, target: &another},
		"no target":                {selection: Selection{Keys: []task.Key{key}}},
		"no key":                   {selection: Selection{Keys: []task.Key{}}},
		"the node of its target":   {selection: Selection{Source: &node}, target: &key, want: true},
		"another node":             {selection: Selection{Source: &node}, target: &another},
		"its file":                 {selection: Selection{File: &file}, want: true},
		"another file":             {selection: Selection{File: &[32]byte{2}}},
		"a file that is not known": {selection: Selection{File: &[32]byte{}}, report: task.NewReport(task.Document{At: noon})},
		"older":                    {selection: Selection{Before: noon.Add(1)}, want: true},
		"of that time":             {selection: Selection{Before: noon}},
	} {
		if test.report == nil {
			test.report = r
		}
		if got := test.selection.Matches(ref, test.target, test.report); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A queue that was purged has room, and says so.
func TestPurgeMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.fail(errAway)
		keys, n := []task.Key(nil), 0
		for f.Save(item(n, 1<<20)) {
			keys = append(keys, numbered(n))
			n++
		}
		time.Sleep(time.Minute) // one write at a time is tried now
		if got, _ := f.Purge(t.Context(), Selection{Keys: keys}, 0); got.Queued != n {
			t.Errorf("got %+v, want %d that were queued", got, n)
		}
		synctest.Wait()
		if stats := f.Stats(); stats.Queued != 0 || f.room.Load() != 1 {
			t.Errorf("after the purge: %+v, room was offered %d times", stats, f.room.Load())
		}
	})
}

// What cannot be read is purged by its key nevertheless.
func TestPurgeUnreadableValues(t *testing.T) {
	for name, stored := range map[string][]byte{"damaged": []byte("damaged"), "of a later version": append([]byte(magic), version+1)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture()
				defer f.Close()
				f.storage.Put(tested.name(place{kind: inPartition, key: numbered(0)}), stored)
				got, err := f.Purge(t.Context(), Selection{Keys: []task.Key{numbered(0)}}, 0)
				if err != nil || got.Stored != 1 || len(f.storage.stored()) != 0 {
					t.Errorf("got %+v, error %v, %d are left", got, err, len(f.storage.stored()))
				}
			})
		})
	}
}

// What is queued is purged, and a write under way does not bring it back.
func TestPurgeQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.storage.slow(time.Second)
		f.Save(item(0, 100))
		time.Sleep(time.Millisecond)
		got, err := f.Purge(t.Context(), Selection{Keys: []task.Key{numbered(0)}}, 0)
		if err != nil || got.Queued != 1 || f.Stats().Queued != 0 {
			t.Errorf("got %+v, error %v", got, err)
		}
		time.Sleep(time.Minute)
		if n := len(f.storage.stored()); n != 0 {
			t.Error("a purged report is stored")
		}
	})
}

// A purge while the storage is away is an error, whatever the storage says of what it does not have.
func TestPurgeDuringAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, node, _ := filled(t)
		defer f.Close()
		f.storage.fail(errAway)
		for name, s := range map[string]Selection{
			"everything": {},
			"a task":     {Keys: []task.Key{numbered(0)}},
			"a node":     {Source: &node},
			"a file":     {File: &[32]byte{1}},
			"older":      {Before: time.Now()},
		} {
			if got, err := f.Purge(t.Context(), s, 0); !errors.Is(err, errAway) || errors.Is(err, errTimeout) || got.Stored != 0 {
				t.Errorf("%s: got %+v, error %v", name, got, err)
			}
		}
	})
}

// A purge that makes no progress returns an error. Otherwise the caller would repeat the same step for ever.
func TestPurgeThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _, _ := filled(t)
		defer f.Close()
		f.storage.Set(storagetest.On(storagetest.Hanging(false), storagetest.List))
		begin := time.Now()
		if got, err := f.Purge(t.Context(), Selection{}, 0); !errors.Is(err, errTimeout) || got.Next != 0 || time.Since(begin) > purgeTimeout {
			t.Errorf("got %+v after %s, error %v", got, time.Since(begin), err)
		}
	})
}

// A deletion that breaks off half-way may leave a value that is no longer listed. It is deleted by the next try.
func TestPurgeThatBreaksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _, _ := filled(t)
		defer f.Close()
		f.storage.Set(storagetest.On(func(storagetest.Call) storagetest.Fault {
			return storagetest.Fault{Effect: storagetest.Half}
		}, storagetest.Delete))
		if got, err := f.Purge(t.Context(), Selection{}, 0); err == nil {
			t.Errorf("got %+v, no error", got)
		}
		f.storage.Mend()
		if got, err := f.Purge(t.Context(), Selection{}, 0); err != nil || got.Next != Partitions {
			t.Errorf("got %+v, error %v", got, err)
		}
		if left := f.storage.stored(); len(left) > 0 {
			t.Errorf("%d values are left", len(left))
		}
	})
}
