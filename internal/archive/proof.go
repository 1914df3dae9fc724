package archive

import (
	"sync"
	"time"
)

// proofAge is for how long it is believed that the storage works.
const proofAge = time.Second

// proof is when the storage was last known to work, by the monotonic clock.
type proof struct {
	mu        sync.Mutex
	at        time.Time
	suspicion chan struct{} // see suspect; nil while there is none
}

// note notes that the storage worked at a time.
func (p *proof) note(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at.After(p.at) {
		p.at = at
	}
}

// holds reports whether the storage has worked lately.
func (p *proof) holds(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return now.Sub(p.at) < proofAge
}
