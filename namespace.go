package fsbroker

import (
	"cmp"
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/coalesce"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// namespace is what outlives a configuration, under a name: the reports in memory, the calls under way that fill it, the
// archives, and what is followed. What a configuration adds to it, such as its site, leaves it with the configuration.
type namespace struct {
	name    string
	memory  *memory
	calls   coalesce.Group[callKey, result]
	storage budget.Share // of the memory for answers: what is being read from storages
	waiters atomic.Int64 // callers that wait for a report to be finished

	follower atomic.Pointer[harvest.Follower] // nil if no site follows anything

	mu        sync.Mutex       // guards the fields below
	sites     []member         // the newest last
	tiers     map[string]*tier // by the IDs of the storages; during a reload with another storage, there are two
	following int              // how many sites follow anything
}

// member is a site in its namespace.
type member struct {
	*resolver
	limit int64 // of memory, in bytes
}

// tier is an archive, with the number of sites that use it.
type tier struct {
	archive *archive.Archive
	sites   int
}

// callKey is the key of a call: what is fetched, and the identity of the upstreams. Two configurations that use the same
// upstreams in the same way share a call. A wrong secret of an old configuration does not affect a new one.
type callKey struct{ report, upstreams task.Key }

// namespaces has the namespaces of the process, by their names, for as long as a configuration uses them: a new one is
// provisioned before the old one is cleaned up.
var namespaces = caddy.NewUsagePool()

// useNamespace returns the namespace with a name. It must be given back with disuse.
func useNamespace(name string) (*namespace, error) {
	v, _, err := namespaces.LoadOrNew(name, func() (caddy.Destructor, error) { return newNamespace(name), nil })
	if err != nil {
		return nil, err
	}
	return v.(*namespace), nil
}

func newNamespace(name string) *namespace {
	return &namespace{name: name, memory: newMemory(0), tiers: make(map[string]*tier)}
}

// disuse undoes useNamespace. Memory keeps no more than the sites that are left allow from then on. If none is left, its limit
// stays, for the benefit of one that joins at once.
func (ns *namespace) disuse() error {
	ns.mu.Lock()
	if len(ns.sites) > 0 {
		ns.applyLimit()
	}
	ns.mu.Unlock()
	_, err := namespaces.Delete(ns.name)
	return err
}

// Destruct implements caddy.Destructor.
func (ns *namespace) Destruct() error {
	ns.memory.close()
	return nil
}

// eachNamespace iterates over all namespaces.
func eachNamespace() iter.Seq[*namespace] {
	return func(yield func(*namespace) bool) {
		namespaces.Range(func(_, ns any) bool { return yield(ns.(*namespace)) })
	}
}

// openArchive returns the archive for the storage with that ID, to which it attaches a backend of its own. If there is no
// archive, it makes one, and stores in it the finished reports that memory has.
func (ns *namespace) openArchive(id string, b *archive.Backend) *archive.Archive {
	ns.mu.Lock()
	t := ns.tiers[id]
	isNew := t == nil
	if isNew {
		t = &tier{archive: ns.newArchive()}
		ns.tiers[id] = t
	}
	t.sites++
	ns.mu.Unlock()
	t.archive.Attach(b)
	if isNew {
		ns.memory.saving.attach(t.archive)
	}
	return t.archive
}

func (ns *namespace) newArchive() (a *archive.Archive) {
	a = archive.New(archive.Config{
		Namespace: ns.name, Metrics: storageMetrics,
		Room: func() { ns.memory.saving.resume(a) },
		Stored: func(i archive.Item) {
			saved := ns.memory.saving.stored(i, a)
			if f := ns.follower.Load(); f != nil {
				f.Saved(a, saved...)
			}
		},
	})
	return a
}

// closeArchive undoes openArchive.
func (ns *namespace) closeArchive(id string, b *archive.Backend) {
	ns.mu.Lock()
	t := ns.tiers[id]
	t.sites--
	isLast := t.sites == 0
	if isLast {
		delete(ns.tiers, id)
	}
	ns.mu.Unlock()
	t.archive.Detach(b)
	if isLast {
		ns.memory.saving.detach(t.archive)
		t.archive.Close()
	}
}

// openFollower returns the follower, and makes it if there is none. A follower asks nothing until a source is attached.
func (ns *namespace) openFollower(logger *zap.Logger) *harvest.Follower {
	var err error
	ns.mu.Lock()
	if ns.following++; ns.following == 1 {
		c := harvest.Config{Namespace: ns.name, Metrics: harvestMetrics}
		c.Instance, c.LockDir, err = instanceName()
		ns.follower.Store(harvest.New(c))
	}
	ns.mu.Unlock()
	if err != nil {
		logger.Warn("this instance has no name that lasts: after a restart, it takes a while until what was pending is resumed", zap.Error(err))
	}
	return ns.follower.Load()
}

// closeFollower undoes openFollower. It must come before closeArchive, because the follower has its notes in the archive.
func (ns *namespace) closeFollower() {
	ns.mu.Lock()
	var last *harvest.Follower
	if ns.following--; ns.following == 0 {
		last = ns.follower.Swap(nil)
	}
	ns.mu.Unlock()
	if last != nil {
		last.Close()
	}
}

// join adds a site, which lets memory have limit bytes. The largest limit of all sites counts.
func (ns *namespace) join(site *resolver, limit int64) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.sites = append(ns.sites, member{site, limit})
	ns.applyLimit()
}

// leave removes a site, whose limit counts until disuse: what is evicted then is not to be stored in its archive any more.
func (ns *namespace) leave(site *resolver) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.sites = slices.DeleteFunc(ns.sites, func(m member) bool { return m.resolver == site })
}

// applyLimit sets the largest limit of all sites. The caller holds the mutex.
func (ns *namespace) applyLimit() {
	largest := slices.MaxFunc(ns.sites, func(a, b member) int { return cmp.Compare(a.limit, b.limit) })
	ns.memory.setLimit(largest.limit)
}

// members returns the sites, the newest last.
func (ns *namespace) members() []member {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return slices.Clone(ns.sites)
}
