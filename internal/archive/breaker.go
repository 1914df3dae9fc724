package archive

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// backoff computes the delay before a retry. The zero value has seen no failure.
type backoff struct{ delay time.Duration }

// next returns the delay after another failure, which doubles from first to last, with jitter: between a half and the whole
// of the nominal delay.
func (b *backoff) next(first, last time.Duration, jitter *rand.Rand) time.Duration {
	b.delay = min(max(2*b.delay, first), last)
	return b.delay/2 + time.Duration(jitter.Int64N(int64(b.delay/2)))
}

const (
	// tripAfter is the number of different keys that must fail in a row: a single value that fails says nothing about the
	// storage. A connection that cannot be made says enough.
	tripAfter = 3

	firstProbe = 250 * time.Millisecond
	lastProbe  = 5 * time.Second
)

// breaker keeps operations from a storage that fails. It opens when operations on different keys fail in a row, or when the
// storage cannot be connected to. While it is open, it lets one operation through at a time, as a probe, with a growing pause
// after each. The first success closes it. Its times are monotonic.
type breaker struct {
	operation string

	mu      sync.Mutex
	jitter  *rand.Rand
	failed  []task.Key    // different keys that have failed in a row, up to tripAfter
	cause   error         // the last error since the last success; a timeout does not replace another error
	opened  chan struct{} // closed while the breaker is open
	isOpen  bool
	probing bool
	probeAt time.Time
	pause   backoff
}

func newBreaker(operation string, jitter *rand.Rand) *breaker {
	return &breaker{operation: operation, jitter: jitter, opened: make(chan struct{})}
}

// allow reports whether an operation may begin. It must end with succeed, fail or abandon.
func (b *breaker) allow(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.isOpen && (b.probing || now.Before(b.probeAt)) {
		return false
	}
	b.probing = b.isOpen
	return true
}

// open reports whether the breaker is open.
func (b *breaker) open() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.isOpen
}

// done returns a channel that is closed while the breaker is open.
func (b *breaker) done() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.opened
}

// untilProbe returns the time until the next probe may begin.
func (b *breaker) untilProbe(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return max(0, b.probeAt.Sub(now))
}

// succeed notes a success and reports whether that closes the breaker.
func (b *breaker) succeed() (closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	closed = b.isOpen
	if closed {
		b.opened = make(chan struct{})
	}
	b.failed, b.cause, b.isOpen, b.probing, b.pause = b.failed[:0], nil, false, false, backoff{}
	return closed
}

// fail notes that an operation on a key has failed, and reports whether that is news: it opens the breaker, or says why the
// storage fails after nothing but timeouts has.
func (b *breaker) fail(k task.Key, now time.Time, err error) (news bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	timeout, known := errors.Is(err, errTimeout), b.cause != nil && !errors.Is(b.cause, errTimeout)
	if !timeout || !known {
		b.cause = err
	}
	if b.isOpen {
		b.probing = false
		b.probeAt = now.Add(b.pause.next(firstProbe, lastProbe, b.jitter))
		return !timeout && !known
	}
	if !slices.Contains(b.failed, k) {
		b.failed = append(b.failed, k)
	}
	if len(b.failed) < tripAfter && !isRefusal(err) {
		return false
	}
	b.isOpen = true
	b.probeAt = now.Add(b.pause.next(firstProbe, lastProbe, b.jitter))
	close(b.opened)
	return true
}

// lastError returns the last error since the last success, or nil.
func (b *breaker) lastError() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cause
}

// explain adds to a timeout what the storage said before, since it last worked.
func (b *breaker) explain(err error) error {
	cause := b.lastError()
	if cause == nil || !errors.Is(err, errTimeout) || errors.Is(cause, errTimeout) {
		return err
	}
	return fmt.Errorf("%w; before that: %w", err, cause)
}

// unreadable returns the error for callers while the breaker is open. It says why.
func (b *breaker) unreadable() error {
	cause := b.lastError()
	if cause == nil { // it works again
		return ErrUnreadable
	}
	return fmt.Errorf("%w: %w", ErrUnreadable, cause)
}

// abandon notes that an operation has ended without an outcome.
func (b *breaker) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probing = false
}

// probeNow makes the next probe due, with short pauses after it.
func (b *breaker) probeNow() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probeAt, b.pause = time.Time{}, backoff{}
}

// isRefusal reports whether an error says that the storage cannot be connected to. So it concerns all values. A lack of file
// descriptors, ports or memory of this machine says nothing about the storage.
func isRefusal(err error) bool {
	network, ok := errors.AsType[*net.OpError](err)
	if !ok || network.Op != "dial" || network.Timeout() {
		return false
	}
	return !slices.ContainsFunc([]error{
		context.Canceled, syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM,
	}, func(local error) bool { return errors.Is(err, local) })
}
