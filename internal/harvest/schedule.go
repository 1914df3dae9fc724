package harvest

import (
	"container/heap"
	"time"

	"golang.org/x/time/rate"
)

// The bounds of the questions to one upstream. 10,000 pending targets, each of which is asked for every 24 to 27 seconds,
// take 390 questions a second. The rest is for those that are new, or have just finished: 100 a second of each, or all at
// once. With more, all delays grow alike.
//
// An upstream gets 64 questions at a time at the most, so some remain for callers.
const (
	questionsPerSecond = 750
	maxInFlight        = 48

	// burst is how many questions may be asked at once after a pause.
	burst = 10
)

// schedule decides what is asked for next. Each upstream has its own bounds. Of the items that are due, the one that was
// asked for least recently comes first: so items whose delay is short cannot hold up the others when there is more to ask
// than the bounds allow. It is not safe for use by several goroutines.
type schedule struct {
	perSecond rate.Limit
	inFlight  int
	lanes     map[string]*lane // by upstream
}

// lane has the items of one upstream.
type lane struct {
	limiter *rate.Limiter
	flying  int   // questions under way
	waiting queue // items that may not be due yet
	ready   queue // items that are due
}

// place is where an item is in the schedule. The zero value is nowhere.
type place struct {
	lane  *lane
	queue *queue
	index int
	due   time.Time
	since time.Time // when the item was asked for, or earlier if it is urgent
}

func newSchedule(perSecond, inFlight int) *schedule {
	return &schedule{perSecond: rate.Limit(perSecond), inFlight: inFlight, lanes: make(map[string]*lane)}
}

// put schedules an item, or moves it.
func (s *schedule) put(it *item, upstream string, due time.Time) {
	s.remove(it)
	l := s.lanes[upstream]
	if l == nil {
		l = &lane{
			limiter: rate.NewLimiter(s.perSecond, min(burst, int(s.perSecond))),
			waiting: queue{less: func(p, q *item) bool { return p.due.Before(q.due) }},
			ready:   queue{less: func(p, q *item) bool { return p.since.Before(q.since) }},
		}
		s.lanes[upstream] = l
	}
	it.lane, it.due = l, due
	l.waiting.add(it)
}

// remove removes an item if it is scheduled.
func (s *schedule) remove(it *item) {
	if it.queue != nil {
		it.queue.remove(it)
	}
}

// next returns the item that may be asked for now, which must end with done. If there is none, it returns how long it takes
// until there may be one, unless that depends on the end of a question; then wait is negative.
func (s *schedule) next(now time.Time) (best *item, wait time.Duration) {
	wait = -1
	for _, l := range s.lanes {
		it, after := l.next(now, s.inFlight)
		switch {
		case it != nil && (best == nil || it.since.Before(best.since)):
			best = it
		case it == nil && after >= 0 && (wait < 0 || after < wait):
			wait = after
		}
	}
	if best == nil {
		return nil, wait
	}
	best.queue.remove(best)
	best.lane.limiter.AllowN(now, 1)
	best.lane.flying++
	return best, 0
}

// done notes that the question for an item has ended.
func (s *schedule) done(l *lane) { l.flying-- }

// next returns the item of the lane that may be asked for now, without removing it. See schedule.next.
func (l *lane) next(now time.Time, inFlight int) (*item, time.Duration) {
	for first := l.waiting.first(); first != nil && !first.due.After(now); first = l.waiting.first() {
		l.waiting.remove(first)
		l.ready.add(first)
	}
	it := l.ready.first()
	switch tokens := l.limiter.TokensAt(now); {
	case l.flying >= inFlight:
		return nil, -1
	case it != nil && tokens >= 1:
		return it, 0
	case it != nil:
		missing := (1 - tokens) / float64(l.limiter.Limit())
		return nil, time.Duration(missing*float64(time.Second)) + time.Microsecond
	}
	if it = l.waiting.first(); it != nil {
		return nil, it.due.Sub(now)
	}
	return nil, -1
}

// queue is a heap of items.
type queue struct {
	items []*item
	less  func(p, q *item) bool
}

func (q *queue) first() *item {
	if len(q.items) == 0 {
		return nil
	}
	return q.items[0]
}

func (q *queue) add(it *item) {
	it.queue = q
	heap.Push((*queueHeap)(q), it)
}

func (q *queue) remove(it *item) {
	heap.Remove((*queueHeap)(q), it.index)
	it.queue = nil
}

// queueHeap implements heap.Interface.
type queueHeap queue

func (h *queueHeap) Len() int           { return len(h.items) }
func (h *queueHeap) Less(i, j int) bool { return h.less(h.items[i], h.items[j]) }
func (h *queueHeap) Swap(i, j int) {
	h.items[i], h.items[j] = h.items[j], h.items[i]
	h.items[i].index, h.items[j].index = i, j
}

func (h *queueHeap) Push(it any) {
	it.(*item).index = len(h.items)
	h.items = append(h.items, it.(*item))
}

func (h *queueHeap) Pop() any {
	last := len(h.items) - 1
	it := h.items[last]
	h.items[last] = nil
	h.items = h.items[:last]
	return it
}
