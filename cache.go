package fsbroker

import (
	"crypto/sha256"
	"encoding/json"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gocache "github.com/patrickmn/go-cache"
	"go.opentelemetry.io/otel/trace"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/coalesce"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
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

	// How long a finished report is kept in memory. It never changes: the TTL only bounds memory. Default: `24h`
	TTL caddy.Duration `json:"ttl,omitempty"`

	// The maximum memory of the namespace, in bytes. Everything counts: what is kept, with bookkeeping, what is still being
	// sent to slow callers, and the answers that are being read. What is requested least is evicted first. It should be
	// several times `max_report`. Default: 268435456 (256 MiB)
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

// entryOverhead is the most that an entry costs beside its document, in bytes: the structs themselves, with their strings,
// and the places in go-cache's map, in the index by file, and in the order of expiry. Most cost 400 to 450. Maps that are
// half empty, and two reports of each file, cost more (TestEntryOverhead).
const entryOverhead = 704

// memory keeps reports in go-cache and adds a bound in bytes. Everything counts: the reports that are kept, in both forms,
// those that are not kept any more but are still being sent to slow callers, and the answers that are being read. It evicts
// by SIEVE (Zhang et al., NSDI '24): a hit only sets a mark, so it takes no lock but go-cache's own.
type memory struct {
	kept  *gocache.Cache // key -> *entry
	start time.Time

	mu      sync.Mutex // guards the fields below, and those of entries and forms that say so; never taken for a hit
	limit   int64
	used    int64 // kept
	sending int64 // not kept any more, or never, but being sent
	reading int64 // of the answers that are being read, and of decoders
	evicted uint64
	entries int
	order   sieve
	files   fileIndex // of the finished reports that are kept

	inflatedOne *sync.Cond // a caller has inflated a report
	decoders    share      // of what inflates reports piece by piece, while they are sent

	expiries ranking     // by when their TTLs are over, in nanoseconds after start
	timer    *time.Timer // of the first of them; nil if there has been none

	// The archives in which finished reports are to be stored, with the entries for which their queues had no room, and what
	// operators know some of these by.
	unsaved map[*archive.Archive]map[*entry]string

	// The keys of the references that were stored before the reports of these entries.
	waiting map[*entry][]task.Key
}

// entry is a report and its forms. Memory may have millions of them, so it is small, and its fields are in an order that
// leaves no gaps (BenchmarkCostPerReport).
type entry struct {
	name    string // the bytes of a task.Key, which go-cache's map shares
	report  *task.Report
	target  *task.Key        // under which the report itself is stored; nil if that is key; guarded by memory.mu
	savedIn *archive.Archive // which has it, of those that must; guarded by memory.mu

	inflated  atomic.Pointer[inflatedCopy] // nil if there is none
	whole     form
	requested atomic.Bool // whether a caller has asked for the inflated document

	expiryPlace place // in memory.expiries; guarded by memory.mu
	filePlace   place // among the reports of its file; 0 if it is not in the index; guarded by memory.mu
	kind        task.Kind
	unkept      bool // it was never kept
	inflating   bool // a caller is inflating it; guarded by memory.mu
}

// form is a representation of a report, with its place in the eviction order. Callers to which it is being sent hold it.
type form struct {
	entry        *entry
	newer, older *form // in the eviction order; guarded by memory.mu
	visited      atomic.Bool
	holders      atomic.Int32
	kept         atomic.Bool // it is in the eviction order; changes under memory.mu
	counted      bool        // in memory.sending; guarded by memory.mu
}

// inflatedCopy is the inflated form of a report that is compressed.
type inflatedCopy struct {
	form
	rep *task.Representation
}

func newMemory(limit int64) *memory {
	// There is no cleanup interval: memory has a timer of its own. So no janitor outlives the cache or locks the whole map to
	// look for expired entries.
	m := &memory{kept: gocache.New(gocache.NoExpiration, 0), start: time.Now(), limit: limit}
	m.inflatedOne = sync.NewCond(&m.mu)
	m.expiries.place = func(e *entry) *place { return &e.expiryPlace }
	m.unsaved = make(map[*archive.Archive]map[*entry]string)
	m.waiting = make(map[*entry][]task.Key)
	m.kept.OnEvicted(func(_ string, v any) { m.unlink(v.(*entry)) })
	return m
}

func newEntry(k task.Key, report *task.Report) *entry {
	e := &entry{name: string(k[:]), report: report}
	e.whole.entry = e
	return e
}

// key returns the key under which the report is kept.
func (e *entry) key() task.Key { return task.Key([]byte(e.name)) }

// size returns the memory that a form takes, in bytes.
func (f *form) size() int64 {
	if f == &f.entry.whole {
		return int64(f.entry.report.Size()) + entryOverhead
	}
	return int64(f.entry.report.Length())
}

// unkept returns an entry that is not kept.
func unkept(report *task.Report) *entry {
	e := newEntry(task.Key{}, report)
	e.unkept = true
	return e
}

// get returns the entry under k.
func (m *memory) get(k task.Key) (*entry, bool) {
	e, ok := m.peek(string(k[:]))
	if ok {
		e.whole.visit()
	}
	return e, ok
}

// peek is like get, but is no request of the report.
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

// kept says how a report is kept. Only ttl matters for one that is not finished.
type kept struct {
	ttl    time.Duration
	id     harvest.ID // by which operators know it
	kind   task.Kind
	target *task.Key        // under which the report itself is stored; nil if that is its own key
	from   *archive.Archive // the report came from there, so it is not stored there again; nil if it came from an upstream
	saved  bool             // from has stored it, and has it not only in its queue
}

// keep keeps a report under k and replaces what was there. The same document again renews what is there. An unfinished report
// does not replace a finished one, and a report for which there is no room is not kept. A finished one is added to those of
// its file, and is queued to be stored in all archives. Where there is no room, one that is kept is queued later, and another
// one is lost.
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
	if as.saved {
		e.savedIn = as.from
	}
	isKept := e.whole.kept.Load()
	if isKept {
		m.files.add(e)
	}
	for a, unsaved := range m.unsaved {
		switch {
		case a == as.from || a.Save(m.item(e)):
			delete(unsaved, e)
		case !isKept:
			a.Lose(as.id.String(), e.report)
		case len(unsaved) < maxUnsavedIDs:
			unsaved[e] = strings.Clone(as.id.String()) // it may be a part of a long query
		default:
			unsaved[e] = ""
		}
	}
	return e
}

// maxUnsavedIDs bounds the unsaved entries of an archive whose IDs are remembered, because IDs do not count as memory.
const maxUnsavedIDs = 10_000

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
		m.forgetUnsaved(e) // the other report is stored
	}
	m.kept.Delete(string(k[:]))
	e := newEntry(k, report)
	if size := e.whole.size(); size > m.limit || !m.makeRoom(size) {
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

// unlink removes the forms of an entry that has left go-cache. What is still to be stored is queued, or lost if there is no
// room. The caller holds the mutex.
func (m *memory) unlink(e *entry) {
	for a, unsaved := range m.unsaved {
		if id, ok := unsaved[e]; ok {
			delete(unsaved, e)
			if !a.Save(m.item(e)) {
				a.Lose(id, e.report)
			}
		}
	}
	delete(m.waiting, e)
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
	m.used += f.size()
}

// drop removes a form from the eviction order. It still counts while callers hold it. The caller holds the mutex.
func (m *memory) drop(f *form) {
	m.order.remove(f)
	f.kept.Store(false)
	m.used -= f.size()
	if f.holders.Load() > 0 {
		f.counted = true
		m.sending += f.size()
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
		m.sending += f.size()
		m.makeRoom(0)
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
		m.sending -= f.size()
	}
}

// describe returns the header fields of a form of the report.
func (e *entry) describe(inflated bool) task.Representation {
	if !inflated {
		return e.report.Representation()
	}
	if f := e.inflated.Load(); f != nil {
		return *f.rep
	}
	return e.report.Inflated()
}

// content is what is sent of a report: a form as it is, or a form that is inflated piece by piece.
type content struct {
	form    *form
	body    []byte
	decoder *reservation // of what inflates the form; nil if the body is sent as it is
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
	decoder := m.reserve(&m.decoders) // before the form, which may be larger than the limit
	if err := decoder.take(task.DecoderMemory); err != nil {
		return content{}, err
	}
	m.acquire(&e.whole)
	return content{form: &e.whole, decoder: decoder}, nil
}

// releaseContent undoes acquireContent.
func (m *memory) releaseContent(c content) {
	m.release(c.form)
	if c.decoder != nil {
		c.decoder.release()
	}
}

// inflatedForm returns an inflated copy of a compressed report, acquired. It returns nil if there is none and a copy does
// not pay or has no room: the document must be inflated piece by piece then. A copy of a large document pays when it is
// requested for the second time.
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
	if !m.begin(f.size()) {
		return nil, nil
	}
	rep, err := e.report.Inflate()
	f.rep = rep
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reading -= f.size()
	if err != nil {
		return nil, err
	}
	f.holders.Store(1)
	if e.whole.kept.Load() {
		m.link(&f.form)
		e.inflated.Store(f)
	} else {
		f.counted = true
		m.sending += f.size()
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

// begin reserves room for a copy, of an eighth of the memory at the most, and reports whether there is any. For a small one,
// only what callers hold counts.
func (m *memory) begin(size int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size > max(m.limit/8, task.SmallDocument) {
		return false
	}
	fits := m.makeRoom(size) || size <= task.SmallDocument && m.used+m.sending+m.decoders.reading+size <= m.limit
	if !fits {
		return false
	}
	m.reading += size
	return true
}

// makeRoom evicts until there is room for size bytes, and reports whether there is. The caller holds the mutex.
func (m *memory) makeRoom(size int64) bool {
	for m.used+m.sending+m.reading+size > m.limit {
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
		m.forgetUnsaved(e)
		m.kept.Delete(e.name)
	}
	return len(matching)
}

// forgetUnsaved keeps an entry from being stored when it leaves memory. The caller holds the mutex.
func (m *memory) forgetUnsaved(e *entry) {
	for _, unsaved := range m.unsaved {
		delete(unsaved, e)
	}
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

// attach makes an archive one in which all finished reports are stored, including those that are kept already, and those
// that have left memory but are still queued for another archive.
func (m *memory) attach(a *archive.Archive) {
	m.mu.Lock()
	for other := range m.unsaved {
		for _, i := range other.Queued() {
			i.Target = nil // it may not be stored in this one
			a.Save(i)
		}
	}
	unsaved := make(map[*entry]string)
	for e := range m.all() {
		if e.report.Finished() {
			unsaved[e] = ""
		}
	}
	m.unsaved[a] = unsaved
	m.mu.Unlock()
	m.saveUnsaved(a)
}

// detach undoes attach.
func (m *memory) detach(a *archive.Archive) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.unsaved, a)
}

// noteSaved notes that an archive has stored an item. It returns the keys of the reports that the archive has from now on:
// it does not have that of a reference which was stored before its target.
func (m *memory) noteSaved(i archive.Item, a *archive.Archive) (saved []task.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i.Target != nil {
		target := m.keptAs(*i.Target, i.Report)
		if target != nil && target.savedIn != a && !slices.Contains(m.waiting[target], i.Key) {
			m.waiting[target] = append(m.waiting[target], i.Key)
		}
		if target == nil || target.savedIn != a {
			return nil
		}
	}
	e := m.keptAs(i.Key, i.Report)
	if e == nil {
		return []task.Key{i.Key}
	}
	e.savedIn = a
	saved = append(saved, i.Key)
	for _, k := range m.waiting[e] {
		if reference := m.keptAs(k, i.Report); reference != nil {
			reference.savedIn = a
			saved = append(saved, k)
		}
	}
	delete(m.waiting, e)
	return saved
}

// keptAs returns the entry under k if it has that report, or nil. The caller holds the mutex.
func (m *memory) keptAs(k task.Key, report *task.Report) *entry {
	if e, ok := m.peek(string(k[:])); ok && e.report.Same(report) {
		return e
	}
	return nil
}

// isSaved reports whether an archive has stored the report of an entry, and not only a reference to it. It does if there is
// no archive. What is not queued any more is queued again.
func (m *memory) isSaved(e *entry, a *archive.Archive) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a == nil || e.savedIn == a {
		return true
	}
	if a.IsQueued(e.key()) || e.target != nil && (m.keptAs(*e.target, e.report) != nil || a.IsQueued(*e.target)) {
		return false
	}
	if a.Save(m.item(e)) {
		delete(m.unsaved[a], e)
	}
	return false
}

// saveUnsaved queues entries to be stored for which an archive had no room, until it has none again.
func (m *memory) saveUnsaved(a *archive.Archive) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e := range m.unsaved[a] {
		if !a.Save(m.item(e)) {
			return
		}
		delete(m.unsaved[a], e)
	}
}

// item returns how an entry is stored: as a reference if its target is kept, and so is stored as well. The caller holds the
// mutex.
func (m *memory) item(e *entry) archive.Item {
	i := archive.Item{Key: e.key(), Report: e.report, Kind: e.kind}
	if e.target != nil {
		if m.keptAs(*e.target, e.report) != nil {
			i.Target = e.target
		}
	}
	return i
}

// stats describes the cache in memory.
func (m *memory) stats() cli.Cache {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cli.Cache{
		Bytes: m.used + m.sending + m.reading, Sending: m.sending, Reading: m.reading,
		Limit: m.limit, Entries: m.entries, Evictions: m.evicted,
	}
}

func (m *memory) setLimit(limit int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = limit
	m.makeRoom(0)
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

// share is what is being read from one upstream, or from the storage, or what all decoders take, in bytes. It is guarded by
// memory.mu.
type share struct{ reading int64 }

// reservation is the memory of one answer that is being read, of one report from the storage, or of a decoder.
type reservation struct {
	memory *memory
	share  *share
	size   int64
}

func (m *memory) reserve(s *share) *reservation { return &reservation{memory: m, share: s} }

// grow extends the reservation to size bytes and reports whether there is room. An answer up to task.SmallDocument always
// has room, and so has one beside which memory holds nothing. The others of a share may take as much as they leave free
// (dynamic thresholds, Choudhury and Hahne, 1998): an upstream that floods, or stalls, never takes everything, and neither do
// callers that read slowly.
func (r *reservation) grow(size int64) bool {
	more := size - r.size
	if more <= 0 {
		return true
	}
	m := r.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	small, alone := size <= task.SmallDocument, m.sending == 0 && m.reading == r.size
	if !small && !alone && r.share.reading+more > m.limit-m.sending-m.reading-more {
		return false
	}
	fits := m.makeRoom(more)
	if empty := alone && m.used == 0; !small && !fits && !empty { // callers hold what is kept
		return false
	}
	m.reading += more
	r.share.reading += more
	r.size = size
	return true
}

// take is like grow. It returns a problem if there is no room.
func (r *reservation) take(size int64) error {
	if r.grow(size) {
		return nil
	}
	return &problem.Problem{
		Kind: problem.Busy, RetryAfter: time.Second,
		Detail: "the reports that are being read and sent use up the memory for them" + problem.TryAgain,
	}
}

// release returns the reservation.
func (r *reservation) release() {
	m := r.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reading -= r.size
	r.share.reading -= r.size
	r.size = 0
}

// sieve is an eviction order: a list whose links are in the forms. The zero value is empty.
type sieve struct {
	newest, oldest *form
	hand           *form // the next candidate; nil means the oldest
	length         int
}

// visit marks the form as requested. It reads first, which keeps the cache line shared.
func (f *form) visit() {
	if !f.visited.Load() {
		f.visited.Store(true)
	}
}

// add adds f as the newest.
func (s *sieve) add(f *form) {
	f.older = s.newest
	s.newest = f
	if f.older == nil {
		s.oldest = f
	} else {
		f.older.newer = f
	}
	s.length++
}

func (s *sieve) remove(f *form) {
	if s.hand == f {
		s.hand = f.newer
	}
	if f.newer == nil {
		s.newest = f.older
	} else {
		f.newer.older = f.older
	}
	if f.older == nil {
		s.oldest = f.newer
	} else {
		f.older.newer = f.newer
	}
	f.newer, f.older = nil, nil
	s.length--
}

// next returns the form to evict, or nil if there is none. The hand moves from the oldest to the newest form. It spares
// those that were visited since it last passed, and those that callers hold, because to evict them frees nothing.
func (s *sieve) next() *form {
	for range 2 * s.length { // the first round takes the marks
		if s.hand == nil {
			s.hand = s.oldest
		}
		f := s.hand
		if !f.visited.Swap(false) && f.holders.Load() == 0 {
			return f
		}
		s.hand = f.newer
	}
	return nil
}

// shared is what a namespace shares across configurations: the memory tier, and the calls under way that fill it. It holds
// nothing of a configuration, so it outlives each of them.
type shared struct {
	*memory
	calls   coalesce.Group[callKey, fetchResult]
	storage share // of the memory for answers: what is being read from the storage

	membersMu sync.Mutex
	members   map[*member]struct{}

	waiters atomic.Int64 // callers that wait for a report to be finished

	follower atomic.Pointer[harvest.Follower] // nil if nothing is followed
}

// callKey is the key of a call: what is fetched, and the identity of the upstreams. Two configurations that use the same
// upstreams in the same way share a call. A wrong secret of an old configuration does not affect a new one.
type callKey struct{ report, upstreams task.Key }

// origin names an upstream.
type origin struct {
	role problem.Role
	name string // a node's application server ID
}

// fetchResult is what a call gives to all its callers.
type fetchResult struct {
	entry  *entry
	stored bool               // it came from the storage
	from   *origin            // the upstream that answered; nil if it was kept
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

func (s *shared) stats() cli.Cache {
	stats := s.memory.stats()
	stats.Waiters = s.waiters.Load()
	return stats
}

// Interface guard
var _ caddy.Destructor = (*shared)(nil)
