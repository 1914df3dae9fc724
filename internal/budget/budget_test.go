package budget

import (
	"errors"
	"sync"
	"testing"
)

const (
	small = 64 << 10
	large = 4 << 20
)

// newBudget returns a budget with a limit, and something that is kept, which can be evicted in steps of a small size.
func newBudget(limit, kept int64) *Budget {
	var b *Budget
	b = New(new(sync.Mutex), small, func() bool {
		if b.Usage().Kept == 0 {
			return false
		}
		b.AddKept(-min(small, b.Usage().Kept))
		return true
	})
	b.SetLimit(limit)
	b.AddKept(kept)
	return b
}

// fits reports whether there is room for a new reservation.
func fits(t *testing.T, b *Budget, s *Share, size int64) bool {
	t.Helper()
	err := b.Reserve(s).Grow(size)
	if err != nil && !errors.Is(err, ErrNoRoom) {
		t.Errorf("unexpected error %v", err)
	}
	return err == nil
}

// An upstream leaves as much as it takes, so one that stalls or floods does not keep out the others.
func TestReservations(t *testing.T) {
	const limit = 64 << 20
	b := newBudget(limit, limit-large)
	var sick, healthy Share
	taken := 0
	for fits(t, b, &sick, large) {
		taken += large
	}
	if taken > limit/2+large || taken < limit/2-large {
		t.Errorf("one upstream takes %d MiB of %d", taken>>20, limit>>20)
	}
	if !fits(t, b, &healthy, large) {
		t.Error("another upstream has no room")
	}
	for range 100 {
		if !fits(t, b, &sick, small) {
			t.Fatal("a small answer has no room")
		}
	}
	if u := b.Usage(); u.Kept+u.Reading > limit+100*small {
		t.Errorf("%+v", u)
	}
}

// What is larger than the limit is read if there is nothing else.
func TestOnlyReservation(t *testing.T) {
	b := newBudget(1<<20, 1<<19)
	var s Share
	r := b.Reserve(&s)
	if err := r.Grow(10 << 20); err != nil {
		t.Error("the only answer has no room")
	}
	if err := r.Grow(5 << 20); err != nil || b.Usage().Reading != 10<<20 {
		t.Errorf("growing to less: %v, %+v", err, b.Usage())
	}
	if fits(t, b, new(Share), large) {
		t.Error("there is room for another")
	}
	r.Release()
	r.Release()
	if u := b.Usage(); u.Reading != 0 || s.reading != 0 {
		t.Errorf("%+v, share %d", u, s.reading)
	}
}

// What is being sent cannot be evicted, and a copy leaves the most part to others.
func TestCopies(t *testing.T) {
	b := newBudget(1<<20, 1<<20)
	if b.BeginCopy(1<<17+1) || !b.BeginCopy(1<<17) || b.Usage().Reading != 1<<17 {
		t.Errorf("a copy may have more than an eighth, or has no room: %+v", b.Usage())
	}
	b.EndCopy(1 << 17)
	b.AddSending(1 << 20)
	if b.BeginCopy(small) || b.Usage() != (Usage{Limit: 1 << 20, Sending: 1 << 20}) {
		t.Errorf("a copy has room beside what is being sent: %+v", b.Usage())
	}
	b.AddSending(-small)
	if err := b.Reserve(new(Share)).Grow(small); err != nil || !b.BeginCopy(small) {
		t.Error("a small copy waits for what is being read")
	}
	if err := b.ReserveDecoder().Grow(small); err != nil || b.BeginCopy(small) {
		t.Error("a small copy does not wait for decoders")
	}
}
