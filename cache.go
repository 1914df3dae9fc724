package fsbroker

import (
	"crypto/sha256"
	"encoding/json"
	"iter"
	"sync"
	"time"

	gocache "github.com/patrickmn/go-cache"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Cache configures what is kept of the upstreams' answers, and for how long. All handlers of a namespace share one cache
// in memory, which outlives a reload of the configuration.
type Cache struct {
	// The namespace. All `fsbroker_task` handlers of a configuration with the same namespace share its upstreams, their
	// health, the cache and the storage, so they must be configured alike in everything but `secrets` and `max_wait`. Two
	// namespaces share nothing, whatever their nodes are called and however they are reached. Reports are kept under the
	// namespace and not under an address, so a node that moves keeps its reports. Installations that use one storage for
	// different upstreams need different namespaces. 1 to 64 letters, digits, dots, dashes or underscores, the first a
	// letter or a digit. Default: `default`
	Namespace string `json:"namespace,omitempty"`

	// How long a finished report is kept in memory. A finished report never changes, so this only bounds memory. Default: `24h`
	TTL caddy.Duration `json:"ttl,omitempty"`

	// The maximum memory of the namespace for reports, in bytes. What is kept, what is being sent and what is being read
	// [all count](https://github.com/caddy-fsbroker/caddy-fsbroker/blob/main/docs/DIRECTIVE.md#memory). What is requested least
	// is evicted first. It should be several times `max_report`. Default: 268435456 (256 MiB)
	MaxSize int64 `json:"max_size,omitempty"`

	// A storage that keeps finished reports beyond the process, and shares them with all instances that use it: any
	// `caddy.storage` module, or `{}` for the storage that the server is configured with. Reports are confidential: protect
	// the storage, or encrypt what is stored in it with `encryption_keys`. Default: none
	StorageRaw json.RawMessage `json:"storage,omitempty" caddy:"namespace=caddy.storage inline_key=module"`

	// How long the storage keeps a report. Needs a storage. Default: `720h` (30 days)
	Retention caddy.Duration `json:"retention,omitempty"`

	// The keys with which reports are encrypted in the storage (AES-256-GCM). Each has 32 random bytes, written as 64
	// hexadecimal digits or as base64. The first encrypts, and any of them decrypts: to rotate the key, put a new one in
	// front, and remove the old one when the retention is over. A report whose key is gone is left alone in the storage, and
	// is fetched from an upstream again. So is one that is stored unencrypted, unless `accept_unencrypted` is set. A key should
	// be a placeholder, such as `{file./run/secrets/key}`. Needs a storage. Default: none, so reports are not encrypted
	EncryptionKeys []string `json:"encryption_keys,omitempty"`

	// Whether what is stored unencrypted is read although there are `encryption_keys`. It is for the time after encryption was
	// turned on: remove it when the retention has passed since then. As long as it is set, whoever can write to the storage can
	// forge reports without a key. Needs `encryption_keys`. Default: false
	AcceptUnencrypted bool `json:"accept_unencrypted,omitempty"`
}

const (
	defaultNamespace = "default"
	defaultTTL       = 24 * time.Hour
	defaultMaxSize   = 256 << 20
	defaultRetention = 30 * 24 * time.Hour
)

// memory keeps reports in go-cache, and bounds their bytes with a budget. Both forms of a report count, and so does what else
// the budget counts. A hit only sets a mark for the eviction order, so it takes no lock but go-cache's own.
type memory struct {
	kept  *gocache.Cache // key -> *entry
	start time.Time

	mu      sync.Mutex // guards the fields below, and those of entries and forms that say so; never taken for a hit
	budget  *budget.Budget
	evicted uint64
	entries int
	order   sieve
	files   fileIndex // of the finished reports that are kept
	saving  *saving

	inflatedOne *sync.Cond // a caller has inflated a report

	expiries ranking     // by when their TTLs are over, in nanoseconds after start
	timer    *time.Timer // of the first of them; nil if there has been none
}

// newMemory returns a memory with a limit in bytes.
func newMemory(limit int64) *memory {
	// There is no cleanup interval: memory has a timer of its own. So no janitor outlives the cache or locks the whole map to
	// look for expired entries.
	m := &memory{kept: gocache.New(gocache.NoExpiration, 0), start: time.Now()}
	m.inflatedOne = sync.NewCond(&m.mu)
	m.expiries.place = func(e *entry) *place { return &e.expiryPlace }
	m.budget = budget.New(&m.mu, task.SmallDocument, m.evict)
	m.saving = newSaving(&m.mu, m.peek, m.all)
	m.kept.OnEvicted(func(_ string, v any) { m.unlink(v.(*entry)) })
	m.setLimit(limit)
	return m
}

// get returns the entry under k.
func (m *memory) get(k task.Key) (*entry, bool) {
	e, ok := m.peek(string(k[:]))
	if ok {
		e.whole.visit()
	}
	return e, ok
}

// peek is like get, but does not count as a request for the report.
func (m *memory) peek(key string) (*entry, bool) {
	v, ok := m.kept.Get(key)
	if !ok {
		return nil, false
	}
	return v.(*entry), true
}

// newest returns the newest finished report of a file that is kept, or nil.
func (m *memory) newest(sum [sha256.Size]byte, kind task.Kind) *entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.files.newest(fileReports{sum, kind})
	if e == nil {
		return nil
	}
	e, _ = m.get(e.key())
	return e
}

// keep keeps a report under k and replaces what was there. The same document again renews what is there. An unfinished report
// does not replace a finished one, and a report for which there is no room is not kept. A finished one is added to those of
// its file, and is stored in all archives.
//
// All of it happens under one lock: an archive that is attached meanwhile must not store half of what is known of the report.
func (m *memory) keep(k task.Key, report *task.Report, as kept) *entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.put(k, report, as.ttl)
	if !report.Finished() {
		return e
	}
	e.kind, e.target = as.kind, as.target
	if e.whole.kept.Load() {
		m.files.add(e)
	}
	m.saving.keep(e, as)
	return e
}

// put adds a report, or renews it, or returns an entry that is not kept. The caller holds the mutex.
func (m *memory) put(k task.Key, report *task.Report, ttl time.Duration) *entry {
	if e, ok := m.peek(string(k[:])); ok {
		if e.report.Renew(report) {
			m.set(e, ttl)
			m.files.renew(e)
			return e
		}
		if e.report.Finished() && !report.Finished() {
			return unkept(report)
		}
		m.saving.forget(e) // the new report is stored instead
	}
	m.kept.Delete(string(k[:]))
	e := newEntry(k, report)
	if size := e.whole.size(); size > m.budget.Usage().Limit || !m.budget.MakeRoom(size) {
		e.unkept = true
		return e
	}
	m.set(e, ttl)
	m.entries++
	m.link(&e.whole)
	return e
}

// set puts an entry into go-cache. The caller holds the mutex.
func (m *memory) set(e *entry, ttl time.Duration) {
	m.expiries.set(e, int64(time.Since(m.start)+ttl))
	if m.expiries.first() == e {
		m.setTimer()
	}
	m.kept.Set(e.name, e, ttl)
}

// setTimer sets the timer to the end of the first TTL. The caller holds the mutex.
func (m *memory) setTimer() {
	if m.expiries.first() == nil {
		return
	}
	left := time.Duration(m.expiries.ranked[0].rank) - time.Since(m.start)
	if m.timer == nil {
		m.timer = time.AfterFunc(left, m.expire)
		return
	}
	m.timer.Reset(left)
}

// maxExpired is how many entries are removed at once, so that others do not wait long for the mutex.
const maxExpired = 1000

// expire removes entries whose TTLs are over.
func (m *memory) expire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := int64(time.Since(m.start))
	for range maxExpired {
		e := m.expiries.first()
		if e == nil || m.expiries.ranked[0].rank > now {
			break
		}
		m.kept.Delete(e.name)
	}
	m.setTimer()
}

// unlink removes an entry that has left go-cache, with its forms. The caller holds the mutex.
func (m *memory) unlink(e *entry) {
	m.saving.leave(e)
	m.expiries.remove(e)
	m.files.remove(e)
	m.entries--
	m.dropInflated(e)
	m.drop(&e.whole)
}

// link adds a form to the eviction order. The caller holds the mutex.
func (m *memory) link(f *form) {
	m.order.add(f)
	f.kept.Store(true)
	m.budget.AddKept(f.size())
}

// drop removes a form from the eviction order. It still counts while callers hold it. The caller holds the mutex.
func (m *memory) drop(f *form) {
	m.order.remove(f)
	f.kept.Store(false)
	m.budget.AddKept(-f.size())
	if f.holders.Load() > 0 {
		f.counted = true
		m.budget.AddSending(f.size())
	}
}

func (m *memory) dropInflated(e *entry) {
	if f := e.inflated.Swap(nil); f != nil && f.kept.Load() {
		m.drop(&f.form)
	}
}

// acquire keeps a form counted while it is sent to a caller, even if it is evicted meanwhile. It must be released.
func (m *memory) acquire(f *form) {
	f.holders.Add(1)
	if f.kept.Load() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !f.kept.Load() && !f.counted {
		f.counted = true
		m.budget.AddSending(f.size())
		m.budget.MakeRoom(0)
	}
}

// release undoes acquire.
func (m *memory) release(f *form) {
	if f.holders.Add(-1) > 0 || f.kept.Load() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.counted && f.holders.Load() == 0 {
		f.counted = false
		m.budget.AddSending(-f.size())
	}
}

// content is what is sent of a report: a form as it is, or a form that is inflated piece by piece.
type content struct {
	form    *form
	body    []byte
	decoder *budget.Reservation // of what inflates the form; nil if the body is sent as it is
}

// acquireContent returns the content of a response with an entry, in the inflated form or as it is kept. It must be released.
func (m *memory) acquireContent(e *entry, inflated bool) (content, error) {
	if !inflated {
		m.acquire(&e.whole)
		return content{form: &e.whole, body: e.report.Representation().Body}, nil
	}
	if f, err := m.inflatedForm(e); err != nil {
		return content{}, err
	} else if f != nil {
		return content{form: &f.form, body: f.rep.Body}, nil
	}
	decoder := m.budget.ReserveDecoder() // before the form, which may be larger than the limit
	if err := decoder.Grow(task.DecoderMemory); err != nil {
		return content{}, err
	}
	m.acquire(&e.whole)
	return content{form: &e.whole, decoder: decoder}, nil
}

// releaseContent undoes acquireContent.
func (m *memory) releaseContent(c content) {
	m.release(c.form)
	if c.decoder != nil {
		c.decoder.Release()
	}
}

// inflatedForm returns an inflated copy of a compressed report, acquired. It makes one if that pays and there is room. If not,
// it returns nil, and the document must be inflated piece by piece. A copy of a large document pays when it is requested for
// the second time.
func (m *memory) inflatedForm(e *entry) (*inflatedCopy, error) {
	if f := e.inflated.Load(); f != nil {
		f.visit()
		m.acquire(&f.form)
		return f, nil
	}
	if e.report.Length() > task.SmallDocument && !e.requested.Swap(true) {
		return nil, nil
	}
	m.beginInflating(e)
	defer m.endInflating(e)
	if f := e.inflated.Load(); f != nil {
		m.acquire(&f.form)
		return f, nil
	}
	f := &inflatedCopy{form: form{entry: e}}
	if !m.budget.BeginCopy(f.size()) {
		return nil, nil
	}
	rep, err := e.report.Inflate()
	f.rep = rep
	m.mu.Lock()
	defer m.mu.Unlock()
	m.budget.EndCopy(f.size())
	if err != nil {
		return nil, err
	}
	f.holders.Store(1)
	if e.whole.kept.Load() {
		m.link(&f.form)
		e.inflated.Store(f)
	} else {
		f.counted = true
		m.budget.AddSending(f.size())
	}
	return f, nil
}

// beginInflating waits until no other caller inflates the report. A mutex in each entry would take more memory.
func (m *memory) beginInflating(e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e.inflating {
		m.inflatedOne.Wait()
	}
	e.inflating = true
}

func (m *memory) endInflating(e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e.inflating = false
	m.inflatedOne.Broadcast()
}

// evict evicts a form, and reports whether there was one to evict. The caller holds the mutex.
func (m *memory) evict() bool {
	f := m.order.next()
	if f == nil {
		return false
	}
	if f == &f.entry.whole {
		m.kept.Delete(f.entry.name)
		m.evicted++
	} else {
		m.dropInflated(f.entry)
	}
	return true
}

// purge removes the entries that match and returns how many there were.
func (m *memory) purge(match func(k task.Key, target *task.Key, r *task.Report) bool) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	var matching []*entry
	for e := range m.all() {
		if match(e.key(), e.target, e.report) {
			matching = append(matching, e)
		}
	}
	for _, e := range matching {
		m.saving.forget(e)
		m.kept.Delete(e.name)
	}
	return len(matching)
}

// all iterates over the entries, from the oldest to the newest. The caller holds the mutex.
func (m *memory) all() iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		for f := m.order.oldest; f != nil; f = f.newer {
			if f == &f.entry.whole && !yield(f.entry) {
				return
			}
		}
	}
}

// stats describes the cache in memory.
func (m *memory) stats() cli.Cache {
	m.mu.Lock()
	defer m.mu.Unlock()
	u := m.budget.Usage()
	return cli.Cache{
		Bytes: u.Kept + u.Sending + u.Reading, Sending: u.Sending, Reading: u.Reading, Limit: u.Limit, Entries: m.entries, Evictions: m.evicted,
	}
}

func (m *memory) setLimit(limit int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.budget.SetLimit(limit)
}

// close removes all entries and stops the timer. A closed cache keeps nothing.
func (m *memory) close() {
	m.setLimit(0)
	m.purge(archive.Selection{}.Matches) // what callers hold is not evicted
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.timer != nil {
		m.timer.Stop() // it holds the cache
	}
}
