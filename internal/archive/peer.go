package archive

import (
	"encoding/json"
	"sync"
	"time"
)

// peers is what an instance knows of the others that use the same storage and namespace. Each keeps a record in the
// storage. The longest retention of all that live decides when values are deleted.
type peers struct {
	mu      sync.Mutex // guards the fields below
	longest time.Duration
	beat    int
	renewed time.Time // when the record of this instance was last stored

	seen map[string]*peer // by the name of the record; used by one pass at a time
}

// peer is another instance.
type peer struct {
	text    string // its record
	record  record
	changed time.Time // when its record was last seen to have changed, by the monotonic clock
	warned  bool
}

// record is what an instance says about itself.
type record struct {
	Retention time.Duration `json:"retention_ns"`
	Interval  time.Duration `json:"interval_ns"` // at which the record is renewed
	Beat      int           `json:"beat"`        // grows with each renewal
}

// renewedWithin reports whether the record of this instance was stored at most d ago.
func (ps *peers) renewedWithin(d time.Duration) bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return time.Since(ps.renewed) <= d
}

// meet notes the record of another instance.
func (ps *peers) meet(name, text string) {
	p := ps.seen[name]
	if p == nil {
		p = new(peer)
		ps.seen[name] = p
	}
	if p.text == text {
		return
	}
	p.text, p.changed = text, time.Now()
	if err := json.Unmarshal([]byte(text), &p.record); err != nil {
		p.record = record{} // of another version
	}
}
