package archive

import (
	"testing"
	"time"
)

func TestQueueOrder(t *testing.T) {
	var q queue
	for i := range 3 {
		if !q.push(numbered(i), report(100)) {
			t.Fatal("there is no room")
		}
	}
	if q.len() != 3 || q.bytes != 300 || q.front().key != numbered(0) {
		t.Errorf("%d values of %d bytes", q.len(), q.bytes)
	}
	newer := report(50)
	q.push(numbered(0), newer) // takes the place of the older value
	if w := q.front(); w.key != numbered(0) || w.report != newer || q.len() != 3 || q.bytes != 250 {
		t.Errorf("%d values of %d bytes, the first is %v", q.len(), q.bytes, w)
	}
	q.postpone(numbered(0))
	if q.front().key != numbered(1) {
		t.Error("a postponed value is still in front")
	}
	if !q.remove(numbered(1)) || q.remove(numbered(1)) || q.get(numbered(1)) != nil || q.front().key != numbered(2) {
		t.Error("a removed value is still there")
	}
	for _, k := range q.keys() {
		q.remove(k)
	}
	if q.len() != 0 || q.bytes != 0 || q.front() != nil {
		t.Errorf("an empty queue has %d values of %d bytes", q.len(), q.bytes)
	}
	q.postpone(numbered(9)) // is not there
}

func TestQueueIsBounded(t *testing.T) {
	var q queue
	n := 0
	for q.push(numbered(n), report(2<<20)) {
		n++
	}
	if n != maxQueueBytes/(2<<20) {
		t.Errorf("%d values of 2 MiB have room", n)
	}
	if !q.push(numbered(0), report(2<<20)) {
		t.Error("a newer value does not replace one in a full queue")
	}

	var many queue
	n = 0
	for many.push(numbered(n), report(1)) {
		n++
	}
	if n != maxQueue {
		t.Errorf("%d small values have room", n)
	}
}

func TestBreaker(t *testing.T) {
	var b breaker
	now := time.Now()
	if b.open(now) {
		t.Error("a new breaker is open")
	}
	b.trip(now.Add(time.Second))
	if !b.open(now) || !b.open(now.Add(999*time.Millisecond)) || b.open(now.Add(time.Second)) {
		t.Error("the breaker is not open for a second")
	}
}

func TestBackoff(t *testing.T) {
	var b backoff
	for nominal := firstRetry; ; nominal = min(2*nominal, lastRetry) {
		if delay := b.next(); delay < nominal/2 || delay >= nominal {
			t.Errorf("the delay is %s, want %s to %s", delay, nominal/2, nominal)
		}
		if nominal == lastRetry {
			break
		}
	}
	b.reset()
	if delay := b.next(); delay >= firstRetry {
		t.Errorf("after a reset the delay is %s", delay)
	}
}

// A value without room is refused, logged once, and has room again after the queue is stored.
func TestFullQueue(t *testing.T) {
	f := newFixture(t)
	release := make(chan struct{})
	f.backend.Storage = &stuckStorage{f.storage, release}
	n := 0
	for f.Save(numbered(n), report(2<<20)) {
		n++
	}
	if f.Save(numbered(n+1), report(2<<20)) {
		t.Error("a full queue has room")
	}
	if logged := f.logged("the queue to the storage is full"); logged != 1 {
		t.Errorf("logged %d times", logged)
	}
	close(release)
	if err := f.Drain(t.Context(), f.backend); err != nil {
		t.Error(err)
	}
	if f.storage.len() != n || f.logged("the queue to the storage is empty again") != 1 {
		t.Errorf("%d of %d values are stored", f.storage.len(), n)
	}
	if !f.Save(numbered(n), report(2<<20)) {
		t.Error("an empty queue has no room")
	}
}
