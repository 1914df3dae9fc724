package archive

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/caddyserver/certmagic"
)

// slashed is a storage that lists nothing unless the prefix ends with a slash.
type slashed struct{ certmagic.Storage }

func (s slashed) List(ctx context.Context, prefix string, recursive bool) ([]string, error) {
	if !strings.HasSuffix(prefix, "/") {
		return nil, nil
	}
	return s.Storage.List(ctx, strings.TrimSuffix(prefix, "/"), recursive)
}

// shallow is a storage that lists one folder, although it is asked for all below it.
type shallow struct{ certmagic.Storage }

func (s shallow) List(ctx context.Context, prefix string, _ bool) ([]string, error) {
	return s.Storage.List(ctx, prefix, false)
}

// All values below a folder are listed, whatever the storage makes of a prefix.
func TestListBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		want := []string{"a/b/1", "a/b/2", "a/c/d/3"}
		for _, name := range append([]string{"ab/4", "b/a/b/5"}, want...) {
			f.storage.Put(name, []byte(name))
		}
		inner := f.storage.Storage()
		for name, storage := range map[string]certmagic.Storage{"as it is": inner, "slashed": slashed{inner}, "shallow": shallow{inner}} {
			names, err := listBelow(t.Context(), storage, "a", func(name string) bool { return strings.ContainsAny(name, "123") })
			if err != nil || !slices.Equal(names, want) {
				t.Errorf("%s: listed %q, error %v", name, names, err)
			}
		}
	})
}
