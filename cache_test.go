package fsbroker

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// plainReport is a finished report of size bytes that does not shrink.
func plainReport(size int) *report {
	r := &report{hash: "0123456789abcdef0123456789abcdef", finished: true, plainSize: size}
	r.plain.Store(r.plainForm(slices.Grow([]byte(nil), size)[:size]))
	return r
}

// gzippedReport is one of about size bytes that does.
func gzippedReport(t testing.TB, size int) *report {
	t.Helper()
	r, err := readReport(strings.NewReader(`{"result":{"text":"` + strings.Repeat("x", size) + `"}}`))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func numbered(i int) key { return newKey("test", fmt.Sprint(i)) }

func TestCacheBound(t *testing.T) {
	const limit = 1 << 20
	c := newCache(limit)
	defer c.close()
	for i := range 1000 {
		c.put(numbered(i), plainReport(10<<10), time.Hour)
		if c.used > limit {
			t.Fatalf("%d bytes are used, more than %d", c.used, limit)
		}
	}
	if n := c.kept.ItemCount(); n < 80 || n != c.second.order.Len() {
		t.Errorf("%d are kept, %d in order", n, c.second.order.Len())
	}
	if _, ok := c.get(numbered(999)); !ok {
		t.Error("the last is not kept")
	}

	// What is larger than all there is takes nobody's place, but it takes back what was under its name.
	c.put(numbered(999), plainReport(limit), time.Hour)
	if _, ok := c.get(numbered(999)); ok {
		t.Error("something larger than the cache is kept")
	}
	if _, ok := c.get(numbered(998)); !ok {
		t.Error("others had to go for what is not kept")
	}

	c.setLimit(100 << 10)
	if c.used > 100<<10 {
		t.Errorf("%d bytes are used after the limit was lowered", c.used)
	}
}

func TestCacheKeepsWhatIsAskedForOften(t *testing.T) {
	c := newCache(100 * (1000 + entryOverhead))
	defer c.close()
	for i := range 10_000 {
		c.put(numbered(i), plainReport(1000), time.Hour)
		for popular := range 10 {
			c.get(numbered(popular))
		}
	}
	for popular := range 10 {
		if _, ok := c.get(numbered(popular)); !ok {
			t.Errorf("%d is gone, though it is asked for all the time", popular)
		}
	}
}

func TestCacheReplacesAndExpires(t *testing.T) {
	c := newCache(1 << 20)
	defer c.close()
	first, second := plainReport(10), plainReport(10)
	c.put(numbered(1), first, time.Hour)
	c.put(numbered(1), second, 50*time.Millisecond)
	if e, ok := c.get(numbered(1)); !ok || e.report() != second {
		t.Error("the second has not taken the first one's place")
	}
	if c.used != int64(second.size())+entryOverhead {
		t.Errorf("%d bytes are used by one", c.used)
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

func TestCacheLetsPlainFormsGoFirst(t *testing.T) {
	const n, size = 50, 10 << 10
	s := &store{cache: newCache(1 << 20)}
	defer s.cache.close()
	entries := make([]*entry, n)
	for i := range n {
		r := gzippedReport(t, size)
		entries[i] = s.put(numbered(i), r, time.Hour)
	}
	used := s.used
	for range 3 {
		for i, e := range entries {
			plain, err := s.plain(e)
			if err != nil || len(plain.body) < size {
				t.Fatalf("%d: %d bytes, error %v", i, len(plain.body), err)
			}
		}
	}
	if s.used <= used || s.used > 1<<20 {
		t.Errorf("%d bytes are used, before the plain forms it was %d", s.used, used)
	}
	s.setLimit(used)
	if s.used != used || s.first.order.Len() != 0 || s.second.order.Len() != n {
		t.Errorf("%d bytes are used, want %d; %d plain forms and %d entries are left", s.used, used, s.first.order.Len(), s.second.order.Len())
	}
	for _, e := range entries {
		if e.report().plain.Load() != nil {
			t.Error("a plain form is still there")
		}
	}
}

func TestCacheConcurrently(t *testing.T) {
	s := &store{cache: newCache(200 << 10)}
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 500 {
				k := numbered((i * (worker + 1)) % 100)
				if e, ok := s.get(k); ok {
					if _, err := s.plain(e); err != nil {
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
	s.cache.close()
	if s.used != 0 || s.kept.ItemCount() != 0 || s.first.order.Len() != 0 || s.second.order.Len() != 0 {
		t.Errorf("a closed cache uses %d bytes for %d items", s.used, s.kept.ItemCount())
	}
	s.put(numbered(1), plainReport(10), time.Hour)
	if s.kept.ItemCount() != 0 {
		t.Error("a closed cache keeps something")
	}
}

func TestCacheBoundsHeap(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector makes every allocation larger")
	}
	for _, size := range []int{0, 1 << 10, 15 << 10, 220 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			const limit = 32 << 20
			before := heap()
			c := newCache(limit)
			for i := range 10 * limit / (size + entryOverhead) {
				c.put(numbered(i), plainReport(size), time.Hour)
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
