package archive

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func item(i, size int) Item { return Item{Key: numbered(i), Report: report(size)} }

func TestQueueOrder(t *testing.T) {
	var q queue
	for i := range 3 {
		if !q.push(item(i, 100)) {
			t.Fatal("there is no room")
		}
	}
	newer := item(0, 50)
	q.push(newer) // takes the place of the older one
	if q.len() != 3 || q.bytes != 250 || q.get(numbered(0)).Report != newer.Report {
		t.Errorf("%d items of %d bytes", q.len(), q.bytes)
	}
	first := q.next(noon, true)
	if first.Report != newer.Report {
		t.Error("the first item is not the first to be written")
	}
	q.retry(first, noon.Add(time.Second))
	second := q.next(noon, true)
	third := q.next(noon, true)
	if second.Key != numbered(1) || third.Key != numbered(2) {
		t.Error("a failed write holds up the others")
	}
	if w := q.next(noon, true); w != nil {
		t.Errorf("%v is written although it is not due", w.Key)
	}
	if at, ok := q.retryAt(); !ok || !at.Equal(noon.Add(time.Second)) {
		t.Errorf("the next retry is at %s", at)
	}
	if w := q.next(noon.Add(time.Second), false); w != nil {
		t.Error("a failed write is retried although no retry is wanted")
	}
	q.finish(second)
	if w := q.next(noon.Add(time.Second), true); w != first {
		t.Error("a failed write is not retried when it is due")
	}
	q.finish(first)
	q.finish(third)
	if q.len() != 0 || q.bytes != 0 {
		t.Errorf("an empty queue has %d items of %d bytes", q.len(), q.bytes)
	}
}

// A newer item has no more room than a new one.
func TestQueueReplacesWithinItsBounds(t *testing.T) {
	var q queue
	n := 0
	for q.push(item(n, 1<<20)) {
		n++
	}
	w := q.next(noon, true)
	if n != maxQueueBytes>>20 || q.push(item(1, 2<<20)) || q.push(item(0, 1<<20)) || q.bytes > maxQueueBytes {
		t.Errorf("%d items of %d bytes", n, q.bytes)
	}
	if !q.push(item(1, 1<<20)) || q.get(numbered(1)).Report.Size() != 1<<20 {
		t.Error("an item of the same size does not replace another")
	}
	q.finish(w)
	if !q.push(item(1, 2<<20)) || q.bytes != maxQueueBytes {
		t.Errorf("there is no room when a write has ended: %d bytes", q.bytes)
	}
}

// An item whose write is under way is not written a second time before that has returned: the older one could win.
func TestQueueReplacesWhatIsUnderWay(t *testing.T) {
	var q queue
	q.push(item(0, 100))
	w := q.next(noon, true)
	newer := item(0, 300)
	q.push(newer)
	if q.len() != 1 || q.bytes != 400 || q.next(noon, true) != nil {
		t.Errorf("%d items of %d bytes", q.len(), q.bytes)
	}
	q.finish(w)
	if w := q.next(noon, true); w == nil || w.Report != newer.Report {
		t.Fatal("the newer item is not written")
	}

	var failing queue
	failing.push(item(0, 100))
	w = failing.next(noon, true)
	failing.push(newer)
	failing.retry(w, noon)
	if w := failing.next(noon, true); w == nil || w.Report != newer.Report || failing.bytes != 300 {
		t.Error("the older item is retried")
	}
}

func TestQueueRemove(t *testing.T) {
	var q queue
	for i := range 4 {
		q.push(item(i, 100))
	}
	underway, failed := q.next(noon, true), q.next(noon, true)
	q.retry(failed, noon)
	wanted := []task.Key{numbered(0), numbered(1), numbered(2)}
	match := func(i Item) bool { return slices.Contains(wanted, i.Key) }
	if n := q.remove(match); n != 3 || q.len() != 2 || q.get(numbered(0)) != nil || !q.underway(match) {
		t.Errorf("%d removed, %d left", n, q.len())
	}
	if n := q.remove(match); n != 0 {
		t.Errorf("%d removed twice", n)
	}
	if !underway.dropped() {
		t.Error("a removed item is retried")
	}
	q.push(item(0, 50)) // saved again before the write has returned
	if underway.dropped() || q.get(numbered(0)) == nil {
		t.Error("an item that was saved after the removal is dropped")
	}
	q.finish(underway)
	if q.len() != 2 || q.bytes != 150 || q.underway(match) {
		t.Errorf("%d items of %d bytes", q.len(), q.bytes)
	}
	for _, k := range []task.Key{numbered(3), numbered(0)} {
		if w := q.next(noon, true); w == nil || w.Key != k {
			t.Errorf("%+v is written", w)
		}
	}
	if w := q.next(noon, true); w != nil {
		t.Errorf("%v is written although it was removed", w.Key)
	}
}

func TestQueueIsBounded(t *testing.T) {
	var q queue
	n := 0
	for q.push(item(n, 2<<20)) {
		n++
	}
	if n != maxQueueBytes/(2<<20) {
		t.Errorf("%d items of 2 MiB have room", n)
	}
	if !q.push(item(0, 2<<20)) {
		t.Error("a newer item does not replace one in a full queue")
	}
	var many queue
	n = 0
	for many.push(item(n, 1)) {
		n++
	}
	if n != maxQueue {
		t.Errorf("%d small items have room", n)
	}
	var one queue
	if large := item(0, maxQueueBytes+1); !one.push(large) || one.push(item(1, 1)) {
		t.Error("the largest item has no room, or others beside it")
	}
}

func TestQueueFlush(t *testing.T) {
	var q queue
	q.push(item(0, 1))
	q.retry(q.next(noon, true), noon.Add(time.Hour))
	q.flush(noon)
	if q.next(noon, true) == nil {
		t.Error("after a flush, a retry is not due")
	}
}

// FuzzQueue compares the queue with a simple model, which knows the newest report of each key.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{0, 1, 2, 8, 8, 16, 17, 24, 25, 0, 0, 32, 33, 8, 8, 8})
	f.Fuzz(func(t *testing.T, steps []byte) {
		var q queue
		var underway []*write
		latest := make(map[task.Key]*task.Report)
		end := func(i byte, done bool) {
			if len(underway) == 0 {
				return
			}
			n := int(i) % len(underway)
			w := underway[n]
			underway = slices.Delete(underway, n, n+1)
			if done || w.dropped() {
				if latest[w.Key] == w.Report {
					delete(latest, w.Key)
				}
				q.finish(w)
				return
			}
			q.retry(w, noon.Add(time.Duration(i)*time.Second))
		}
		for _, step := range steps {
			k := numbered(int(step % 8))
			switch step / 8 % 5 {
			case 0:
				i := Item{Key: k, Report: report(int(step))}
				q.push(i)
				latest[k] = i.Report
			case 1:
				if w := q.next(noon.Add(time.Duration(step)*time.Second), step%2 == 0); w != nil {
					for _, other := range underway {
						if other.Key == w.Key {
							t.Fatal("a key is written twice at once")
						}
					}
					underway = append(underway, w)
				}
			case 2:
				end(step, true)
			case 3:
				end(step, false)
			case 4:
				q.remove(func(i Item) bool { return i.Key == k })
				delete(latest, k)
			}
			for k, want := range latest {
				if got := q.get(k); got == nil || got.Report != want {
					t.Fatalf("the queue has lost the newest report")
				}
			}
		}
		for len(underway) > 0 {
			end(0, true)
		}
		q.flush(noon)
		for w := q.next(noon, true); w != nil; w = q.next(noon, true) {
			q.finish(w)
		}
		if q.len() != 0 || q.bytes != 0 {
			t.Errorf("in the end there are %d items of %d bytes", q.len(), q.bytes)
		}
	})
}

// A drain does not write the index again and again to a storage that refuses it.
func TestDrainToAStorageThatRefusesTheIndex(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty := storagetest.NewFaulty(storagetest.New(storagetest.Redis))
		a := New(Config{Namespace: "tested"})
		defer a.Close()
		b := &Backend{Storage: faulty.Storage(), Logger: zap.NewNop(), Retention: 24 * time.Hour}
		a.Attach(b)
		a.Save(item(1, 10))
		time.Sleep(time.Second)
		writes := 0
		faulty.Set(func(c storagetest.Call) storagetest.Fault { // one call at a time
			if c.Op != storagetest.Store {
				return storagetest.Fault{}
			}
			writes++
			return storagetest.Fault{Effect: storagetest.None, Err: storagetest.ErrInjected, Hang: writes > 1000}
		})
		if err := a.Drain(b); err == nil || writes > 10 {
			t.Errorf("%d writes, %v", writes, err)
		}
		faulty.Mend()
	})
}
