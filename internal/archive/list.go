package archive

import (
	"cmp"
	"context"
	"slices"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// listFile returns where there are references to the reports of a file, the newest first.
func (a *Archive) listFile(ctx context.Context, b *Backend, source task.Source) ([]place, error) {
	places, err := a.listPlaces(ctx, b, a.layout.fileFolder(source))
	if err != nil {
		return nil, err
	}
	places = slices.DeleteFunc(places, func(p place) bool { return p.key.Source() != source })
	slices.SortFunc(places, func(p, q place) int { return cmp.Compare(q.at, p.at) })
	return places, nil
}

// listPlaces returns where there are values below a folder.
func (a *Archive) listPlaces(ctx context.Context, b *Backend, folder string) ([]place, error) {
	byName := make(map[string]place)
	names, err := b.lister.below(ctx, folder, func(name string) bool {
		p, ok := a.layout.parse(name)
		if ok {
			byName[name] = p
		}
		return ok
	})
	if err != nil {
		return nil, err
	}
	places := make([]place, len(names))
	for i, name := range names {
		places[i] = byName[name]
	}
	return places, nil
}
