package fsbroker

import (
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// upstreamID is how an operator knows a node or a broker.
type upstreamID struct {
	namespace  string
	role       problem.Role
	name, host string
}

// liveUpstreams returns the upstreams of all sites. During a reload, two sites may have the same one.
func liveUpstreams() map[upstreamID][]*upstream.Upstream {
	all := make(map[upstreamID][]*upstream.Upstream)
	for ns := range eachNamespace() {
		for _, site := range ns.members() {
			for u := range site.upstreams() {
				id := upstreamID{ns.name, u.Role, u.Name, u.Host()}
				all[id] = append(all[id], u)
			}
		}
	}
	return all
}

// liveStats returns the current values of the gauges.
func liveStats() stats {
	s := stats{caches: make(map[string]cli.Cache)}
	for id, upstreams := range liveUpstreams() {
		one := upstreamStats{namespace: id.namespace, role: id.role, name: id.name, host: id.host, up: true}
		for _, u := range upstreams {
			status, _ := u.Status()
			one.up = one.up && status.Works()
			one.inFlight += u.InFlight()
		}
		s.upstreams = append(s.upstreams, one)
	}
	for ns := range eachNamespace() {
		for _, site := range ns.members() { // during a reload, there may be two: the newest counts
			one := ns.memory.stats()
			one.Waiters = ns.waiters.Load()
			if site.archive != nil {
				stats := site.archive.Stats()
				one.Storage = &stats
			}
			s.caches[ns.name] = one
		}
	}
	return s
}

// liveFollowers returns the followers of the namespaces that have one.
func liveFollowers() map[string]*harvest.Follower {
	all := make(map[string]*harvest.Follower)
	for ns := range eachNamespace() {
		if f := ns.follower.Load(); f != nil {
			all[ns.name] = f
		}
	}
	return all
}

// purgeTarget is what to purge of a site.
type purgeTarget struct {
	*resolver
	selection archive.Selection
}

// purgeTargets returns what a purge of an ID selects, or else what all namespaces have in common, in each namespace whose
// upstreams can know it.
func purgeTargets(id harvest.ID, common archive.Selection) (targets []purgeTarget) {
	for ns := range eachNamespace() {
		for _, site := range ns.members() {
			if s, ok := site.selection(id, common); ok {
				targets = append(targets, purgeTarget{site.resolver, s})
			}
		}
	}
	return targets
}
