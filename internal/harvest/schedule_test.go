package harvest

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// begun is when the tests of the schedule begin.
var begun = time.Unix(1, 0)

func newItem(id int, since time.Time) *item {
	it := &item{Target: Target{ID: ID{SubmitID: fmt.Sprint(id)}}}
	it.since = since
	return it
}

// Of the items that are due, the one that was asked for least recently comes first.
func TestScheduleIsFair(t *testing.T) {
	s := newSchedule(1000, 10)
	now := begun.Add(time.Minute)
	for i, since := range []int{3, 1, 2, 0} {
		it := newItem(i, begun.Add(time.Duration(since)*time.Second))
		s.put(it, "a", begun.Add(time.Duration(i)*time.Second))
	}
	s.put(newItem(9, begun.Add(-time.Hour)), "a", now.Add(time.Second)) // is not due
	var order []string
	for {
		it, wait := s.next(now)
		if it == nil {
			if wait != time.Second {
				t.Errorf("the next is due in %s", wait)
			}
			break
		}
		order = append(order, it.SubmitID)
	}
	if want := []string{"3", "1", "2", "0"}; !slices.Equal(order, want) {
		t.Errorf("the order is %q, want %q", order, want)
	}
}

// Each upstream has its own bounds.
func TestScheduleBounds(t *testing.T) {
	s := newSchedule(100, 5)
	for i := range 20 {
		s.put(newItem(i, begun), "a", begun)
	}
	s.put(newItem(20, begun.Add(time.Second)), "b", begun)
	var lanes []*lane
	for {
		it, wait := s.next(begun)
		if it == nil {
			if wait >= 0 {
				t.Errorf("the next is due in %s, although too many questions are under way", wait)
			}
			break
		}
		lanes = append(lanes, it.lane)
	}
	if len(lanes) != 6 {
		t.Fatalf("%d questions are under way", len(lanes))
	}
	for _, l := range lanes {
		s.done(l)
	}
	now, asked := begun, 6
	for asked < 21 {
		it, wait := s.next(now)
		if it == nil {
			now = now.Add(wait)
			continue
		}
		asked++
		s.done(it.lane)
	}
	if took := now.Sub(begun); took < 100*time.Millisecond || took > 101*time.Millisecond {
		t.Errorf("20 questions took %s", took)
	}
}

// The next time is that of the upstream that is due first.
func TestScheduleWaits(t *testing.T) {
	s := newSchedule(100, 5)
	for i := range 10 {
		s.put(newItem(i, begun), fmt.Sprint(i), begun.Add(time.Duration(1+(i+5)%10)*time.Second))
	}
	for range 20 { // in any order
		if it, wait := s.next(begun); it != nil || wait != time.Second {
			t.Fatalf("%v is due, the next in %s", it, wait)
		}
	}
}

// An item that is put again has moved, and one that was removed is not asked for.
func TestScheduleMoves(t *testing.T) {
	s := newSchedule(100, 5)
	first, second := newItem(1, begun), newItem(2, begun.Add(1))
	s.put(first, "a", begun)
	s.put(second, "a", begun)
	s.put(first, "b", begun.Add(time.Second))
	if it, _ := s.next(begun); it != second {
		t.Errorf("the first one is %v", it)
	}
	s.remove(first)
	s.remove(first)
	if it, wait := s.next(begun.Add(time.Hour)); it != nil || wait >= 0 {
		t.Errorf("%v is left", it)
	}
}

// FuzzSchedule compares a schedule with what it must do, whatever happens in whatever order.
func FuzzSchedule(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
	f.Add([]byte{0, 0, 0, 0, 4, 4, 4, 4, 3, 3, 3, 3, 200, 201, 202, 203, 1, 2})
	f.Fuzz(func(t *testing.T, ops []byte) {
		const perSecond, inFlight = 100, 3
		s := newSchedule(perSecond, inFlight)
		now := begun
		scheduled := make(map[*item]bool)
		var items, flying []*item
		asked := make(map[*lane][]time.Time)
		for _, op := range ops {
			n := int(op >> 3)
			switch op % 8 {
			case 0, 1:
				it := newItem(len(items), now)
				items = append(items, it)
				s.put(it, fmt.Sprint(op%2), now.Add(time.Duration(n)*time.Millisecond))
				scheduled[it] = true
			case 2:
				if len(items) > 0 {
					it := items[n%len(items)]
					s.remove(it)
					delete(scheduled, it)
				}
			case 3:
				if len(flying) > 0 {
					s.done(flying[0].lane)
					flying = flying[1:]
				}
			default:
				now = now.Add(time.Duration(n) * time.Millisecond)
				it, wait := s.next(now)
				if it == nil {
					checkIdle(t, scheduled, flying, now, wait, inFlight)
					continue
				}
				if !scheduled[it] || it.due.After(now) {
					t.Fatal("an item is asked for that is not due")
				}
				for other := range scheduled {
					if other.lane == it.lane && !other.due.After(now) && other.since.Before(it.since) {
						t.Fatal("another item is due that was asked for before")
					}
				}
				delete(scheduled, it)
				flying = append(flying, it)
				asked[it.lane] = append(asked[it.lane], now)
			}
		}
		for _, times := range asked {
			for i := range times {
				last := i + perSecond + burst
				if last < len(times) && times[last].Sub(times[i]) < time.Second {
					t.Fatal("too much is asked in a second")
				}
			}
		}
	})
}

// checkIdle checks that there is a reason why nothing is asked.
func checkIdle(t *testing.T, scheduled map[*item]bool, flying []*item, now time.Time, wait time.Duration, inFlight int) {
	count := make(map[*lane]int)
	for _, it := range flying {
		count[it.lane]++
	}
	for it := range scheduled {
		switch {
		case count[it.lane] > inFlight:
			t.Fatal("too many questions are under way")
		case count[it.lane] == inFlight:
		case wait < 0:
			t.Fatal("nothing is waited for although there is something to ask")
		case it.due.After(now) && it.due.Sub(now) < wait:
			t.Fatal("it is waited for too long")
		case !it.due.After(now) && wait > 20*time.Millisecond:
			t.Fatal("the rate is lower than it may be")
		}
	}
}
