package archive

import (
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

// trouble is a kind of trouble that the storage has for a while.
type trouble int

const (
	noise   trouble = iota // each operation may go wrong, in any way
	slow                   // all operations are slow
	refuse                 // the storage is away, and says so
	hang                   // the storage is away, and says nothing
	badKeys                // a few values cannot be read or written
	badLock                // locks hang or fail
	badList                // lists fail
	badDel                 // deletions fail, sometimes although they are done
	troubles
)

func (k trouble) String() string {
	return [...]string{"noise", "slow", "refuse", "hang", "bad keys", "bad locks", "bad lists", "bad deletions"}[k]
}

// window is a time in which the storage has trouble.
type window struct {
	kind     trouble
	from, to time.Time
	instance int      // that has the trouble; -1: all
	stuck    bool     // bad names are bad because writes of them hang
	bad      sync.Map // the names that are bad
}

// isBad reports whether a name is bad.
func (w *window) isBad(name string) bool {
	_, bad := w.bad.Load(name)
	return bad
}

// plan says when the storage has which trouble.
type plan struct {
	seed    uint64
	windows []*window
}

// newPlan returns a plan in which times of trouble and calm alternate.
func newPlan(seed uint64, begin time.Time, span time.Duration) *plan {
	p := &plan{seed: seed}
	r := rand.New(rand.NewPCG(seed, 1))
	for at := begin; ; {
		at = at.Add(between(r, 5*time.Minute, 50*time.Minute))
		w := &window{kind: trouble(r.IntN(int(troubles))), from: at, instance: -1, stuck: at.Nanosecond()%2 == 0}
		if r.IntN(3) == 0 {
			w.instance = r.IntN(instances)
		}
		length := between(r, time.Minute, 25*time.Minute)
		if r.IntN(8) == 0 {
			length *= 4
		}
		at = at.Add(length)
		if w.to = at; at.After(begin.Add(span)) {
			return p
		}
		p.windows = append(p.windows, w)
		if r.IntN(4) == 0 { // two at a time
			other := &window{kind: trouble(r.IntN(int(troubles))), from: w.from.Add(length / 3), to: w.to, instance: -1}
			if w.kind == badKeys && other.kind == badKeys {
				other.kind = noise // three bad values are not a few
			}
			p.windows = append(p.windows, other)
		}
	}
}

// between returns a random duration, to the nanosecond: no two events are to fall on the same instant.
func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)))
}

// active calls f for each trouble that an instance has at a time.
func (p *plan) active(instance int, now time.Time, f func(*window)) {
	for _, w := range p.windows {
		if now.After(w.from) && now.Before(w.to) && (w.instance < 0 || w.instance == instance) {
			f(w)
		}
	}
}

// works reports whether the storage is there for an instance for a time, except for a few values.
func (p *plan) works(instance int, from, to time.Time) bool {
	for _, w := range p.windows {
		if w.kind <= hang && w.from.Before(to) && w.to.After(from) && (w.instance < 0 || w.instance == instance) {
			return false
		}
	}
	return true
}

// dice is a hash from which decisions are drawn. It depends on what is decided and on nothing else, above all not on what
// happens at the same time elsewhere.
type dice uint64

func newDice(seed uint64, what, name string, numbers ...int) dice {
	h := fnv.New64a()
	_, _ = h.Write([]byte(what))
	_, _ = h.Write([]byte(name))
	d := dice(h.Sum64() ^ seed*0x9e3779b97f4a7c15)
	for _, n := range numbers {
		d ^= dice(n)
		d = dice(d.next())
	}
	d.next()
	return d
}

func (d *dice) next() uint64 {
	*d += 0x9e3779b97f4a7c15
	z := uint64(*d)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

func (d *dice) below(n int) int { return int(d.next() % uint64(n)) }

func (d *dice) between(from, to time.Duration) time.Duration {
	return from + time.Duration(d.next()%uint64(to-from))
}

// fault decides what happens to a call.
func (p *plan) fault(d dice, instance int, c storagetest.Call) storagetest.Fault {
	f := storagetest.Fault{
		Before: d.between(time.Millisecond, 25*time.Millisecond), After: d.between(time.Millisecond, 13*time.Millisecond),
		Linger: d.between(time.Microsecond, 100*time.Millisecond), // so calls that end with their contexts end one by one
	}
	p.active(instance, c.Begun, func(w *window) { w.spoil(&d, c, &f) })
	return f
}

// spoil lets a call suffer from the trouble.
func (w *window) spoil(d *dice, c storagetest.Call, f *storagetest.Fault) {
	lock := c.Op == storagetest.Lock || c.Op == storagetest.TryLock || c.Op == storagetest.Unlock
	switch w.kind {
	case noise:
		spoilAnyhow(d, d.below(1000), f)
	case slow:
		f.Before += d.between(100*time.Millisecond, 4*time.Second)
	case refuse:
		f.Effect, f.Err = storagetest.None, storagetest.ErrInjected
	case hang:
		if f.Hang, f.Deaf = true, false; d.below(10) == 0 {
			spoilAnyhow(d, 98, f)
		}
		f.Late = d.below(2) == 0
	case badKeys:
		switch {
		case !w.isBad(c.Name):
		case w.stuck && c.Op == storagetest.Store:
			f.Deaf, f.Before = true, d.between(time.Minute, 4*time.Minute)
		case !w.stuck:
			spoilAnyhow(d, []int{10, 40, 90, 98}[d.below(4)], f)
		}
	case badLock:
		switch {
		case !lock:
		case d.below(2) == 0:
			f.Deaf, f.Before = true, d.between(time.Minute, time.Hour)
		default:
			spoilAnyhow(d, 30+d.below(60), f)
		}
	case badList:
		if c.Op == storagetest.List {
			spoilAnyhow(d, 30+d.below(65), f)
		}
	case badDel:
		if c.Op == storagetest.Delete {
			spoilAnyhow(d, d.below(120), f)
		}
	}
}

// spoilAnyhow lets a call go wrong, in a way that depends on n.
func spoilAnyhow(d *dice, n int, f *storagetest.Fault) {
	switch {
	case n < 30:
		f.Before += d.between(500*time.Millisecond, 6*time.Second)
	case n < 55:
		f.Effect, f.Err = storagetest.None, storagetest.ErrInjected
	case n < 70:
		f.Before += d.between(0, 3*time.Second)
		f.Effect, f.Err = storagetest.None, storagetest.ErrInjected
	case n < 83: // done, but reported as failed
		f.After += d.between(0, 3*time.Second)
		f.Err = storagetest.ErrInjected
	case n < 88:
		f.Effect = storagetest.Half
	case n < 95:
		f.Hang, f.Deaf, f.Late = true, false, d.below(2) == 0
	case n < 100:
		f.Hang, f.Deaf, f.Before = false, true, d.between(10*time.Second, 4*time.Minute)
		if d.below(2) == 0 {
			f.Effect, f.Err = storagetest.None, storagetest.ErrInjected
		}
	}
}

// isTrouble reports whether a fault is more than a usual delay.
func isTrouble(f storagetest.Fault) bool {
	return f.Effect != storagetest.Whole || f.Err != nil || f.Hang || f.Deaf || f.Before+f.After > 150*time.Millisecond
}
