package archive

import (
	"math/rand/v2"
	"testing"
)

func newTestBreaker() *breaker { return newBreaker("read", rand.New(rand.NewPCG(1, 2))) }

// The breaker opens only when different keys fail in a row.
func TestBreakerOpens(t *testing.T) {
	b := newTestBreaker()
	for range 10 {
		if b.fail(numbered(0), noon) {
			t.Fatal("a single key opens the breaker")
		}
	}
	b.fail(numbered(1), noon)
	b.succeed()
	for i := range 2 {
		if b.fail(numbered(i), noon) {
			t.Fatal("failures before a success count")
		}
	}
	if b.open() || !b.fail(numbered(2), noon) || !b.open() {
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
		b.fail(numbered(i), noon)
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
		b.fail(numbered(0), now)
	}
	b.abandon()
	if !b.allow(now) {
		t.Error("after an abandoned probe, no other goes through")
	}
	if !b.succeed() || b.open() || !b.allow(now) || !b.allow(now) {
		t.Error("a success does not close the breaker")
	}
}
