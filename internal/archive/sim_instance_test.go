package archive

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// instance is a machine on which an archive runs, with a clock of its own.
type instance struct {
	number int
	live   *incarnation // nil while it does not run

	mu      sync.Mutex
	offsets []offset
}

// offset is by how much a clock is off from a time on.
type offset struct {
	at time.Time
	by time.Duration
}

func (i *instance) now() time.Time { return time.Now().Add(i.offset()) }

func (i *instance) offset() time.Duration {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.offsets[len(i.offsets)-1].by
}

// step sets by how much the clock is off from now on.
func (i *instance) step(by time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.offsets = append(i.offsets, offset{time.Now(), by})
}

// maxOffset returns by how much the clock was fast in the last half hour.
func (i *instance) maxOffset(now time.Time) time.Duration {
	most := -2 * maxSkew
	i.recent(now, func(by time.Duration) { most = max(most, by) })
	return most
}

func (i *instance) minOffset(now time.Time) time.Duration {
	least := 2 * maxSkew
	i.recent(now, func(by time.Duration) { least = min(least, by) })
	return least
}

func (i *instance) recent(now time.Time, f func(by time.Duration)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for n, o := range slices.Backward(i.offsets) {
		if f(o.by); n == 0 || o.at.Before(now.Add(-30*time.Minute)) {
			return
		}
	}
}

// incarnation is an archive, from its start to its end. Its fields are guarded by the mutex of the model.
type incarnation struct {
	sim     *simulation
	inst    *instance
	number  int // of the instance
	id      int
	archive *Archive
	gather  *prometheus.Registry
	views   []*storagetest.Faulty
	backend *Backend

	dead      bool // it has crashed or was closed
	endedAt   time.Time
	draining  bool
	queue     map[task.Key]*copyOf   // that must be stored
	copies    map[task.Key][]*copyOf // of all that was saved
	refused   int
	rooms     int
	gaveUp    int
	keeps     []keeping // the retentions it had
	records   []keeping // the retentions it has told the others
	lockedAt  time.Time // when it took the lock of the sweep, or tried to
	brokenOff time.Time // when its storage worked again
	isBroken  bool

	lastStored  time.Time
	lastFailure map[storagetest.Op]time.Time
	failing     map[storagetest.Op]int // under way
	lastTrouble time.Time
	trouble     map[callID]time.Time // calls under way, with when they began
	pending     map[storagetest.Op]int
	loads       map[storagetest.Op]int // calls of Load, and under List, of Newest
	lastGood    map[storagetest.Op]time.Time
}

type keeping struct {
	at        time.Time
	retention time.Duration
}

func (inc *incarnation) String() string { return fmt.Sprintf("instance %d.%d", inc.number, inc.id) }

// fails reports whether operations failed after a time, or fail now.
func (inc *incarnation) fails(since time.Time, ops ...storagetest.Op) bool {
	return slices.ContainsFunc(ops, func(o storagetest.Op) bool { return inc.failing[o] > 0 || inc.lastFailure[o].After(since) })
}

// troubled reports whether anything was out of the ordinary since some time before another.
func (inc *incarnation) troubled(since time.Time, before time.Duration) bool {
	return len(inc.trouble) > 0 || inc.lastTrouble.After(since.Add(-before)) || inc.broken(since)
}

// hangs reports whether the only trouble since some time before another are calls that have been hanging for long.
func (inc *incarnation) hangs(since time.Time, before time.Duration) bool {
	for _, begun := range inc.trouble {
		if begun.After(since.Add(-2 * writeTimeout)) {
			return false
		}
	}
	return len(inc.trouble) > 0 && !inc.lastTrouble.After(since.Add(-before)) && !inc.broken(since)
}

// broken reports whether the storage of the instance was configured wrongly a short time ago.
func (inc *incarnation) broken(at time.Time) bool {
	return inc.isBroken || at.Before(inc.brokenOff.Add(10*time.Second))
}

func isFailure(f storagetest.Fault) bool {
	return f.Effect != storagetest.Whole || f.Err != nil || f.Hang || f.Deaf || f.Before+f.After > slowRead-time.Millisecond
}

func (inc *incarnation) began(id callID, e storagetest.Event, bad bool) {
	inc.pending[e.Call.Op]++
	if bad {
		return
	}
	if isFailure(e.Fault) {
		inc.failing[e.Call.Op]++
	}
	if isTrouble(e.Fault) {
		inc.trouble[id] = e.Call.Begun
	}
}

func (inc *incarnation) finished(id callID, e storagetest.Event, bad bool) {
	o, now := e.Call.Op, time.Now()
	inc.pending[o]--
	switch {
	case bad && isFailure(e.Fault):
		if inc.lastFailure[o].After(now.Add(-30 * time.Second)) {
			inc.lastFailure[o] = now // together they keep the breaker open
		}
		return
	case bad:
		return
	case isFailure(e.Fault):
		inc.failing[o]--
		inc.lastFailure[o] = now
	}
	if isTrouble(e.Fault) {
		delete(inc.trouble, id)
		inc.lastTrouble = now
	}
}

// recorded notes that the record of the instance was stored, where others see it.
func (inc *incarnation) recorded(now time.Time) {
	inc.records = append(inc.records, keeping{now, inc.keeps[len(inc.keeps)-1].retention})
}

// demands returns how long others must keep values for the instance: as long as it wants, if it has told them for a while
// and could go on telling them.
func (inc *incarnation) demands(now time.Time) time.Duration {
	if inc.dead || !inc.sim.plan.works(inc.number, now.Add(-45*time.Minute), now) || inc.broken(now.Add(-45*time.Minute)) {
		return 0
	}
	least := inc.shortest(now)
	for _, r := range slices.Backward(inc.records) {
		if least = min(least, r.retention); r.at.Before(now.Add(-20 * time.Minute)) {
			return least
		}
	}
	return 0
}

// shortest returns the shortest retention that the instance had in the last half hour.
func (inc *incarnation) shortest(now time.Time) time.Duration {
	least := time.Duration(1 << 62)
	for _, k := range slices.Backward(inc.keeps) {
		if least = min(least, k.retention); k.at.Before(now.Add(-30 * time.Minute)) {
			break
		}
	}
	return least
}

func (inc *incarnation) leave(c *copyOf, now time.Time) {
	c.ended = now
	if inc.queue[c.item.Key] == c {
		delete(inc.queue, c.item.Key)
	}
}

func (inc *incarnation) savedAt(k task.Key, id reportID) (at time.Time) {
	for _, c := range inc.copies[k] {
		if c.id == id {
			at = c.saved
		}
	}
	return at
}

// metric returns the value of a counter.
func (inc *incarnation) metric(name string) int {
	families, err := inc.gather.Gather()
	if err != nil {
		panic(err)
	}
	for _, f := range families {
		if strings.HasSuffix(f.GetName(), name) {
			return int(f.GetMetric()[0].GetCounter().GetValue())
		}
	}
	panic(name)
}
