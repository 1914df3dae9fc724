package fsbroker

import (
	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
)

// archives pools the archives of a process by namespace and the configuration of the storage.
var archives = caddy.NewUsagePool()

// pooledArchive is an archive in a pool, and the memory whose reports it stores.
type pooledArchive struct {
	*archive.Archive
	memory *memory
}

func newPooledArchive(namespace string, s *shared) pooledArchive {
	p := pooledArchive{memory: s.memory}
	p.Archive = archive.New(archive.Config{
		Namespace: namespace, Metrics: storageMetrics,
		Room: func() { s.saving.resume(p.Archive) },
		Stored: func(i archive.Item) {
			saved := s.saving.stored(i, p.Archive)
			if f := s.follower.Load(); f != nil {
				f.Saved(p.Archive, saved...)
			}
		},
	})
	return p
}

// Destruct implements caddy.Destructor.
func (p pooledArchive) Destruct() error {
	p.memory.saving.detach(p.Archive)
	p.Close()
	return nil
}

// openArchive attaches a backend to the archive of a namespace with that ID. It makes the archive if there is none, and
// stores in it what memory has.
func openArchive(namespace, id string, s *shared, b *archive.Backend) (*archive.Archive, error) {
	v, loaded, err := archives.LoadOrNew(id, func() (caddy.Destructor, error) { return newPooledArchive(namespace, s), nil })
	if err != nil {
		return nil, err
	}
	a := v.(pooledArchive).Archive
	a.Attach(b)
	if !loaded {
		s.saving.attach(a)
	}
	return a, nil
}

// closeArchive undoes openArchive.
func closeArchive(id string, a *archive.Archive, b *archive.Backend) error {
	a.Detach(b)
	_, err := archives.Delete(id)
	return err
}

// Interface guard
var _ caddy.Destructor = pooledArchive{}
