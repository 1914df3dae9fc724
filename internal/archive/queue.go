package archive

import (
	"container/heap"
	"container/list"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// The queue absorbs bursts and short outages of the storage. What does not fit stays in memory and is queued again when
// there is room.
const (
	maxQueue      = 10_000
	maxQueueBytes = 64 << 20
)

// Item is a report to be stored.
type Item struct {
	Key    task.Key
	Report *task.Report

	// Kind is which report of its task it is.
	Kind task.Kind

	// Target is the key under which the report itself is stored: Key becomes a reference to it. If it is nil, the report is
	// stored under Key.
	Target *task.Key
}

// write is an item on its way to the storage.
type write struct {
	Item
	newer    *Item // replaces the item when the write under way returns
	underway bool
	removed  bool // while the write was under way: it is not retried

	tries     int           // that have failed
	failedAt  time.Time     // the last one that counts, see giveUpAfter
	failedFor time.Duration // how long they have failed while others were stored
	retryAt   time.Time
	backoff   backoff
	reported  bool // that the storage does not take it

	fresh *list.Element // in queue.fresh
	index int           // in queue.failed
}

// queue holds the items that wait to be stored, at most one for each key, and those whose writes are under way. Each has its
// own time for the next try. The zero value is empty. It is not safe for use by several goroutines.
type queue struct {
	byKey  map[task.Key]*write
	fresh  list.List // of *write: those that have not failed, the next one in front
	failed retries   // by the time of the next try
	bytes  int       // of all reports that are held, including those that are being replaced
	turn   uint      // of next
}

// retries implements heap.Interface.
type retries []*write

func (r retries) Len() int           { return len(r) }
func (r retries) Less(i, j int) bool { return r[i].retryAt.Before(r[j].retryAt) }
func (r retries) Swap(i, j int) {
	r[i], r[j] = r[j], r[i]
	r[i].index, r[j].index = i, j
}

func (r *retries) Push(w any) {
	w.(*write).index = len(*r)
	*r = append(*r, w.(*write))
}

func (r *retries) Pop() any {
	last := len(*r) - 1
	w := (*r)[last]
	(*r)[last] = nil
	*r = (*r)[:last]
	return w
}

func (q *queue) len() int { return len(q.byKey) }

// push adds an item, or replaces the one under the same key. An item whose write is under way is replaced when that
// returns. It reports whether there is room: if not, nothing is replaced. An empty queue has room for any item.
func (q *queue) push(i Item) bool {
	w := q.byKey[i.Key]
	bytes := q.bytes + i.Report.Size()
	if w != nil {
		bytes -= w.replaceable()
	}
	if w == nil && q.len() >= maxQueue || bytes > maxQueueBytes && bytes > i.Report.Size() {
		return false
	}
	q.bytes = bytes
	switch {
	case w == nil:
		q.add(&write{Item: i})
	case w.underway:
		w.newer = &i
	default:
		w.Item = i
	}
	return true
}

// add adds a write that has not failed.
func (q *queue) add(w *write) {
	if q.byKey == nil {
		q.byKey = make(map[task.Key]*write)
	}
	q.byKey[w.Key] = w
	w.fresh = q.fresh.PushBack(w)
}

// replaceable returns the size of the report that a newer one replaces. One that is being written is held until that
// returns.
func (w *write) replaceable() int {
	switch {
	case w.newer != nil:
		return w.newer.Report.Size()
	case w.underway:
		return 0
	}
	return w.Report.Size()
}

// latest returns the newest item under the key of the write.
func (w *write) latest() *Item {
	if w.newer != nil {
		return w.newer
	}
	return &w.Item
}

// get returns the newest item under a key, or nil.
func (q *queue) get(k task.Key) *Item {
	if w := q.byKey[k]; w != nil && !w.dropped() {
		return w.latest()
	}
	return nil
}

// newest returns the item with the newest report of a file, or nil.
func (q *queue) newest(sum [32]byte, kind task.Kind) (newest *Item) {
	for _, w := range q.byKey {
		i := w.latest()
		if i.Kind != kind || i.Report.File() != sum || w.dropped() {
			continue
		}
		if newest == nil || i.Report.At().After(newest.Report.At()) {
			newest = i
		}
	}
	return newest
}

// items returns the newest item of each key, in no order.
func (q *queue) items() []Item {
	items := make([]Item, 0, q.len())
	for _, w := range q.byKey {
		if !w.dropped() {
			items = append(items, *w.latest())
		}
	}
	return items
}

// dropped reports whether nothing is left to store when the write under way returns.
func (w *write) dropped() bool { return w.removed && w.newer == nil }

// next returns the next write, which is under way then. Those that have not failed come first: they say most about the
// storage, and nothing that the storage refuses holds them up. Others are due at their time, and only if retry is set; then
// every fourth write is one of them. It returns nil if there is none.
func (q *queue) next(now time.Time, retry bool) *write {
	front := q.fresh.Front()
	due := retry && len(q.failed) > 0 && !now.Before(q.failed[0].retryAt)
	var w *write
	switch q.turn++; {
	case front != nil && (!due || q.turn%4 != 0):
		w = q.fresh.Remove(front).(*write)
		w.fresh = nil
	case due:
		w = heap.Pop(&q.failed).(*write)
	default:
		return nil
	}
	w.underway = true
	return w
}

// retryAt returns the time of the next retry, if there is one.
func (q *queue) retryAt() (time.Time, bool) {
	if len(q.failed) == 0 {
		return time.Time{}, false
	}
	return q.failed[0].retryAt, true
}

// finish removes a write that has returned, or goes on with the newer item.
func (q *queue) finish(w *write) {
	q.bytes -= w.Report.Size()
	if w.newer == nil {
		delete(q.byKey, w.Key)
		return
	}
	*w = write{Item: *w.newer}
	q.add(w)
}

// retry schedules another try of a write that has failed.
func (q *queue) retry(w *write, at time.Time) {
	if w.newer != nil {
		q.bytes -= w.Report.Size()
		w.Item, w.newer = *w.newer, nil
	}
	w.underway, w.removed, w.retryAt = false, false, at
	heap.Push(&q.failed, w)
}

// flush makes all retries due.
func (q *queue) flush(now time.Time) {
	for _, w := range q.failed {
		w.retryAt = now
	}
}

// remove removes the items that match and returns how many there were. Writes under way go on, but are not retried.
func (q *queue) remove(match func(Item) bool) (n int) {
	for k, w := range q.byKey {
		if w.dropped() || !match(*w.latest()) {
			continue
		}
		n++
		if w.underway {
			if w.newer != nil {
				q.bytes -= w.newer.Report.Size()
				w.newer = nil
			}
			w.removed = true
			continue
		}
		if w.fresh != nil {
			q.fresh.Remove(w.fresh)
		} else {
			heap.Remove(&q.failed, w.index)
		}
		q.bytes -= w.Report.Size()
		delete(q.byKey, k)
	}
	return n
}

// underway reports whether a write is under way whose item matches.
func (q *queue) underway(match func(Item) bool) bool {
	for _, w := range q.byKey {
		if w.underway && match(w.Item) {
			return true
		}
	}
	return false
}
