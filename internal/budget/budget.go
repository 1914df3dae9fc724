// Package budget bounds the memory of a cache. What is kept, what is being sent although it is not kept any more, and what is
// being read all count against one limit.
package budget

import (
	"errors"
	"sync"
)

// ErrNoRoom means that there is no memory for more, because of what is being read and sent.
var ErrNoRoom = errors.New("the reports that are being read and sent use up the memory for them")

// Budget counts the memory of a cache, in bytes, against a limit. Make one with New.
type Budget struct {
	mu    sync.Locker // of the cache
	small int64
	evict func() bool

	limit, kept, sending, reading int64 // guarded by mu
	decoders                      Share
}

// New returns a budget with the limit 0. It shares mu with the cache, and holds it when it calls evict. That evicts something
// that is kept, and reports whether there was anything. An answer of up to small bytes always has room, so that none of an
// ordinary size is refused.
func New(mu sync.Locker, small int64, evict func() bool) *Budget {
	return &Budget{mu: mu, small: small, evict: evict}
}

// Usage is what is counted, in bytes.
type Usage struct{ Limit, Kept, Sending, Reading int64 }

// Usage returns what is counted. The caller holds the mutex.
func (b *Budget) Usage() Usage { return Usage{b.limit, b.kept, b.sending, b.reading} }

// SetLimit changes the limit, and evicts what is too much then. The caller holds the mutex.
func (b *Budget) SetLimit(limit int64) {
	b.limit = limit
	b.MakeRoom(0)
}

// AddKept adds to what is kept, or subtracts from it. The caller holds the mutex.
func (b *Budget) AddKept(size int64) { b.kept += size }

// AddSending adds to what is being sent although it is not kept, or subtracts from it. The caller holds the mutex.
func (b *Budget) AddSending(size int64) { b.sending += size }

// MakeRoom evicts until there is room for size bytes, and reports whether there is. The caller holds the mutex.
func (b *Budget) MakeRoom(size int64) bool {
	for b.kept+b.sending+b.reading+size > b.limit {
		if !b.evict() {
			return false
		}
	}
	return true
}

// BeginCopy reserves memory for a copy of something that is kept, and reports whether there is room. A copy that is not small
// may have an eighth of the limit. A small one has room whatever is being read from upstreams and storages. Only what callers
// hold, and what inflates documents for them, can leave it without room.
func (b *Budget) BeginCopy(size int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if size > max(b.limit/8, b.small) {
		return false
	}
	fits := b.MakeRoom(size) || size <= b.small && b.kept+b.sending+b.decoders.reading+size <= b.limit
	if fits {
		b.reading += size
	}
	return fits
}

// EndCopy undoes BeginCopy. The caller holds the mutex.
func (b *Budget) EndCopy(size int64) { b.reading -= size }

// Share is what is being read from one source, such as an upstream or a storage. The zero value is nothing.
type Share struct{ reading int64 } // guarded by Budget.mu

// Reservation is the memory of one thing that is being read, such as an answer.
type Reservation struct {
	budget *Budget
	share  *Share
	size   int64
}

// Reserve returns a reservation of nothing, which is going to be a part of a share. It must be released.
func (b *Budget) Reserve(s *Share) *Reservation { return &Reservation{budget: b, share: s} }

// ReserveDecoder is like Reserve, for what inflates a document while it is sent. All decoders have one share.
func (b *Budget) ReserveDecoder() *Reservation { return b.Reserve(&b.decoders) }

// Grow extends the reservation to size bytes. The error is ErrNoRoom. A small reservation always has room, and so has one beside
// which the cache holds nothing. The others of a share may together take as much as they leave free (dynamic thresholds,
// Choudhury and Hahne, 1998). So an upstream that floods, or stalls, never takes everything, and neither do callers that read
// slowly.
func (r *Reservation) Grow(size int64) error {
	more := size - r.size
	if more <= 0 {
		return nil
	}
	b := r.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	small, alone := size <= b.small, b.sending == 0 && b.reading == r.size
	if !small && !alone && r.share.reading+more > b.limit-b.sending-b.reading-more {
		return ErrNoRoom
	}
	fits := b.MakeRoom(more)
	if empty := alone && b.kept == 0; !small && !fits && !empty { // callers hold what is kept
		return ErrNoRoom
	}
	b.reading += more
	r.share.reading += more
	r.size = size
	return nil
}

// Release returns the reservation.
func (r *Reservation) Release() {
	b := r.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading -= r.size
	r.share.reading -= r.size
	r.size = 0
}
