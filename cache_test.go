package fsbroker

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// reports counts the reports of inflatedReport, no two of which are the same.
var reports atomic.Int64

// inflatedReport returns a finished report of size bytes that is not compressed.
func inflatedReport(size int) *task.Report {
	return task.NewReport(task.Document{
		Hash: fmt.Sprintf("%032x", reports.Add(1)), Length: size, Body: slices.Grow([]byte(nil), size)[:size],
	})
}

// gzippedReport returns a finished report of about size bytes that is compressed.
func gzippedReport(t testing.TB, size int) *task.Report {
	t.Helper()
	r, err := task.ReadReport(strings.NewReader(`{"result":{"text":"`+strings.Repeat("x", size)+`"}}`), func(int64) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func numbered(i int) task.Key { return task.NewKey("test", fmt.Sprint(i)) }

// usage returns what counts as memory.
func (m *memory) usage() budget.Usage {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.budget.Usage()
}

func TestCacheBound(t *testing.T) {
	const limit = 1 << 20
	c := newMemory(limit)
	defer c.close()
	for i := range 1000 {
		c.keep(numbered(i), inflatedReport(10<<10), kept{ttl: time.Hour})
		if c.usage().Kept > limit {
			t.Fatalf("%d bytes are used, more than %d", c.usage().Kept, limit)
		}
	}
	if n := c.kept.ItemCount(); n < 80 || n != c.entries {
		t.Errorf("%d are kept, %d are in the eviction order", n, c.entries)
	}
	if _, ok := c.get(numbered(999)); !ok {
		t.Error("the newest is not kept")
	}

	// A value that is larger than the cache evicts nothing, but replaces the one under its key.
	c.keep(numbered(999), inflatedReport(limit), kept{ttl: time.Hour})
	if _, ok := c.get(numbered(999)); ok {
		t.Error("a value that is larger than the cache is kept")
	}
	if _, ok := c.get(numbered(998)); !ok {
		t.Error("others were evicted for a value that is not kept")
	}

	c.setLimit(100 << 10)
	if c.usage().Kept > 100<<10 {
		t.Errorf("%d bytes are used after the limit was lowered", c.usage().Kept)
	}
}

func TestCacheKeepsWhatIsRequestedOften(t *testing.T) {
	c := newMemory(100 * (1000 + entryOverhead))
	defer c.close()
	for i := range 10_000 {
		c.keep(numbered(i), inflatedReport(1000), kept{ttl: time.Hour})
		for popular := range 10 {
			c.get(numbered(popular))
		}
	}
	for popular := range 10 {
		if _, ok := c.get(numbered(popular)); !ok {
			t.Errorf("%d is gone, although it is requested all the time", popular)
		}
	}
}

func TestCacheReplacesAndExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newMemory(1 << 20)
		defer c.close()
		first, second := inflatedReport(10), inflatedReport(10)
		c.keep(numbered(1), first, kept{ttl: time.Hour})
		c.keep(numbered(1), second, kept{ttl: 50 * time.Millisecond})
		if e, ok := c.get(numbered(1)); !ok || e.report != second {
			t.Error("the second has not replaced the first")
		}
		if c.usage().Kept != int64(second.Size())+entryOverhead {
			t.Errorf("one value uses %d bytes", c.usage().Kept)
		}
		time.Sleep(50 * time.Millisecond)
		synctest.Wait()
		if c.usage().Kept != 0 || c.kept.ItemCount() != 0 {
			t.Errorf("%d bytes in %d items are still there", c.usage().Kept, c.kept.ItemCount())
		}
	})
}

// Whatever is kept, renewed and removed, in any order, each entry leaves memory when its own TTL is over.
func TestEntriesExpireInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		m := newMemory(1 << 30)
		defer m.close()
		const names = 50
		documents := make([]task.Document, names)
		ends := make(map[int]time.Time)
		for range 20_000 {
			i := random.IntN(names)
			switch {
			case random.IntN(10) == 0:
				m.purge(archive.Selection{Keys: []task.Key{numbered(i)}}.Matches)
				delete(ends, i)
			default:
				if documents[i].Hash == "" || random.IntN(2) == 0 { // else the same again
					documents[i] = inflatedReport(10).Document()
				}
				ttl := time.Duration(random.IntN(1000)+1) * time.Millisecond
				m.keep(numbered(i), task.NewReport(documents[i]), kept{ttl: ttl})
				ends[i] = time.Now().Add(ttl)
			}
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
			synctest.Wait()
			maps.DeleteFunc(ends, func(_ int, end time.Time) bool { return !end.After(time.Now()) })
			if stats := m.stats(); stats.Entries != len(ends) || m.kept.ItemCount() != len(ends) {
				t.Fatalf("%d entries, %d items, want %d", stats.Entries, m.kept.ItemCount(), len(ends))
			}
			for i := range ends {
				if _, ok := m.get(numbered(i)); !ok {
					t.Fatalf("%d is gone", i)
				}
			}
		}
	})
}

// Many entries whose TTLs are over at once leave together.
func TestManyExpireAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(1 << 30)
		defer m.close()
		for i := range 2*maxExpired + 1 {
			m.keep(numbered(i), inflatedReport(10), kept{ttl: time.Second})
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if stats := m.stats(); stats.Entries != 0 {
			t.Errorf("%d are left", stats.Entries)
		}
	})
}

// Both forms of a report are in one eviction order, and both count.
func TestCacheEvictsInOneOrder(t *testing.T) {
	const n, size = 20, 50 << 10
	m := newMemory(10 << 20)
	defer m.close()
	entries := make([]*entry, n)
	for i := range n {
		entries[i] = m.keep(numbered(i), gzippedReport(t, size), kept{ttl: time.Hour})
	}
	compressed := m.stats().Bytes
	for range 2 {
		for i, e := range entries {
			f, err := m.inflatedForm(e)
			if err != nil || f == nil || len(f.rep.Body) < size {
				t.Fatalf("%d: %v, error %v", i, f, err)
			}
			m.release(&f.form)
		}
	}
	if used := m.stats().Bytes; used < compressed+n*size || used > compressed+n*(size+100) {
		t.Errorf("%d bytes are used, %d before they were inflated", used, compressed)
	}
	for i := n / 2; i < n; i++ { // these are requested, in the form that is inflated
		f, _ := m.inflatedForm(entries[i])
		m.release(&f.form)
	}
	m.setLimit(compressed + n/2*(size+100))
	left := 0
	for i, e := range entries {
		if e.inflated.Load() == nil {
			continue
		}
		if left++; i < n/2 {
			t.Errorf("the copy of %d is left, which was not requested again", i)
		}
	}
	if left < n/2-1 || m.stats().Bytes > m.usage().Limit {
		t.Errorf("%d copies are left, %d bytes of %d", left, m.stats().Bytes, m.usage().Limit)
	}
}

// A large document is inflated piece by piece for the first caller, and copied for the second, if there is room.
func TestInflatedCopiesPay(t *testing.T) {
	m := newMemory(8 << 20)
	defer m.close()
	e := m.keep(numbered(1), gzippedReport(t, 500<<10), kept{ttl: time.Hour})
	if f, err := m.inflatedForm(e); f != nil || err != nil {
		t.Errorf("the first caller gets a copy, error %v", err)
	}
	f, err := m.inflatedForm(e)
	if f == nil || err != nil {
		t.Fatalf("the second caller gets no copy, error %v", err)
	}
	if again, _ := m.inflatedForm(e); again != f {
		t.Error("the third caller gets another copy")
	}
	large := m.keep(numbered(2), gzippedReport(t, 2<<20), kept{ttl: time.Hour})
	for range 3 {
		if f, err := m.inflatedForm(large); f != nil || err != nil {
			t.Errorf("a copy of a quarter of the memory is made, error %v", err)
		}
	}
}

// Callers that need the same report inflated at the same time share one copy.
func TestInflatedOnce(t *testing.T) {
	m := newMemory(64 << 20)
	defer m.close()
	for i := range 20 {
		e := m.keep(numbered(i), gzippedReport(t, 1<<20), kept{ttl: time.Hour})
		_, _ = m.inflatedForm(e) // a copy pays from now on
		var copies sync.Map
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				f, err := m.inflatedForm(e)
				if f == nil || err != nil {
					t.Errorf("no copy, error %v", err)
					return
				}
				copies.Store(f, true)
				m.release(&f.form)
			})
		}
		wg.Wait()
		n := 0
		copies.Range(func(any, any) bool { n++; return true })
		if n != 1 {
			t.Errorf("%d copies were made", n)
		}
	}
}

// What slow callers hold counts once each until the last has it, whatever becomes of the entry.
func TestSlowCallersCountOnce(t *testing.T) {
	m := newMemory(1 << 20)
	defer m.close()
	e := m.keep(numbered(1), inflatedReport(100<<10), kept{ttl: time.Hour})
	size := e.whole.size()
	for range 24 {
		m.acquire(&e.whole)
	}
	if stats := m.stats(); stats.Sending != 0 || stats.Bytes != size {
		t.Errorf("kept: %+v", stats)
	}
	m.purge(archive.Selection{}.Matches)
	m.acquire(&e.whole) // one that came before
	if stats := m.stats(); stats.Sending != size || stats.Bytes != stats.Sending {
		t.Errorf("not kept: %+v", stats)
	}
	for range 24 {
		m.release(&e.whole)
	}
	if stats := m.stats(); stats.Sending != size {
		t.Errorf("one caller is left: %+v", stats)
	}
	m.release(&e.whole)
	if stats := m.stats(); stats.Bytes != 0 {
		t.Errorf("none is left: %+v", stats)
	}

	// What was never kept counts as well.
	never := unkept(inflatedReport(100 << 10))
	m.acquire(&never.whole)
	if stats := m.stats(); stats.Sending != size {
		t.Errorf("never kept: %+v", stats)
	}
	m.release(&never.whole)
	if stats := m.stats(); stats.Bytes != 0 {
		t.Errorf("after that: %+v", stats)
	}
}

// To evict what callers hold would free nothing.
func TestWhatIsHeldIsNotEvicted(t *testing.T) {
	const size = 104 << 10 // which Go's allocator does not round up
	m := newMemory(5 * (size + entryOverhead))
	defer m.close()
	for i := range 5 {
		e := m.keep(numbered(i), inflatedReport(size), kept{ttl: time.Hour})
		m.acquire(&e.whole)
		defer m.release(&e.whole)
	}
	if e := m.keep(numbered(5), inflatedReport(size), kept{ttl: time.Hour}); !e.unkept {
		t.Error("a sixth report is kept")
	}
	if stats := m.stats(); stats.Entries != 5 || stats.Bytes > stats.Limit {
		t.Errorf("%+v", stats)
	}
}

// The same document again keeps the bytes, and their place.
func TestSameDocumentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(1 << 20)
		defer m.close()
		first := m.keep(numbered(1), gzippedReport(t, 1000), kept{ttl: 50 * time.Millisecond})
		before := m.stats()
		again := m.keep(numbered(1), gzippedReport(t, 1000), kept{ttl: time.Hour})
		if again != first || m.stats() != before {
			t.Errorf("another entry: %+v, before %+v", m.stats(), before)
		}
		time.Sleep(100 * time.Millisecond) // beyond the first TTL
		if e, ok := m.get(numbered(1)); !ok || e != first {
			t.Error("it was not renewed")
		}
	})
}

// A report that is larger than the memory is inflated for one caller at a time.
func TestOneDecoderAlwaysHasRoom(t *testing.T) {
	m := newMemory(64 << 10)
	defer m.close()
	digits := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(digits)
	report, err := task.ReadReport(strings.NewReader(fmt.Sprintf(`{"result":{"text":"%x"}}`, digits)), func(int64) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	e := m.keep(numbered(1), report, kept{ttl: time.Hour})
	for range 2 {
		c, err := m.acquireContent(e, true)
		if err != nil || c.decoder == nil {
			t.Fatalf("the only caller gets %+v, error %v", c, err)
		}
		if stats := m.stats(); stats.Reading != task.DecoderMemory || stats.Sending != e.whole.size() {
			t.Errorf("%+v", stats)
		}
		if _, err := m.acquireContent(e, true); err == nil {
			t.Error("there is room for another")
		}
		m.releaseContent(c)
		if stats := m.stats(); stats.Bytes != 0 {
			t.Errorf("after that: %+v", stats)
		}
	}
}

// A small report is inflated for a caller although large answers that are being read take all memory, until what callers hold
// takes it.
func TestSmallCopiesDoNotWaitForReading(t *testing.T) {
	m := newMemory(1 << 20)
	defer m.close()
	reading := m.budget.Reserve(new(budget.Share))
	if reading.Grow(2<<20) != nil {
		t.Fatal("the only answer has no room")
	}
	defer reading.Release()
	if _, err := m.acquireContent(unkept(gzippedReport(t, 100<<10)), true); err == nil {
		t.Error("there is room for a large report")
	}
	held := 0
	for {
		c, err := m.acquireContent(unkept(gzippedReport(t, 50<<10)), true)
		if err != nil {
			break
		}
		defer m.releaseContent(c)
		if held++; m.stats().Sending > m.usage().Limit {
			t.Fatalf("%d callers hold %+v", held, m.stats())
		}
	}
	if held < 20 {
		t.Errorf("only %d callers get a report", held)
	}
}

func TestCacheConcurrently(t *testing.T) {
	m := newMemory(200 << 10)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 500 {
				k := numbered((i * (worker + 1)) % 100)
				e, ok := m.get(k)
				if !ok {
					e = m.keep(k, gzippedReport(t, 4000), kept{ttl: time.Duration(i%5+1) * time.Millisecond})
				}
				m.acquire(&e.whole)
				f, err := m.inflatedForm(e)
				if err != nil {
					t.Error(err)
				}
				if f != nil {
					m.release(&f.form)
				}
				m.release(&e.whole)
				r := m.budget.Reserve(new(budget.Share))
				_ = r.Grow(1000)
				r.Release()
			}
		})
	}
	wg.Wait()
	m.close()
	if stats := m.stats(); stats.Bytes != 0 || stats.Entries != 0 || m.kept.ItemCount() != 0 || m.order.length != 0 || m.usage().Kept != 0 {
		t.Errorf("a closed cache: %+v, %d items", stats, m.kept.ItemCount())
	}
	m.keep(numbered(1), inflatedReport(10), kept{ttl: time.Hour})
	if m.kept.ItemCount() != 0 {
		t.Error("a closed cache keeps a value")
	}
}

func TestCacheBoundsHeap(t *testing.T) {
	SkipUnlessSlow(t)
	if raceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	for _, size := range []int{0, 1 << 10, 15 << 10, 220 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			const limit = 32 << 20
			before := heapInUse()
			c := newMemory(limit)
			for i := range 10 * limit / (size + entryOverhead) {
				d := inflatedReport(size).Document()
				d.File = [32]byte(numbered(i))
				c.keep(numbered(i), task.NewReport(d), kept{ttl: time.Hour})
			}
			taken := heapInUse() - before
			t.Logf("%d entries take %.1f MiB of heap, %d bytes each beside the document", c.kept.ItemCount(), float64(taken)/(1<<20), taken/int64(c.kept.ItemCount())-int64(size))
			if taken > limit {
				t.Errorf("a cache of %d MiB takes %.1f MiB", limit>>20, float64(taken)/(1<<20))
			}
			c.close()
		})
	}
}

// The overhead suffices for what entries cost at worst: go-cache's map is emptiest after this many have come and gone, and two
// reports of each file cost more than one or three.
func TestEntryOverhead(t *testing.T) {
	SkipUnlessSlow(t)
	if raceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	const n, size = 24_000, 80
	before := heapInUse()
	m := newMemory(n * (size + entryOverhead))
	defer m.close()
	for i := range 20 * n {
		d := inflatedReport(size).Document()
		d.File = [32]byte(numbered(i / 2))
		target := numbered(-i - 1)
		m.keep(numbered(i), task.NewReport(d), kept{ttl: time.Hour, target: &target})
	}
	each := (heapInUse()-before)/int64(m.entries) - size
	t.Logf("%d entries cost %d bytes each beside the document", m.entries, each)
	if m.entries != n || each > entryOverhead {
		t.Errorf("%d bytes are counted, and %d entries should be kept", entryOverhead, n)
	}
}

func heapInUse() int64 { return int64(heapAfterCollection().HeapAlloc) }

// heapAfterCollection returns the memory after two collections, because what a sync.Pool holds survives the first.
func heapAfterCollection() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}
