package archive

import (
	"container/list"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// The queue absorbs bursts and short outages of the storage. What does not fit stays in memory and is queued again when
// it is requested.
const (
	maxQueue      = 10_000
	maxQueueBytes = 64 << 20
)

// write is a report that waits to be stored.
type write struct {
	key    task.Key
	report *task.Report
}

// queue holds the values that wait to be stored, at most one for each key. The zero value is empty. It is not safe for
// use by several goroutines.
type queue struct {
	order list.List // of *write, the next one in front
	byKey map[task.Key]*list.Element
	bytes int
}

func (q *queue) len() int { return q.order.Len() }

// push adds a value, or replaces the one under the same key. It reports whether there is room.
func (q *queue) push(k task.Key, report *task.Report) bool {
	if element, ok := q.byKey[k]; ok {
		q.bytes += report.Size() - element.Value.(*write).report.Size()
		element.Value = &write{key: k, report: report}
		return true
	}
	if q.len() >= maxQueue || q.bytes+report.Size() > maxQueueBytes {
		return false
	}
	if q.byKey == nil {
		q.byKey = make(map[task.Key]*list.Element)
	}
	q.byKey[k] = q.order.PushBack(&write{key: k, report: report})
	q.bytes += report.Size()
	return true
}

// front returns the next write, or nil if the queue is empty.
func (q *queue) front() *write {
	if front := q.order.Front(); front != nil {
		return front.Value.(*write)
	}
	return nil
}

// get returns the write of a key, or nil.
func (q *queue) get(k task.Key) *write {
	if element, ok := q.byKey[k]; ok {
		return element.Value.(*write)
	}
	return nil
}

// postpone moves the write of a key to the end.
func (q *queue) postpone(k task.Key) {
	if element, ok := q.byKey[k]; ok {
		q.order.MoveToBack(element)
	}
}

// remove removes the write of a key and reports whether there was one.
func (q *queue) remove(k task.Key) bool {
	element, ok := q.byKey[k]
	if !ok {
		return false
	}
	q.order.Remove(element)
	delete(q.byKey, k)
	q.bytes -= element.Value.(*write).report.Size()
	return true
}

// keys returns the keys of all writes.
func (q *queue) keys() []task.Key {
	keys := make([]task.Key, 0, len(q.byKey))
	for k := range q.byKey {
		keys = append(keys, k)
	}
	return keys
}
