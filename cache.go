package fsbroker

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"sync"
	"sync/atomic"
	"time"

	gocache "github.com/patrickmn/go-cache"

	"github.com/caddyserver/caddy/v2"
)

// Cache says what is kept of the nodes' answers, and for how long. All `fsbroker_task` handlers of a process share one
// cache, which lives on when the configuration is reloaded.
type Cache struct {
	// How long memory keeps a finished report, and what a submission resolved to. Neither ever changes: the time is
	// there to bound memory. Default: `24h`
	TTL caddy.Duration `json:"ttl,omitempty"`

	// How many bytes all that is kept may take, bookkeeping included. When it is more, what is asked for least goes
	// first. Where handlers differ, the largest counts. Default: 268435456 (256 MiB)
	MaxSize int64 `json:"max_size,omitempty"`

	// A storage that keeps finished reports, and what submissions resolved to, beyond the process, and shares them
	// with all instances that use it: any `caddy.storage` module, or `{}` for the storage that the server is
	// configured with. Reports are confidential, and are compressed, but not encrypted: protect it. Default: none
	StorageRaw json.RawMessage `json:"storage,omitempty" caddy:"namespace=caddy.storage inline_key=module"`

	// How long the storage keeps a report, where there is one. Default: `720h` (30 days)
	Retention caddy.Duration `json:"retention,omitempty"`
}

const (
	defaultTTL       = 24 * time.Hour
	defaultMaxSize   = 256 << 20
	defaultRetention = 30 * 24 * time.Hour
)

// key names what is kept: a hash, so that every key costs the same, however long the IDs in it are.
type key [sha256.Size]byte

// newKey hashes parts so that no two lists of parts run into one.
func newKey(parts ...string) key {
	buf := make([]byte, 0, 512)
	for _, part := range parts {
		buf = binary.AppendUvarint(buf, uint64(len(part)))
		buf = append(buf, part...)
	}
	return sha256.Sum256(buf)
}

// reportKey is the key of a report: the high-level and the complete one of a task are two. A node goes by its address,
// since two sites may give different nodes one name.
func reportKey(nodeAddress, taskID string, all bool) key {
	if all {
		return newKey("complete report", nodeAddress, taskID)
	}
	return newKey("report", nodeAddress, taskID)
}

// submissionKey is the key of what a submission resolved to.
func submissionKey(brokerAddress, submitID string) key {
	return newKey("submission", brokerAddress, submitID)
}

// entryOverhead is what an entry costs beside its documents, in bytes: its key, its places in go-cache's map and in the
// eviction order, its timer, and the structs themselves. TestCacheBoundsHeap measures that it is enough.
const entryOverhead = 1024

// cache keeps reports and submissions in go-cache, and adds to it what it has not: a bound in bytes. What has to go is
// chosen by SIEVE (Zhang et al., NSDI '24): a hit only leaves a mark, so it needs no lock but go-cache's own.
type cache struct {
	kept *gocache.Cache // key -> *entry

	mu      sync.Mutex // guards all below; taken to write, never to read
	limit   int64
	used    int64
	entries uint64 // how many there ever were
	evicted uint64 // how many of them had to go before their time
	first   sieve  // the plain forms of reports that are also kept compressed: they can be made again
	second  sieve  // the entries themselves
}

// entry is something kept.
type entry struct {
	key     key
	value   keepable
	number  uint64 // of all entries there ever were; 0 where it has not been kept
	timer   *time.Timer
	unsaved atomic.Bool // there was no storage, or no room in the queue to it

	whole slot // the entry's place in the eviction order
	plain slot // that of its report's plain form, where there is a gzip form too
}

// keepable is what can be kept: a *report or a *submission.
type keepable interface {
	// answers tells whether it is good enough for a caller, who may want nothing that is only kept.
	answers(nocache bool) bool
	// isReport tells whether a caller could be given it.
	isReport() bool
	// since is when it was the answer of a node or the broker.
	since() time.Time
	// size is what it takes as it is kept, in bytes.
	size() int
}

func (e *entry) report() *report         { return e.value.(*report) }
func (e *entry) submission() *submission { return e.value.(*submission) }

// slot is a place in an eviction order.
type slot struct {
	entry   *entry
	size    int64
	visited atomic.Bool
	element *list.Element // nil when it has no place
}

// visit leaves the mark by which SIEVE knows what is asked for. Reading first keeps the cache line shared.
func (s *slot) visit() {
	if !s.visited.Load() {
		s.visited.Store(true)
	}
}

func newCache(limit int64) *cache {
	// No cleanup interval: entries leave by their own timers, so there is no janitor to outlive the cache, and none
	// that would lock the whole map to look for what has expired.
	c := &cache{kept: gocache.New(gocache.NoExpiration, 0), limit: limit}
	c.kept.OnEvicted(func(_ string, v any) { c.unlink(v.(*entry)) })
	return c
}

// get finds what is kept under k.
func (c *cache) get(k key) (*entry, bool) {
	v, ok := c.kept.Get(string(k[:]))
	if !ok {
		return nil, false
	}
	e := v.(*entry)
	e.whole.visit()
	return e, true
}

// put keeps value under k for ttl, in place of what was there. What is larger than the whole cache is not kept.
func (c *cache) put(k key, value keepable, ttl time.Duration) *entry {
	e := &entry{key: k, value: value}
	e.whole = slot{entry: e, size: int64(value.size()) + entryOverhead}
	e.plain = slot{entry: e}

	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept.Delete(string(k[:]))
	if e.whole.size > c.limit {
		return e
	}
	c.entries++
	e.number = c.entries
	e.timer = time.AfterFunc(ttl, c.expire(k, e.number))
	c.kept.Set(string(k[:]), e, ttl)
	c.second.add(&e.whole)
	c.used += e.whole.size
	c.shrink()
	return e
}

// expire takes an entry out when its time has come. It knows the entry by its number alone: the runtime holds on to
// stopped timers for a while, and would hold on to the document too.
func (c *cache) expire(k key, number uint64) func() {
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if v, ok := c.kept.Get(string(k[:])); ok && v.(*entry).number != number {
			return // another has taken its place
		}
		c.kept.Delete(string(k[:]))
	}
}

// addPlain notes that an entry's report has its plain form beside the compressed one.
func (c *cache) addPlain(e *entry, size int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.whole.element == nil || e.plain.element != nil {
		return
	}
	e.plain.size = int64(size)
	c.first.add(&e.plain)
	c.used += e.plain.size
	c.shrink()
}

// unlink takes an entry out of the books after go-cache has let it go, which only who has the lock tells it to.
func (c *cache) unlink(e *entry) {
	e.timer.Stop()
	c.dropPlain(e)
	c.second.remove(&e.whole)
	c.used -= e.whole.size
}

func (c *cache) dropPlain(e *entry) {
	if e.plain.element == nil {
		return
	}
	c.first.remove(&e.plain)
	c.used -= e.plain.size
	e.report().plain.Store(nil)
}

// shrink evicts until what is left is within the limit: first what can be made again.
func (c *cache) shrink() {
	for c.used > c.limit {
		if s := c.first.next(); s != nil {
			c.dropPlain(s.entry)
		} else {
			k := c.second.next().entry.key
			c.kept.Delete(string(k[:]))
			c.evicted++
		}
	}
}

// memoryFigures say how full a cache is.
type memoryFigures struct {
	Bytes     int64  `json:"bytes"`
	Limit     int64  `json:"limit"`
	Entries   int    `json:"entries"`
	Evictions uint64 `json:"evictions"`
	Waiters   int64  `json:"waiters"` // callers who wait for reports to be finished
}

func (c *cache) figures() memoryFigures {
	c.mu.Lock()
	defer c.mu.Unlock()
	return memoryFigures{Bytes: c.used, Limit: c.limit, Entries: c.second.order.Len(), Evictions: c.evicted}
}

// largest is the bound.
func (c *cache) largest() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.limit
}

// setLimit changes the bound.
func (c *cache) setLimit(limit int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = limit
	c.shrink()
}

// close lets go of everything, and of every timer, and keeps nothing from now on.
func (c *cache) close() { c.setLimit(0) }

// sieve is an eviction order. The zero value is empty.
type sieve struct {
	order list.List     // of *slot, the newest in front
	hand  *list.Element // the next candidate; nil means the oldest
}

// add gives s the place of the newest.
func (s *sieve) add(x *slot) { x.element = s.order.PushFront(x) }

// remove takes x out.
func (s *sieve) remove(x *slot) {
	if s.hand == x.element {
		s.hand = x.element.Prev()
	}
	s.order.Remove(x.element)
	x.element = nil
}

// next is what has to go next, or nil when there is nothing. The hand moves from the oldest to the newest and spares
// what was visited since it last came by.
func (s *sieve) next() *slot {
	if s.order.Len() == 0 {
		return nil
	}
	for {
		if s.hand == nil {
			s.hand = s.order.Back()
		}
		x := s.hand.Value.(*slot)
		if !x.visited.Swap(false) {
			return x
		}
		s.hand = s.hand.Prev()
	}
}

// store is what all handlers of a process share: the cache, and the questions that are under way to fill it. It holds
// nothing of a configuration, so that it can outlive each of them.
type store struct {
	*cache
	flights *flights[flightKey, fetched]

	limitsMu sync.Mutex
	limits   map[*Handler]int64

	reading atomic.Int64 // bytes that answers take while they are read
	waiters atomic.Int64 // callers who wait for reports to be finished
}

// figures say how full the store is, and how many wait for it.
func (s *store) figures() memoryFigures {
	f := s.cache.figures()
	f.Waiters = s.waiters.Load()
	return f
}

// flightKey is the key of what is asked for, and the identity of who is asked: handlers that ask one node in the same
// way share a question, and one with a wrong secret does not spoil it for the others.
type flightKey struct{ kept, peer key }

// stores pools the one store, by a key of no meaning, for as long as some configuration uses it: a new configuration
// is provisioned before the old one is cleaned up.
var stores = caddy.NewUsagePool()

const storeKey = "fsbroker"

// joinStore makes h a user of the store, which its first user has made.
func joinStore(h *Handler) (*store, error) {
	v, _, err := stores.LoadOrNew(storeKey, func() (caddy.Destructor, error) {
		return &store{
			cache:   newCache(0),
			flights: newFlights[flightKey, fetched](),
			limits:  make(map[*Handler]int64),
		}, nil
	})
	if err != nil {
		return nil, err
	}
	s := v.(*store)
	s.setLimitOf(h, h.Cache.MaxSize)
	return s, nil
}

// leave ends what joinStore began.
func (s *store) leave(h *Handler) error {
	s.setLimitOf(h, 0)
	_, err := stores.Delete(storeKey)
	return err
}

// setLimitOf notes what h would let the cache have, 0 when it is gone. The largest counts; when the last handler goes,
// the limit stays, for the sake of one that comes at once.
func (s *store) setLimitOf(h *Handler, limit int64) {
	s.limitsMu.Lock()
	defer s.limitsMu.Unlock()
	if limit > 0 {
		s.limits[h] = limit
	} else {
		delete(s.limits, h)
	}
	for _, l := range s.limits {
		limit = max(limit, l)
	}
	if limit > 0 {
		s.setLimit(limit)
	}
}

// lease is room for one answer, out of what all answers may take together while they are read: as much again as the
// cache may take. Many callers who ask for different large reports at once must not exhaust memory.
type lease struct {
	store *store
	taken int64
}

func (s *store) lease() *lease { return &lease{store: s} }

// grow wants room for size bytes in all. One answer always has room, however large it is.
func (l *lease) grow(size int64) bool {
	more := size - l.taken
	if more <= 0 {
		return true
	}
	if reading := l.store.reading.Add(more); reading > l.store.largest() && reading > size {
		l.store.reading.Add(-more)
		return false
	}
	l.taken = size
	return true
}

// release gives back all that was taken.
func (l *lease) release() { l.store.reading.Add(-l.taken) }

// Destruct implements caddy.Destructor.
func (s *store) Destruct() error {
	s.cache.close()
	return nil
}

// plain gives the plain form of e's report, and keeps it when it had to be made.
func (s *store) plain(e *entry) (*form, error) {
	plain, made, err := e.report().inflated()
	if made {
		s.addPlain(e, cap(plain.body))
	} else {
		e.plain.visit()
	}
	return plain, err
}
