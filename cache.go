package fsbroker

import (
	"container/list"
	"encoding/json"
	"sync"
	"sync/atomic"
	"time"

	gocache "github.com/patrickmn/go-cache"
	"go.opentelemetry.io/otel/trace"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/coalesce"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Cache configures what is kept of the upstreams' answers, and for how long. All handlers of a namespace share one cache
// in memory, which outlives a reload of the configuration.
type Cache struct {
	// The namespace. All `fsbroker_task` handlers of a configuration with the same namespace share its upstreams, their
	// health, the cache and the storage, so they must be configured alike in everything but `secrets` and `max_wait`. Two
	// namespaces share nothing, whatever their nodes are called and however they are reached. Reports are kept under the
	// namespace and not under an address, so a node that moves keeps its reports. Installations that use one storage for
	// different upstreams need different namespaces. 1 to 64 letters, digits, dots, dashes or underscores. Default:
	// `default`
	Namespace string `json:"namespace,omitempty"`

	// How long a finished report is kept in memory. It never changes: the TTL only bounds memory. Default: `24h`
	TTL caddy.Duration `json:"ttl,omitempty"`

	// The maximum size of the cache in memory, in bytes, bookkeeping included. What is requested least is evicted first.
	// Default: 268435456 (256 MiB)
	MaxSize int64 `json:"max_size,omitempty"`

	// A storage that keeps finished reports beyond the process, and shares them with all instances that use it: any `caddy.storage` module, or `{}` for the storage that the server is configured with.
	// Reports are confidential. They are compressed but not encrypted: protect the storage. Default: none
	StorageRaw json.RawMessage `json:"storage,omitempty" caddy:"namespace=caddy.storage inline_key=module"`

	// How long the storage keeps a report. Needs a storage. Default: `720h` (30 days)
	Retention caddy.Duration `json:"retention,omitempty"`
}

const (
	defaultNamespace = "default"
	defaultTTL       = 24 * time.Hour
	defaultMaxSize   = 256 << 20
	defaultRetention = 30 * 24 * time.Hour
)

// entryOverhead is the cost of an entry beside its document, in bytes: its key, its places in go-cache's map and in the
// eviction order, its timer, and the structs themselves. TestCacheBoundsHeap checks that it suffices.
const entryOverhead = 1024

// memory keeps reports in go-cache and adds a bound in bytes. It evicts by SIEVE (Zhang et al., NSDI '24): a hit only sets
// a mark, so it takes no lock but go-cache's own.
type memory struct {
	kept *gocache.Cache // key -> *entry

	mu       sync.Mutex // guards the fields below; taken to write, never to read
	limit    int64
	used     int64
	added    uint64 // entries ever added
	evicted  uint64
	inflated sieve // inflated copies of documents that are also kept compressed, which can be made again
	entries  sieve
}

// entry is a report that is kept.
type entry struct {
	key     task.Key
	report  *task.Report
	number  uint64 // its position among all entries ever added; 0 if it was not kept
	timer   *time.Timer
	unsaved atomic.Bool // there is no storage, or its queue had no room

	whole    sieveNode
	inflated sieveNode
}

func newMemory(limit int64) *memory {
	// There is no cleanup interval: entries leave by their own timers. So no janitor outlives the cache or locks the whole
	// map to look for expired entries.
	m := &memory{kept: gocache.New(gocache.NoExpiration, 0), limit: limit}
	m.kept.OnEvicted(func(_ string, v any) { m.unlink(v.(*entry)) })
	return m
}

// get returns the entry under k.
func (m *memory) get(k task.Key) (*entry, bool) {
	v, ok := m.kept.Get(string(k[:]))
	if !ok {
		return nil, false
	}
	e := v.(*entry)
	e.whole.visit()
	return e, true
}

// put keeps a report under k for ttl and replaces what was there. A report that is larger than the whole cache is not kept.
func (m *memory) put(k task.Key, report *task.Report, ttl time.Duration) *entry {
	e := &entry{key: k, report: report}
	e.whole = sieveNode{entry: e, size: int64(report.Size()) + entryOverhead}
	e.inflated = sieveNode{entry: e}

	m.mu.Lock()
	defer m.mu.Unlock()
	m.kept.Delete(string(k[:]))
	if e.whole.size > m.limit {
		return e
	}
	m.added++
	e.number = m.added
	e.timer = time.AfterFunc(ttl, m.expire(k, e.number))
	m.kept.Set(string(k[:]), e, ttl)
	m.entries.add(&e.whole)
	m.used += e.whole.size
	m.shrink()
	return e
}

// expire removes an entry when its TTL is over. It identifies the entry by its number: the runtime holds stopped timers
// for a while, and would hold the document as well.
func (m *memory) expire(k task.Key, number uint64) func() {
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if v, ok := m.kept.Get(string(k[:])); ok && v.(*entry).number != number {
			return // it was replaced
		}
		m.kept.Delete(string(k[:]))
	}
}

// inflate returns the inflated representation of e's report, and keeps it.
func (m *memory) inflate(e *entry) (*task.Representation, error) {
	inflated, made, err := e.report.Inflate()
	if made {
		m.addInflated(e, cap(inflated.Body))
	} else {
		e.inflated.visit()
	}
	return inflated, err
}

func (m *memory) addInflated(e *entry, size int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.whole.element == nil || e.inflated.element != nil {
		return
	}
	e.inflated.size = int64(size)
	m.inflated.add(&e.inflated)
	m.used += e.inflated.size
	m.shrink()
}

// unlink removes an entry that has left go-cache from the accounts. The caller holds the mutex.
func (m *memory) unlink(e *entry) {
	e.timer.Stop()
	m.dropInflated(e)
	m.entries.remove(&e.whole)
	m.used -= e.whole.size
}

func (m *memory) dropInflated(e *entry) {
	if e.inflated.element == nil {
		return
	}
	m.inflated.remove(&e.inflated)
	m.used -= e.inflated.size
	e.report.DropInflated()
}

// shrink evicts until the rest is within the limit. Inflated copies go first, because they can be made again.
func (m *memory) shrink() {
	for m.used > m.limit {
		if n := m.inflated.next(); n != nil {
			m.dropInflated(n.entry)
		} else {
			k := m.entries.next().entry.key
			m.kept.Delete(string(k[:]))
			m.evicted++
		}
	}
}

// purge removes the entries under keys, or all entries if keys is nil, and returns how many there were.
func (m *memory) purge(keys []task.Key) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.entries.order.Len()
	if keys == nil {
		for m.entries.order.Len() > 0 {
			k := m.entries.order.Back().Value.(*sieveNode).entry.key
			m.kept.Delete(string(k[:]))
		}
	}
	for _, k := range keys {
		m.kept.Delete(string(k[:]))
	}
	return before - m.entries.order.Len()
}

// memoryStats describes the cache in memory.
type memoryStats struct {
	Bytes     int64  `json:"bytes"`
	Limit     int64  `json:"limit"`
	Entries   int    `json:"entries"`
	Evictions uint64 `json:"evictions"`
	Waiters   int64  `json:"waiters"` // callers that wait for a report to be finished
}

func (m *memory) stats() memoryStats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return memoryStats{Bytes: m.used, Limit: m.limit, Entries: m.entries.order.Len(), Evictions: m.evicted}
}

func (m *memory) maxSize() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.limit
}

func (m *memory) setLimit(limit int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = limit
	m.shrink()
}

// close removes all entries and their timers. A closed cache keeps nothing.
func (m *memory) close() { m.setLimit(0) }

// sieve is an eviction order. The zero value is empty.
type sieve struct {
	order list.List     // of *sieveNode, the newest in front
	hand  *list.Element // the next candidate; nil means the oldest
}

// sieveNode is a place in an eviction order.
type sieveNode struct {
	entry   *entry
	size    int64
	visited atomic.Bool
	element *list.Element // nil if it is in no order
}

// visit marks the node as requested. It reads first, which keeps the cache line shared.
func (n *sieveNode) visit() {
	if !n.visited.Load() {
		n.visited.Store(true)
	}
}

// add adds n as the newest.
func (s *sieve) add(n *sieveNode) { n.element = s.order.PushFront(n) }

func (s *sieve) remove(n *sieveNode) {
	if s.hand == n.element {
		s.hand = n.element.Prev()
	}
	s.order.Remove(n.element)
	n.element = nil
}

// next returns the node to evict, or nil if there is none. The hand moves from the oldest to the newest node and spares
// those visited since it last passed.
func (s *sieve) next() *sieveNode {
	if s.order.Len() == 0 {
		return nil
	}
	for {
		if s.hand == nil {
			s.hand = s.order.Back()
		}
		n := s.hand.Value.(*sieveNode)
		if !n.visited.Swap(false) {
			return n
		}
		s.hand = s.hand.Prev()
	}
}

// shared is what a namespace shares across configurations: the memory tier, the calls under way that fill it, and the
// budget for answers that are being read. It holds nothing of a configuration, so it outlives each of them.
type shared struct {
	*memory
	calls coalesce.Group[callKey, fetchResult]

	membersMu sync.Mutex
	members   map[*member]struct{}

	reading atomic.Int64 // memory of the answers that are being read, in bytes
	waiters atomic.Int64 // callers that wait for a report to be finished
}

// callKey is the key of a call: what is fetched, and the identity of the upstreams. Two configurations that use the same
// upstreams in the same way share a call. A wrong secret of an old configuration does not affect a new one.
type callKey struct{ report, upstreams task.Key }

// fetchResult is what a call gives to all its callers.
type fetchResult struct {
	entry  *entry
	stored bool               // it came from the storage
	from   *upstream          // that answered; nil if it was kept
	span   *trace.SpanContext // of the request to the upstream; nil if nothing is traced
}

// pool holds the shared value of each namespace, for as long as a configuration uses it: a new configuration is
// provisioned before the old one is cleaned up.
var pool = caddy.NewUsagePool()

// member is a configuration that uses a shared value.
type member struct {
	*shared
	namespace string
	limit     int64
}

// joinShared returns a new member of a namespace, whose cache may have maxSize bytes. The largest limit of all members
// counts.
func joinShared(namespace string, maxSize int64) (*member, error) {
	v, _, err := pool.LoadOrNew(namespace, func() (caddy.Destructor, error) {
		return &shared{memory: newMemory(0), members: make(map[*member]struct{})}, nil
	})
	if err != nil {
		return nil, err
	}
	m := &member{shared: v.(*shared), namespace: namespace, limit: maxSize}
	m.membersMu.Lock()
	defer m.membersMu.Unlock()
	m.members[m] = struct{}{}
	m.applyLimit()
	return m, nil
}

// leave ends the membership. The limit stays when the last member leaves, for the benefit of one that joins at once.
func (m *member) leave() error {
	m.membersMu.Lock()
	delete(m.members, m)
	if len(m.members) > 0 {
		m.applyLimit()
	}
	m.membersMu.Unlock()
	_, err := pool.Delete(m.namespace)
	return err
}

// applyLimit sets the largest limit of all members. The caller holds membersMu.
func (s *shared) applyLimit() {
	var limit int64
	for m := range s.members {
		limit = max(limit, m.limit)
	}
	s.setLimit(limit)
}

// Destruct implements caddy.Destructor.
func (s *shared) Destruct() error {
	s.memory.close()
	return nil
}

func (s *shared) stats() memoryStats {
	stats := s.memory.stats()
	stats.Waiters = s.waiters.Load()
	return stats
}

// reservation is a part of the read budget, for one answer. The budget is as large as the cache, so that many callers
// that request different large reports cannot exhaust memory.
type reservation struct {
	shared *shared
	size   int64
}

func (s *shared) reserve() *reservation { return &reservation{shared: s} }

// grow extends the reservation to size bytes and reports whether there is room. One answer always has room, however
// large it is.
func (r *reservation) grow(size int64) bool {
	more := size - r.size
	if more <= 0 {
		return true
	}
	if reading := r.shared.reading.Add(more); reading > r.shared.maxSize() && reading > size {
		r.shared.reading.Add(-more)
		return false
	}
	r.size = size
	return true
}

// release returns the reservation to the budget.
func (r *reservation) release() { r.shared.reading.Add(-r.size) }

// archives pools the archives of a process by the configuration of their storage.
var archives = caddy.NewUsagePool()

// pooledArchive is an archive in a pool.
type pooledArchive struct{ *archive.Archive }

// Destruct implements caddy.Destructor.
func (p pooledArchive) Destruct() error {
	p.Close()
	return nil
}

// openArchive attaches a backend to the archive of that ID, which it makes if there is none.
func openArchive(id string, b *archive.Backend) (*archive.Archive, error) {
	v, _, err := archives.LoadOrNew(id, func() (caddy.Destructor, error) {
		return pooledArchive{archive.New()}, nil
	})
	if err != nil {
		return nil, err
	}
	a := v.(pooledArchive).Archive
	a.Attach(b)
	return a, nil
}

// closeArchive undoes openArchive.
func closeArchive(id string, a *archive.Archive, b *archive.Backend) error {
	a.Detach(b)
	_, err := archives.Delete(id)
	return err
}

// Interface guards
var (
	_ caddy.Destructor = (*shared)(nil)
	_ caddy.Destructor = pooledArchive{}
)
