package fsbroker

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// tested is a namespace, and its memory.
type tested struct {
	*namespace
	*memory
}

// savingMemory returns a namespace whose memory has a limit.
func savingMemory(t *testing.T, limit int64) *tested {
	ns := newNamespace("default")
	ns.memory.setLimit(limit)
	t.Cleanup(ns.memory.close)
	return &tested{ns, ns.memory}
}

// openFaulty opens an archive for a memory, in a storage of its own.
func openFaulty(t *testing.T, m *tested, name string) (*archive.Archive, *storagetest.Faulty) {
	t.Helper()
	return openLogged(t, m, name, zap.NewNop())
}

// openLogged is like openFaulty, with a logger.
func openLogged(t *testing.T, m *tested, name string, logger *zap.Logger) (*archive.Archive, *storagetest.Faulty) {
	t.Helper()
	f := storagetest.NewFaulty(storagetest.New(storagetest.FileSystem))
	b := &archive.Backend{Storage: f.Storage(), Logger: logger, Retention: 24 * time.Hour}
	a := m.openArchive(name, b)
	t.Cleanup(func() {
		f.Mend()
		m.closeArchive(name, b)
	})
	return a, f
}

// keepFinished keeps a finished report, and saves it.
func keepFinished(m *tested, i, size int) *entry {
	d := inflatedReport(size).Document()
	d.At = time.Now()
	return m.keep(numbered(i), task.NewReport(d), kept{ttl: 10 * time.Minute})
}

// wantAllStored checks that an archive has the reports 0 to n-1.
func wantAllStored(t *testing.T, a *archive.Archive, n int) {
	t.Helper()
	for i := range n {
		if !isStored(t, a, numbered(i)) {
			t.Fatalf("%d is not stored", i)
		}
	}
}

// isStored reports whether an archive has a report.
func isStored(t *testing.T, a *archive.Archive, k task.Key) bool {
	t.Helper()
	found, err := a.Load(t.Context(), k, func(int64) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return found.Report != nil
}

var errStorageAway = errors.New("the storage is away")

// A log that hangs stops neither a miss nor a hit: a report is kept, and found, while the line waits that the queue is full.
func TestLogThatHangsStopsNoMiss(t *testing.T) {
	SkipIfShort(t)
	synctest.Test(t, func(t *testing.T) {
		core, _ := observer.New(zapcore.InfoLevel)
		log := testenv.NewHangingLog(core, "the queue to the storage is full")
		m := savingMemory(t, 1<<30)
		a, f := openLogged(t, m, "one", zap.New(log))
		f.Set(storagetest.Failing(errStorageAway))
		const reports = 10_100
		for i := range reports {
			keepFinished(m, i, 100)
		}
		<-log.Hangs()
		if _, ok := m.get(numbered(reports - 1)); !ok || len(m.saving.unsaved[a]) == 0 {
			t.Error("what the queue has no room for is not kept")
		}
		log.Release()
	})
}

// What the queue has no room for is queued by itself when there is room.
func TestUnsavedIsQueuedWhenThereIsRoom(t *testing.T) {
	SkipIfShort(t)
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<30)
		a, f := openFaulty(t, m, "one")
		f.Set(storagetest.Failing(errStorageAway))
		const reports = 12_000
		for i := range reports {
			keepFinished(m, i, 100)
		}
		if queued := a.Stats().Queued; queued != 10_000 || len(m.saving.unsaved[a]) != reports-queued {
			t.Fatalf("%d are queued, %d are not", queued, len(m.saving.unsaved[a]))
		}
		f.Set(storagetest.Delayed(20 * time.Millisecond))
		time.Sleep(30 * time.Second)
		if queued := a.Stats().Queued; queued != 0 || len(m.saving.unsaved[a]) != 0 {
			t.Errorf("%d are still queued, %d are not", queued, len(m.saving.unsaved[a]))
		}
		wantAllStored(t, a, reports)
	})
}

// A stop stores what the queue has no room for as well.
func TestUnsavedIsStoredAtAStop(t *testing.T) {
	SkipIfShort(t)
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<30)
		f := storagetest.NewFaulty(storagetest.New(storagetest.FileSystem))
		b := &archive.Backend{Storage: f.Storage(), Logger: zap.NewNop(), Retention: 24 * time.Hour}
		a := m.openArchive("one", b)
		f.Set(storagetest.Delayed(20 * time.Millisecond))
		const reports = 12_000
		for i := range reports {
			keepFinished(m, i, 100)
		}
		if err := a.Drain(b); err != nil {
			t.Error(err)
		}
		m.closeArchive("one", b)
		other := savingMemory(t, 1<<20)
		defer other.closeArchive("one", b)
		wantAllStored(t, other.openArchive("one", b), reports)
	})
}

// What the queue has no room for is queued before it leaves memory, if there is room by then.
func TestUnsavedIsQueuedBeforeItIsEvicted(t *testing.T) {
	for what, leave := range map[string]func(m *tested){
		"evicted": func(m *tested) { m.setLimit(0) },
		"expired": func(*tested) { time.Sleep(11 * time.Minute); synctest.Wait() },
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := savingMemory(t, 1<<30)
				a, f := openFaulty(t, m, "one")
				f.Set(storagetest.Failing(errStorageAway))
				i := 0
				for ; len(m.saving.unsaved[a]) == 0; i++ {
					keepFinished(m, i, 1<<20)
				}
				last := numbered(i - 1)
				// A purge makes room for one, which is not worth telling.
				_, _ = a.Purge(t.Context(), archive.Selection{Keys: []task.Key{numbered(0)}}, 0)
				if !m.isUnsaved(a, last) {
					t.Fatal("it is queued too early")
				}
				leave(m)
				if n := len(m.saving.unsaved[a]); n != 0 || m.stats().Entries != 0 {
					t.Errorf("%d are not saved, %d are kept", n, m.stats().Entries)
				}
				f.Mend()
				time.Sleep(time.Minute)
				if !isStored(t, a, last) {
					t.Error("it is not stored")
				}
			})
		})
	}
}

// A report that leaves memory while the queue has no room for it is lost, which is told with what operators know it by. What is
// purged, or replaced by another report, is not lost.
func TestLostReportIsTold(t *testing.T) {
	for what, test := range map[string]struct {
		leave func(m *tested, rs *resolver, k task.Key)
		lost  []any
	}{
		"evicted":    {func(m *tested, _ *resolver, _ task.Key) { m.setLimit(0) }, []any{"s1"}},
		"expired":    {func(*tested, *resolver, task.Key) { time.Sleep(11 * time.Minute) }, []any{"s1"}},
		"never kept": {func(m *tested, rs *resolver, _ task.Key) { m.setLimit(1); keepTask(rs, "t1") }, []any{"s1", "node-1/t1"}},
		"purged": {func(m *tested, _ *resolver, k task.Key) {
			m.purge(archive.Selection{Keys: []task.Key{k}}.Matches)
		}, nil},
		"replaced": {func(_ *tested, rs *resolver, k task.Key) { keepSubmission(rs, k) }, nil},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				core, logs := observer.New(zapcore.WarnLevel)
				m := savingMemory(t, 1<<30)
				a, f := openLogged(t, m, "one", zap.New(core))
				f.Set(storagetest.Failing(errStorageAway))
				fillQueue(a)
				rs := newResolver(m.namespace, nil, nil, resolverOptions{archive: a, ttl: 10 * time.Minute})
				k := task.SubmissionKey(task.SubmissionSource("default"), "s1", task.Summary)
				keepSubmission(rs, k)
				if !m.isUnsaved(a, k) {
					t.Fatal("the queue has room for it")
				}
				test.leave(m, rs, k)
				time.Sleep(2 * time.Minute)
				var lost []any
				for _, line := range logs.FilterMessageSnippet("left memory").All() {
					ids := line.ContextMap()["ids"].([]any)
					if n := line.ContextMap()["lost"]; n != int64(len(ids)) {
						t.Errorf("%v are lost, and %v are named", n, ids)
					}
					lost = append(lost, ids...)
				}
				if !slices.Equal(lost, test.lost) {
					t.Errorf("the log names %v, want %v: %v", lost, test.lost, logs.All())
				}
			})
		})
	}
}

// What leaves memory because the limit of a site is gone is not lost for the archive that is gone with that site.
func TestNothingIsLostForAnArchiveThatIsGone(t *testing.T) {
	lost := func() (n float64) {
		registry := prometheus.NewRegistry()
		registry.MustRegister(storageMetrics.Collectors()...)
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if strings.HasSuffix(f.GetName(), "_lost_total") {
				n += f.GetMetric()[0].GetCounter().GetValue()
			}
		}
		return n
	}
	synctest.Test(t, func(t *testing.T) {
		ns, err := useNamespace(t.Name())
		if err != nil {
			t.Fatal(err)
		}
		m := &tested{ns, ns.memory}
		f := storagetest.NewFaulty(storagetest.New(storagetest.FileSystem))
		f.Set(storagetest.Failing(errStorageAway))
		b := &archive.Backend{Storage: f.Storage(), Logger: zap.NewNop(), Retention: 24 * time.Hour}
		older := &site{
			resolver: newResolver(ns, nil, nil, resolverOptions{archive: m.openArchive("one", b), ttl: time.Hour}),
			pollers:  newPollers(nil, time.Second, zap.NewNop()), storage: &storage{b, "one"},
		}
		ns.join(older.resolver, 1<<30)
		if _, err := useNamespace(ns.name); err != nil {
			t.Fatal(err)
		}
		newer := newResolver(ns, nil, nil, resolverOptions{})
		ns.join(newer, 0)
		fillQueue(older.archive)
		keepTask(older.resolver, "t1")
		if len(m.saving.unsaved[older.archive]) != 1 {
			t.Fatal("the queue has room for the report")
		}
		before := lost()
		if err := older.close(); err != nil {
			t.Error(err)
		}
		if m.memory.stats().Entries > 0 || lost() != before {
			t.Errorf("memory has %d reports, and %v are lost", m.memory.stats().Entries, lost()-before)
		}
		ns.leave(newer)
		if err := ns.disuse(); err != nil {
			t.Error(err)
		}
	})
}

// A report that is queued when it is fetched again is not lost when it leaves memory.
func TestQueuedIsNotUnsaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<30)
		a, f := openFaulty(t, m, "one")
		f.Set(storagetest.Failing(errStorageAway))
		fillQueue(a)
		report := inflatedReport(100)
		fetch := func() {
			m.keep(numbered(-1), report, kept{ttl: time.Hour, id: harvest.ID{SubmitID: "s1"}})
		}
		if fetch(); !m.isUnsaved(a, numbered(-1)) {
			t.Fatal("the queue has room for it")
		}
		_, _ = a.Purge(t.Context(), archive.Selection{Keys: []task.Key{numbered(0)}}, 0)
		if fetch(); m.isUnsaved(a, numbered(-1)) || !a.IsQueued(numbered(-1)) {
			t.Error("it is queued, and unsaved all the same")
		}
	})
}

// fillQueue queues reports 0 and up for an archive whose storage is away, until there is no room.
func fillQueue(a *archive.Archive) {
	i := 0
	for a.Save(archive.Item{Key: numbered(i), Report: inflatedReport(100)}) {
		i++
	}
}

// submission returns the high-level report of a submission.
func submission(id string) target { return target{ID: harvest.ID{SubmitID: id}} }

func keepSubmission(rs *resolver, k task.Key) {
	rs.keep(k, submission("s1"), inflatedReport(100), nil)
}

func keepTask(rs *resolver, taskID string) {
	rs.keep(numbered(-1), target{ID: harvest.ID{AppServerID: "node-1", TaskID: taskID}}, inflatedReport(100), nil)
}

func (m *memory) isUnsaved(a *archive.Archive, k task.Key) bool {
	e, ok := m.get(k)
	if !ok {
		return false
	}
	_, ok = m.saving.unsaved[a][e]
	return ok
}

// What is purged does not come back by being queued again.
func TestPurgeOfWhatIsUnsaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<30)
		a, f := openFaulty(t, m, "one")
		f.Set(storagetest.Failing(errStorageAway))
		i := 0
		for ; len(m.saving.unsaved[a]) == 0; i++ {
			keepFinished(m, i, 1<<20)
		}
		last := numbered(i - 1)
		if n := m.purge(archive.Selection{Keys: []task.Key{last}}.Matches); n != 1 || len(m.saving.unsaved[a]) != 0 {
			t.Errorf("%d are purged, %d are unsaved", n, len(m.saving.unsaved[a]))
		}
		f.Mend()
		time.Sleep(time.Minute)
		if isStored(t, a, last) {
			t.Error("it is stored")
		}
	})
}

// Another storage gets everything that is finished, and all that is kept from then on goes to both.
func TestAnotherArchive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<30)
		one, f := openFaulty(t, m, "one")
		f.Set(storagetest.Failing(errStorageAway))
		const reports = 50
		for i := range reports {
			keepFinished(m, i, 100)
		}
		m.keep(numbered(reports), task.NothingYet(time.Now()), kept{ttl: time.Hour})
		other, _ := openFaulty(t, m, "other")
		keepFinished(m, reports+1, 100)
		f.Mend()
		time.Sleep(time.Minute)
		for i := range reports + 2 {
			for name, a := range map[string]*archive.Archive{"one": one, "other": other} {
				if got, want := isStored(t, a, numbered(i)), i != reports; got != want {
					t.Errorf("%d is stored in the %s: %t", i, name, got)
				}
			}
		}
	})
}

// Another storage also gets what has left memory, but is still queued for the one before.
func TestAnotherArchiveGetsTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<20)
		_, f := openFaulty(t, m, "one")
		f.Set(storagetest.Failing(errStorageAway))
		const reports = 50
		for i := range reports {
			keepFinished(m, i, 100<<10)
		}
		if n := m.stats().Entries; n > 10 {
			t.Fatalf("%d reports are in memory", n)
		}
		other, _ := openFaulty(t, m, "other")
		time.Sleep(time.Minute)
		wantAllStored(t, other, reports)
	})
}

// A report that is loaded from an archive is not written to that one again.
func TestLoadedIsNotSavedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := savingMemory(t, 1<<30)
		a, f := openFaulty(t, m, "one")
		keepFinished(m, 1, 100)
		time.Sleep(20 * time.Second) // until the storage has been tried as well
		before := f.Calls(storagetest.Store)
		m.purge(archive.Selection{}.Matches)
		found, err := a.Load(context.Background(), numbered(1), func(int64) error { return nil })
		if err != nil || found.Report == nil {
			t.Fatal(found, err)
		}
		m.keep(numbered(1), found.Report, kept{ttl: time.Hour, from: a})
		time.Sleep(time.Second)
		if n := f.Calls(storagetest.Store) - before; n != 0 {
			t.Errorf("it is written again, %d times", n)
		}
	})
}

// A submission is stored as a reference while the report of its task is kept, and as a document otherwise.
func TestReferences(t *testing.T) {
	m := savingMemory(t, 1<<30)
	target := numbered(1)
	of := keepFinished(m, 1, 100)
	e := m.keep(numbered(2), of.report, kept{ttl: time.Hour, kind: task.Complete, target: &target})
	if i := m.saving.item(e); i.Target != &target || i.Kind != task.Complete || i.Key != numbered(2) || i.Report != of.report {
		t.Errorf("the item is %+v", i)
	}
	other := keepFinished(m, 1, 100) // the task has another report
	if i := m.saving.item(e); i.Target != nil || other.report.Same(of.report) {
		t.Errorf("the item of another report is %+v", i)
	}
	m.purge(archive.Selection{Keys: []task.Key{target}}.Matches)
	if _, ok := m.get(numbered(2)); ok {
		t.Error("the submission is kept although its task is purged")
	}
}

func TestRecentKeys(t *testing.T) {
	var r recentKeys
	r.remove(numbered(0))
	for i := range 10 * maxRecent {
		if k := numbered(i); !r.has(k) {
			r.add(k)
		}
		if !r.has(numbered(i)) || i >= maxRecent && !r.has(numbered(i-maxRecent+1)) {
			t.Fatalf("%d is forgotten", i)
		}
	}
	if n := len(r.young) + len(r.old); n > 2*maxRecent {
		t.Errorf("%d keys are remembered", n)
	}
	for i := 10*maxRecent - maxRecent; i < 10*maxRecent; i++ {
		if r.remove(numbered(i)); r.has(numbered(i)) {
			t.Fatalf("%d is not removed", i)
		}
	}
}

// An archive that is attached while a complete report is kept stores it as such, or not at all.
func TestAttachedWhileKeeping(t *testing.T) {
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			m := savingMemory(t, 1<<30)
			d := inflatedReport(10).Document()
			d.File, d.At = [sha256.Size]byte{1}, time.Now()
			go m.keep(numbered(1), task.NewReport(d), kept{ttl: time.Hour, kind: task.Complete})
			a, _ := openFaulty(t, m, "one")
			time.Sleep(time.Second)
			none := func(int64) error { return nil }
			if found, err := a.Newest(t.Context(), d.File, task.Complete, time.Time{}, none); err != nil || found.Report == nil {
				t.Errorf("the complete report is not found: %v", err)
			}
			if found, err := a.Newest(t.Context(), d.File, task.Summary, time.Time{}, none); err != nil || found.Report != nil {
				t.Errorf("it is found as the high-level one: %v", err)
			}
		})
	}
}
