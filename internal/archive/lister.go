package archive

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/caddyserver/certmagic"
)

// trustFlat is the number of recursive lists that must fail in a row, where flat ones work, until no other is tried.
const trustFlat = 3

// lister lists what a storage has. Storage modules differ in what they list: what is in the folder, or all that is below it,
// or even all that there is; with or without folders, with or without a slash at the end, and with a prefix of their own. To
// some, a recursive list is an error.
type lister struct {
	storage certmagic.Storage
	flat    atomic.Int32 // the recursive lists that have failed in a row where flat ones worked
}

// below returns the names of all values below a folder. It asks for everything, keeps what is below the folder, and looks into
// those folders of which nothing else was listed.
func (l *lister) below(ctx context.Context, folder string, isValue func(name string) bool) ([]string, error) {
	values := make(map[string]struct{})
	asked := make(map[string]bool)
	for pending := []string{folder}; len(pending) > 0; {
		next := pending[0]
		pending = pending[1:]
		if asked[next] {
			continue
		}
		asked[next] = true
		found, err := l.list(ctx, next)
		if err := ignoreNotExist(err); err != nil {
			return nil, fmt.Errorf("listing %s: %w", next, err)
		}
		if len(found) == 0 && next == folder && err == nil {
			pending = append(pending, folder+"/")
		}
		pending = append(pending, sortOut(found, folder, isValue, values)...)
	}
	return slices.Sorted(maps.Keys(values)), nil
}

// list lists a folder recursively, or flat if that is all that the storage can do.
func (l *lister) list(ctx context.Context, folder string) ([]string, error) {
	if l.flat.Load() >= trustFlat {
		return l.storage.List(ctx, folder, false)
	}
	found, err := l.storage.List(ctx, folder, true)
	if ignoreNotExist(err) == nil {
		l.flat.Store(0)
		return found, err
	}
	if ctx.Err() != nil || isRefusal(err) {
		return nil, err
	}
	flat, flatErr := l.storage.List(ctx, folder, false)
	if ignoreNotExist(flatErr) != nil {
		return nil, err
	}
	l.flat.Add(1)
	return flat, flatErr
}

// sortOut adds the values among the names that a storage has listed, and returns the folders that it has not looked into.
func sortOut(found []string, folder string, isValue func(name string) bool, values map[string]struct{}) (folders []string) {
	filled := make(map[string]bool) // the folders of the values
	below := folder + "/"
	for _, name := range found {
		i := strings.Index(name, below)
		if i < 0 || i > 0 && name[i-1] != '/' {
			continue
		}
		name = name[i:]
		if !isValue(name) {
			folders = append(folders, name)
			continue
		}
		values[name] = struct{}{}
		for end := len(name); end > len(folder); {
			end = strings.LastIndexByte(name[:end], '/')
			filled[name[:end]] = true
		}
	}
	return slices.DeleteFunc(folders, func(name string) bool { return filled[strings.TrimSuffix(name, "/")] })
}
