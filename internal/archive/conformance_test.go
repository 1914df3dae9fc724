package archive

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// eachKind runs a test with each kind of storage, a fast one and one that is a network away.
func eachKind(t *testing.T, test func(t *testing.T, f *fixture)) {
	t.Helper()
	for _, kind := range storagetest.Kinds {
		for _, delay := range []time.Duration{0, 20 * time.Millisecond} {
			t.Run(fmt.Sprintf("%s, %s", kind, delay), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFixtureOver(storagetest.New(kind), delay, 1)
					defer f.Close()
					test(t, f)
				})
			})
		}
	}
}

// newFixtureOver returns an archive over a storage that others may use as well.
func newFixtureOver(m *storagetest.Memory, delay time.Duration, seed uint64) *fixture {
	return newFixtureWith(func(f *fixture, c *Config) {
		f.storage = testStorage{storagetest.NewFaulty(m), m}
		f.storage.slow(delay)
		c.Seed = seed
	})
}

// stock is what the tests store.
type stock struct {
	node, other task.Source
	file        [32]byte
	keys        []task.Key // of reports, large ones among them, and of references to them
	reports     map[task.Key]*task.Report
}

// fill stores reports of two nodes, and references to some of them.
func fill(t *testing.T, f *fixture) *stock {
	t.Helper()
	s := &stock{
		node: task.NodeSource("tested", "node-1"), other: task.NodeSource("tested", "node-2"), file: [32]byte{1},
		reports: make(map[task.Key]*task.Report),
	}
	for i := range 24 {
		source, file := s.node, [32]byte{}
		if i%2 == 1 {
			source = s.other
		}
		if i%3 == 0 {
			file = s.file
		}
		size := 1000
		if i%4 >= 2 {
			size = inlineLimit + 1000
		}
		k := task.ReportKey(source, fmt.Sprint(i), task.Summary)
		body := bytes.Repeat([]byte{byte(i + 1)}, size)
		r := task.NewReport(task.Document{At: time.Now(), Hash: fmt.Sprintf("%032x", i), File: file, Length: size, Body: body})
		s.save(f, Item{Key: k, Report: r})
		s.save(f, Item{Key: task.SubmissionKey(task.SubmissionSource("tested"), fmt.Sprint(i), task.Summary), Report: r, Target: &k})
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Minute)
	if stats := f.Stats(); stats.Queued != 0 || stats.Failing {
		t.Fatalf("they are not stored: %+v", stats)
	}
	return s
}

func (s *stock) save(f *fixture, i Item) {
	f.Save(i)
	s.keys = append(s.keys, i.Key)
	s.reports[i.Key] = i.Report
}

// check checks that those reports are there that must be.
func (s *stock) check(t *testing.T, f *fixture, must func(k task.Key, r *task.Report) bool) {
	t.Helper()
	for i, k := range s.keys {
		found, err := f.find(t, k)
		if err != nil {
			t.Fatalf("loading %d: %v", i, err)
		}
		want := s.reports[k]
		if !must(k, want) {
			if found.Report != nil {
				t.Errorf("%d is found", i)
			}
			continue
		}
		if found.Report == nil {
			t.Errorf("%d is not found", i)
			continue
		}
		got := found.Report.Document()
		if !bytes.Equal(got.Body, want.Document().Body) || got.Hash != want.Document().Hash || !got.At.Equal(want.At()) || got.File != want.File() {
			t.Errorf("%d is not what was stored", i)
		}
		if reference := i%2 == 1; (found.Target != nil) != reference || reference && *found.Target != s.keys[i-1] {
			t.Errorf("%d is found under %v", i, found.Target)
		}
	}
}

func always(task.Key, *task.Report) bool { return true }
func never(task.Key, *task.Report) bool  { return false }

// values returns the names of the values, without what the archive stores for itself.
func (f *fixture) values() (names []string) {
	for _, name := range f.storage.Names("") {
		if _, ok := tested.parse(name); ok {
			names = append(names, name)
		}
	}
	return names
}

// What is stored is found, by this instance and by another after a restart.
func TestKindsStore(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		s := fill(t, f)
		s.check(t, f, always)
		if err := f.Drain(f.backend); err != nil {
			t.Error(err)
		}
		other := newFixtureOver(f.storage.Memory, 20*time.Millisecond, 2)
		defer other.Close()
		s.check(t, other, always)
		found, err := other.Newest(t.Context(), s.file, task.Summary, time.Time{}, func(int64) error { return nil })
		if err != nil || found.Report == nil || found.Report.Document().Hash != fmt.Sprintf("%032x", 21) {
			t.Errorf("the newest report of the file: %+v, error %v", found, err)
		}
		if found, err := other.Newest(t.Context(), s.file, task.Complete, time.Time{}, func(int64) error { return nil }); err != nil || found.Report != nil {
			t.Errorf("the newest complete report of the file: %+v, error %v", found, err)
		}
		if found, err := other.find(t, numbered(0)); err != nil || found.Report != nil {
			t.Errorf("an unknown report: %+v, error %v", found, err)
		}
	})
}

// Each selection is purged, and nothing else.
func TestKindsPurge(t *testing.T) {
	for name, purge := range map[string]func(s *stock) (Selection, func(k task.Key, r *task.Report) bool){
		"everything": func(*stock) (Selection, func(task.Key, *task.Report) bool) { return Selection{}, never },
		"keys": func(s *stock) (Selection, func(task.Key, *task.Report) bool) {
			return Selection{Keys: s.keys[:6]}, func(k task.Key, _ *task.Report) bool {
				return !slices.Contains(s.keys[:6], k)
			}
		},
		"a node": func(s *stock) (Selection, func(task.Key, *task.Report) bool) {
			return Selection{Source: &s.node}, func(_ task.Key, r *task.Report) bool { return r.Document().Body[0]%2 == 0 }
		},
		"a file": func(s *stock) (Selection, func(task.Key, *task.Report) bool) {
			return Selection{File: &s.file}, func(_ task.Key, r *task.Report) bool { return r.File() != s.file }
		},
		"by age": func(s *stock) (Selection, func(task.Key, *task.Report) bool) {
			before := s.reports[s.keys[20]].At()
			return Selection{Before: before}, func(_ task.Key, r *task.Report) bool { return !r.At().Before(before) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachKind(t, func(t *testing.T, f *fixture) {
				s := fill(t, f)
				selection, must := purge(s)
				deleted := 0
				for from := 0; from < Partitions; {
					done, err := f.Purge(t.Context(), selection, from)
					if err != nil || done.Next <= from {
						t.Fatalf("purged %+v, error %v", done, err)
					}
					from, deleted = done.Next, deleted+done.Stored
				}
				s.check(t, f, must)
				if deleted == 0 {
					t.Error("nothing is deleted")
				}
				if left := f.values(); selection.Keys == nil && selection.Source == nil && selection.File == nil && selection.Before.IsZero() && len(left) > 0 {
					t.Errorf("%d values are left, such as %s", len(left), left[0])
				}
			})
		})
	}
}

// When their retention is over, values go away.
func TestKindsSweep(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		s := fill(t, f)
		time.Sleep(23 * time.Hour)
		s.check(t, f, always)
		time.Sleep(2 * time.Hour)
		s.check(t, f, never)
		if left := f.values(); len(left) > 0 {
			t.Errorf("%d values are left, such as %s", len(left), left[0])
		}
		if left := f.storage.Names(tested.indexFolder()); len(left) > 0 {
			t.Errorf("the index is left: %s", left)
		}
	})
}

// What the index has lost is found by the scan of its partition.
func TestKindsScan(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		f.Save(Item{Key: numbered(0), Report: reportOf(100, [32]byte{})})
		f.Save(Item{Key: numbered(1), Report: reportOf(100, [32]byte{})})
		time.Sleep(10 * time.Minute)
		for _, name := range f.storage.Names(tested.indexFolder()) {
			f.storage.Remove(name)
		}
		time.Sleep(25 * time.Hour)
		if n := len(f.values()); n != 2 {
			t.Fatalf("%d values are left without an index", n)
		}
		f.storage.Put(tested.sweepCursor(), fmt.Appendf(nil, `{"partition":%d}`, partitionOf(numbered(0))))
		time.Sleep(15 * time.Minute)
		if left := f.values(); len(left) != 1 || left[0] != tested.name(place{kind: inPartition, key: numbered(1)}) {
			t.Errorf("after the scan of one partition, there are %s", left)
		}
	})
}

// While the storage is away, nothing is found missing, deleted or purged. Afterwards all is there.
func TestKindsOutage(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		s := fill(t, f)
		f.storage.fail(errAway)
		for i := range 4 {
			if found, err := f.find(t, s.keys[i]); !errors.Is(err, ErrUnreadable) && !f.storage.Kind().Lies() {
				t.Errorf("found %+v, error %v", found, err)
			}
		}
		for _, selection := range []Selection{{}, {Keys: s.keys}, {Source: &s.node}, {File: &s.file}, {Before: time.Now()}} {
			if done, err := f.Purge(t.Context(), selection, 0); err == nil || done.Stored != 0 {
				t.Errorf("purged %+v, error %v", done, err)
			}
		}
		f.Save(Item{Key: numbered(0), Report: reportOf(100, [32]byte{})})
		time.Sleep(22 * time.Hour)
		f.storage.Mend()
		time.Sleep(time.Minute)
		s.check(t, f, always)
		if found, err := f.find(t, numbered(0)); err != nil || found.Report == nil {
			t.Errorf("what was saved in the outage: %+v, error %v", found, err)
		}
		if stats := f.Stats(); stats.Queued != 0 || stats.Failing {
			t.Errorf("after the outage: %+v", stats)
		}
	})
}

// What cannot be read is left alone if it is of a later version, and set aside if it is damaged.
func TestKindsUnreadableValues(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		s := fill(t, f)
		newer := tested.name(place{kind: inPartition, key: s.keys[0]})
		f.storage.Put(newer, append([]byte(magic), version+1))
		harmed := tested.name(place{kind: inPartition, key: s.keys[2]})
		f.storage.Put(harmed, f.storage.Get(harmed)[:100])
		for _, k := range []task.Key{s.keys[0], s.keys[2]} {
			if found, err := f.find(t, k); err != nil || found.Report != nil {
				t.Errorf("found %+v, error %v", found, err)
			}
		}
		time.Sleep(time.Minute)
		if f.storage.Get(newer) == nil || f.storage.Get(harmed) != nil {
			t.Error("a value of a later version is not left alone, or a damaged one is")
		}
		if aside := f.storage.Get(tested.name(place{kind: damaged, key: s.keys[2]})); aside == nil {
			t.Error("a damaged value is not set aside")
		}
		time.Sleep(60 * time.Hour)
		if left := f.values(); len(left) != 1 || left[0] != newer {
			t.Errorf("in the end, there are %s", strings.Join(left, ", "))
		}
	})
}
