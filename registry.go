package fsbroker

import (
	"slices"
	"sync"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// live has the resolvers of all configurations that run, for metrics and the admin API.
var live registry

// registry is a set of resolvers.
type registry struct {
	mu        sync.Mutex
	resolvers []*resolver
}

func (rg *registry) add(rs *resolver) {
	rg.mu.Lock()
	defer rg.mu.Unlock()
	rg.resolvers = append(rg.resolvers, rs)
}

func (rg *registry) remove(rs *resolver) {
	rg.mu.Lock()
	defer rg.mu.Unlock()
	rg.resolvers = slices.DeleteFunc(rg.resolvers, func(other *resolver) bool { return other == rs })
}

// all returns the current resolvers.
func (rg *registry) all() []*resolver {
	rg.mu.Lock()
	defer rg.mu.Unlock()
	return slices.Clone(rg.resolvers)
}

// upstreamID is how an operator knows a node or a broker.
type upstreamID struct {
	namespace  string
	role       problem.Role
	name, host string
}

// liveUpstream is an upstream with its resolver.
type liveUpstream struct {
	*upstream
	resolver *resolver
}

// upstreams returns the upstreams of all resolvers. During a reload, two resolvers may have the same one.
func (rg *registry) upstreams() map[upstreamID][]liveUpstream {
	all := make(map[upstreamID][]liveUpstream)
	for _, rs := range rg.all() {
		for u := range rs.upstreams() {
			id := upstreamID{rs.namespace, u.role, u.name, u.base.Host}
			all[id] = append(all[id], liveUpstream{u, rs})
		}
	}
	return all
}

// stats returns the current values of the gauges.
func (rg *registry) stats() stats {
	var s stats
	now := time.Now()
	for id, upstreams := range rg.upstreams() {
		one := upstreamStats{namespace: id.namespace, role: id.role, name: id.name, host: id.host, up: true}
		for _, u := range upstreams {
			status, _ := u.health.status(now)
			one.up = one.up && status.works()
			one.inFlight += u.inFlight.Load()
		}
		s.upstreams = append(s.upstreams, one)
	}
	s.caches = make(map[string]cli.Cache)
	for _, rs := range rg.all() { // during a reload, two resolvers may share one cache
		one := rs.shared.stats()
		if rs.archive != nil {
			stats := rs.archive.Stats()
			one.Storage = &stats
		}
		s.caches[rs.namespace] = one
	}
	return s
}

// followers returns the followers of the namespaces that have one.
func (rg *registry) followers() map[string]*harvest.Follower {
	all := make(map[string]*harvest.Follower)
	for _, rs := range rg.all() { // during a reload, two resolvers may share one follower
		if rs.follower != nil {
			all[rs.namespace] = rs.follower
		}
	}
	return all
}

// purgeTarget is what to purge of a resolver.
type purgeTarget struct {
	*resolver
	selection archive.Selection
}

// purgeTargets returns what a purge of q selects, or else what all namespaces have in common, in each namespace whose upstreams
// can know it.
func (rg *registry) purgeTargets(q query, common archive.Selection) (targets []purgeTarget) {
	for _, rs := range rg.all() {
		if s, ok := rs.selection(q, common); ok {
			targets = append(targets, purgeTarget{rs, s})
		}
	}
	return targets
}
