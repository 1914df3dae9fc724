package fsbroker

import (
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/trace"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/coalesce"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// shared is what a namespace shares across configurations: the memory tier, and the calls under way that fill it. It holds
// nothing of a configuration, so it outlives each of them.
type shared struct {
	*memory
	calls   coalesce.Group[callKey, fetchResult]
	storage budget.Share // of the memory for answers: what is being read from the storage

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
