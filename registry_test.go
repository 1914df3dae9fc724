package fsbroker

import (
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
)

// When a reload removes the storage, operators see that of the newest site: none.
func TestStatsOfTheNewestSite(t *testing.T) {
	ns, err := useNamespace(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	a := archive.New(archive.Config{Namespace: ns.name})
	defer a.Close()
	older, newer := newResolver(ns, nil, nil, resolverOptions{archive: a}), newResolver(ns, nil, nil, resolverOptions{})
	for _, site := range []*resolver{older, newer} {
		ns.join(site, 1)
		if got := liveStats().caches[ns.name].Storage; (got != nil) != (site.archive != nil) {
			t.Errorf("the storage is %+v beside the archive %p", got, site.archive)
		}
	}
	ns.leave(newer)
	if liveStats().caches[ns.name].Storage == nil {
		t.Error("there is no storage although the site without one has left")
	}
	ns.leave(older)
	if _, exists := liveStats().caches[ns.name]; exists {
		t.Error("there is a cache without a site")
	}
	if err := ns.disuse(); err != nil {
		t.Error(err)
	}
}
