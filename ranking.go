package fsbroker

import "container/heap"

// ranking is a heap of entries, the one with the least rank in front. It keeps a copy of each rank, because the time of a
// report may change under another key.
type ranking struct {
	ranked []ranked
	place  func(*entry) *place
}

type ranked struct {
	rank  int64
	entry *entry
}

// place is where an entry is in a ranking, counted from 1. It is 0 if the entry is in none.
type place int32

// first returns the entry with the least rank, or nil if there is none.
func (r *ranking) first() *entry {
	if len(r.ranked) == 0 {
		return nil
	}
	return r.ranked[0].entry
}

// set adds an entry, or changes its rank.
func (r *ranking) set(e *entry, rank int64) {
	p := *r.place(e)
	if p == 0 {
		heap.Push((*rankingHeap)(r), ranked{rank, e})
		return
	}
	r.ranked[p-1].rank = rank
	heap.Fix((*rankingHeap)(r), int(p-1))
}

// remove removes an entry, which is in the ranking.
func (r *ranking) remove(e *entry) { heap.Remove((*rankingHeap)(r), int(*r.place(e)-1)) }

// rankingHeap implements heap.Interface.
type rankingHeap ranking

func (h *rankingHeap) Len() int           { return len(h.ranked) }
func (h *rankingHeap) Less(i, j int) bool { return h.ranked[i].rank < h.ranked[j].rank }

func (h *rankingHeap) Swap(i, j int) {
	h.ranked[i], h.ranked[j] = h.ranked[j], h.ranked[i]
	h.setPlace(i)
	h.setPlace(j)
}

func (h *rankingHeap) Push(r any) {
	h.ranked = append(h.ranked, r.(ranked))
	h.setPlace(len(h.ranked) - 1)
}

func (h *rankingHeap) Pop() any {
	last := len(h.ranked) - 1
	r := h.ranked[last]
	h.ranked[last] = ranked{}
	h.ranked = h.ranked[:last]
	*h.place(r.entry) = 0
	return r
}

func (h *rankingHeap) setPlace(i int) {
	*h.place(h.ranked[i].entry) = place(i + 1) //nolint:gosec // memory has no room for that many
}
