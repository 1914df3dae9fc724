package archive

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
)

func newTestBreaker() *breaker { return newBreaker("read", rand.New(rand.NewPCG(1, 2))) }

// The breaker opens only when different keys fail in a row.
func TestBreakerOpens(t *testing.T) {
	b := newTestBreaker()
	for range 10 {
		if b.fail(numbered(0), noon, errAway) {
			t.Fatal("a single key opens the breaker")
		}
	}
	b.fail(numbered(1), noon, errAway)
	b.succeed()
	for i := range 2 {
		if b.fail(numbered(i), noon, errAway) {
			t.Fatal("failures before a success count")
		}
	}
	if b.open() || !b.fail(numbered(2), noon, errAway) || !b.open() {
		t.Error("three keys that fail in a row do not open the breaker")
	}
	select {
	case <-b.done():
	default:
		t.Error("those who wait are not told")
	}
}

// While it is open, one probe goes through at a time, with a pause after each that grows. The first success closes it.
func TestBreakerProbes(t *testing.T) {
	b := newTestBreaker()
	for i := range tripAfter {
		b.fail(numbered(i), noon, errAway)
	}
	now := noon
	for nominal := firstProbe; ; nominal = min(2*nominal, lastProbe) {
		pause := b.untilProbe(now)
		if pause < nominal/2 || pause > nominal {
			t.Errorf("the pause is %s, want %s to %s", pause, nominal/2, nominal)
		}
		if b.allow(now.Add(pause - 1)) {
			t.Error("a probe goes through before its time")
		}
		now = now.Add(pause)
		if !b.allow(now) || b.allow(now) {
			t.Error("not exactly one probe goes through")
		}
		if nominal == lastProbe {
			break
		}
		b.fail(numbered(0), now, errAway)
	}
	b.abandon()
	if !b.allow(now) {
		t.Error("after an abandoned probe, no other goes through")
	}
	if !b.succeed() || b.open() || !b.allow(now) || !b.allow(now) {
		t.Error("a success does not close the breaker")
	}
}

// A storage that cannot be connected to fails for all keys. A lack of what this machine needs to connect says nothing about it.
func TestBreakerOpensWhenRefused(t *testing.T) {
	dial := func(cause error) error {
		return fmt.Errorf("loading: %w", &net.OpError{Op: "dial", Net: "tcp", Err: cause})
	}
	for name, test := range map[string]struct {
		err  error
		want bool
	}{
		"refused":             {dial(os.NewSyscallError("connect", syscall.ECONNREFUSED)), true},
		"no route":            {dial(os.NewSyscallError("connect", syscall.EHOSTUNREACH)), true},
		"no such host":        {dial(&net.DNSError{Err: "no such host", IsNotFound: true}), true},
		"no file descriptors": {dial(os.NewSyscallError("socket", syscall.EMFILE)), false},
		"no ports":            {dial(os.NewSyscallError("connect", syscall.EADDRNOTAVAIL)), false},
		"too slow":            {dial(context.DeadlineExceeded), false},
		"the caller has left": {dial(context.Canceled), false},
		"broken off":          {&net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}, false},
		"another error":       {errors.New("connection refused"), false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTestBreaker()
			if got := b.fail(numbered(0), noon, test.err); got != test.want || b.open() != test.want {
				t.Errorf("one failure: news %v, open %v", got, b.open())
			}
		})
	}
}

// A breaker that timeouts have opened says why the storage fails as soon as that is known, once. A timeout does not hide it.
func TestBreakerKnowsTheCause(t *testing.T) {
	b := newTestBreaker()
	for i := range tripAfter {
		b.fail(numbered(i), noon, errTimeout)
	}
	if b.fail(numbered(0), noon, errTimeout) {
		t.Error("another timeout is news")
	}
	for i, news := range []bool{true, false} {
		if got := b.fail(numbered(i), noon, errAway); got != news {
			t.Errorf("error %d: news %v", i, got)
		}
	}
	if b.fail(numbered(0), noon, errTimeout) || !errors.Is(b.unreadable(), errAway) {
		t.Errorf("after another timeout: %v", b.unreadable())
	}
	if err := b.explain(errTimeout); !errors.Is(err, errAway) || !errors.Is(err, errTimeout) {
		t.Errorf("a timeout is explained as %v", err)
	}
	b.succeed()
	if err := b.explain(errTimeout); err != errTimeout || b.lastError() != nil { //nolint:errorlint // nothing is added
		t.Errorf("after a success: %v, %v", err, b.lastError())
	}
}
