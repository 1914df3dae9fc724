package fsbroker

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// inflatedReport returns a finished report of size bytes that is not compressed.
func inflatedReport(size int) *task.Report {
	return task.NewReport(task.Document{
		Hash: "0123456789abcdef0123456789abcdef", Length: size, Body: slices.Grow([]byte(nil), size)[:size],
	})
}

// gzippedReport returns a finished report of about size bytes that is compressed.
func gzippedReport(t testing.TB, size int) *task.Report {
	t.Helper()
	r, err := task.ReadReport(strings.NewReader(`{"result":{"text":"` + strings.Repeat("x", size) + `"}}`))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func numbered(i int) task.Key { return task.NewKey("test", fmt.Sprint(i)) }

func TestCacheBound(t *testing.T) {
	const limit = 1 << 20
	c := newMemory(limit)
	defer c.close()
	for i := range 1000 {
		c.put(numbered(i), inflatedReport(10<<10), time.Hour)
		if c.used > limit {
			t.Fatalf("%d bytes are used, more than %d", c.used, limit)
		}
	}
	if n := c.kept.ItemCount(); n < 80 || n != c.entries.order.Len() {
		t.Errorf("%d are kept, %d are in the eviction order", n, c.entries.order.Len())
	}
	if _, ok := c.get(numbered(999)); !ok {
		t.Error("the newest is not kept")
	}

	// A value that is larger than the cache evicts nothing, but replaces the one under its key.
	c.put(numbered(999), inflatedReport(limit), time.Hour)
	if _, ok := c.get(numbered(999)); ok {
		t.Error("a value that is larger than the cache is kept")
	}
	if _, ok := c.get(numbered(998)); !ok {
		t.Error("others were evicted for a value that is not kept")
	}

	c.setLimit(100 << 10)
	if c.used > 100<<10 {
		t.Errorf("%d bytes are used after the limit was lowered", c.used)
	}
}

func TestCacheKeepsWhatIsRequestedOften(t *testing.T) {
	c := newMemory(100 * (1000 + entryOverhead))
	defer c.close()
	for i := range 10_000 {
		c.put(numbered(i), inflatedReport(1000), time.Hour)
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
	c := newMemory(1 << 20)
	defer c.close()
	first, second := inflatedReport(10), inflatedReport(10)
	c.put(numbered(1), first, time.Hour)
	c.put(numbered(1), second, 50*time.Millisecond)
	if e, ok := c.get(numbered(1)); !ok || e.report != second {
		t.Error("the second has not replaced the first")
	}
	if c.used != int64(second.Size())+entryOverhead {
		t.Errorf("one value uses %d bytes", c.used)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		used, items := c.used, c.kept.ItemCount()
		c.mu.Unlock()
		if used == 0 && items == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes in %d items are still there", used, items)
		}
	}
}

func TestCacheEvictsInflatedCopiesFirst(t *testing.T) {
	const n, size = 50, 10 << 10
	s := newMemory(1 << 20)
	defer s.close()
	entries := make([]*entry, n)
	for i := range n {
		r := gzippedReport(t, size)
		entries[i] = s.put(numbered(i), r, time.Hour)
	}
	used := s.used
	for range 3 {
		for i, e := range entries {
			inflated, err := s.inflate(e)
			if err != nil || len(inflated.Body) < size {
				t.Fatalf("%d: %d bytes, error %v", i, len(inflated.Body), err)
			}
		}
	}
	if s.used <= used || s.used > 1<<20 {
		t.Errorf("%d bytes are used, before they were inflated it was %d", s.used, used)
	}
	s.setLimit(used)
	if s.used != used || s.inflated.order.Len() != 0 || s.entries.order.Len() != n {
		t.Errorf("%d bytes are used, want %d; %d inflated copies and %d entries are left", s.used, used, s.inflated.order.Len(), s.entries.order.Len())
	}
	for _, e := range entries {
		if _, made, err := e.report.Inflate(); !made || err != nil {
			t.Errorf("an inflated copy is still there, error %v", err)
		}
	}
}

func TestCacheConcurrently(t *testing.T) {
	s := newMemory(200 << 10)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 500 {
				k := numbered((i * (worker + 1)) % 100)
				if e, ok := s.get(k); ok {
					if _, err := s.inflate(e); err != nil {
						t.Error(err)
					}
					continue
				}
				r := gzippedReport(t, 4000)
				s.put(k, r, time.Duration(i%5+1)*time.Millisecond)
			}
		})
	}
	wg.Wait()
	s.close()
	if s.used != 0 || s.kept.ItemCount() != 0 || s.inflated.order.Len() != 0 || s.entries.order.Len() != 0 {
		t.Errorf("a closed cache uses %d bytes for %d items", s.used, s.kept.ItemCount())
	}
	s.put(numbered(1), inflatedReport(10), time.Hour)
	if s.kept.ItemCount() != 0 {
		t.Error("a closed cache keeps a value")
	}
}

func TestCacheBoundsHeap(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	for _, size := range []int{0, 1 << 10, 15 << 10, 220 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			const limit = 32 << 20
			before := heap()
			c := newMemory(limit)
			for i := range 10 * limit / (size + entryOverhead) {
				c.put(numbered(i), inflatedReport(size), time.Hour)
			}
			taken := heap() - before
			t.Logf("%d entries take %.1f MiB of heap, %d bytes each beside the document", c.kept.ItemCount(), float64(taken)/(1<<20), taken/int64(c.kept.ItemCount())-int64(size))
			if taken > limit {
				t.Errorf("a cache of %d MiB takes %.1f MiB", limit>>20, float64(taken)/(1<<20))
			}
			c.close()
		})
	}
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
