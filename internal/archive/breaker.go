package archive

import (
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// breaker stops reads for a while after one has failed. Its times are monotonic. The zero value is closed.
type breaker struct{ until atomic.Pointer[time.Time] }

// trip opens the breaker until a time.
func (b *breaker) trip(until time.Time) { b.until.Store(&until) }

// open reports whether the breaker is open.
func (b *breaker) open(now time.Time) bool {
	until := b.until.Load()
	return until != nil && now.Before(*until)
}

// The delay before a failed write is retried. It doubles with each failure in a row.
const (
	firstRetry = 250 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// backoff computes the delay before a retry. The zero value has seen no failure.
type backoff struct{ delay time.Duration }

// next returns the delay after another failure, with jitter: between a half and the whole of the nominal delay.
func (b *backoff) next() time.Duration {
	if b.delay == 0 {
		b.delay = firstRetry
	}
	delay := b.delay
	b.delay = min(2*b.delay, lastRetry)
	return delay/2 + rand.N(delay/2) //nolint:gosec // it need not be unpredictable
}

// reset forgets all failures.
func (b *backoff) reset() { b.delay = 0 }
