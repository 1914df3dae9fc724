package archive

import "time"

// batch collects what was stored until it is written to the index. It is guarded by Archive.mu.
type batch struct {
	places  []place
	newest  time.Time // of the values at the places
	full    []indexObject
	number  int
	writing bool
	timer   *time.Timer
	backoff backoff
}

// indexObject is what an object of the index says: where there are values, and the time of the newest one.
type indexObject struct {
	name   string
	newest time.Time
	places []place
}

func (b *batch) empty() bool { return len(b.places) == 0 && len(b.full) == 0 }

func (b *batch) stop() {
	if b.timer != nil {
		b.timer.Stop()
	}
}
