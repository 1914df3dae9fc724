package archive

import (
	"context"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
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
			l := &lister{storage: storage}
			names, err := l.below(t.Context(), "a", func(name string) bool { return strings.ContainsAny(name, "123") })
			if err != nil || !slices.Equal(names, want) {
				t.Errorf("%s: listed %q, error %v", name, names, err)
			}
		}
	})
}

// A storage that cannot list recursively is soon not asked to. One that fails now and then is.
func TestFlatLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for kind, want := range map[storagetest.Kind]int{storagetest.SQL: 3 + 10, storagetest.Redis: 10} {
			memory := storagetest.New(kind)
			memory.Put("a/1", []byte("1"))
			faulty := storagetest.NewFaulty(memory)
			l := &lister{storage: faulty.Storage()}
			for range 10 {
				if _, err := l.below(t.Context(), "a", func(string) bool { return true }); err != nil {
					t.Error(err)
				}
			}
			if n := faulty.Calls(storagetest.List); n != want {
				t.Errorf("%s: %d lists, want %d", kind, n, want)
			}
		}
		memory := storagetest.New(storagetest.Redis)
		memory.Put("a/1", []byte("1"))
		faulty := storagetest.NewFaulty(memory)
		l := &lister{storage: faulty.Storage()}
		for range 10 {
			faulty.Set(failingOnce())
			for range 2 {
				if _, err := l.below(t.Context(), "a", func(string) bool { return true }); err != nil {
					t.Error(err)
				}
			}
		}
		if n := faulty.Calls(storagetest.List); n != 30 || l.flat.Load() != 0 {
			t.Errorf("%d lists; %d recursive ones have failed in a row", n, l.flat.Load())
		}
	})
}

// failingOnce returns a decision that lets the first call fail.
func failingOnce() func(storagetest.Call) storagetest.Fault {
	var failed bool
	return func(storagetest.Call) storagetest.Fault {
		if failed {
			return storagetest.Fault{}
		}
		failed = true
		return storagetest.Fault{Effect: storagetest.None, Err: storagetest.ErrInjected}
	}
}

// A storage that is away, or hangs, is asked once.
func TestListsOfAStorageThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, fault := range map[string]func(storagetest.Call) storagetest.Fault{
			"refuses": storagetest.Failing(&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}), "hangs": storagetest.Hanging(false),
		} {
			faulty := storagetest.NewFaulty(storagetest.New(storagetest.SQL))
			faulty.Set(fault)
			l := &lister{storage: faulty.Storage()}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if _, err := l.below(ctx, "a", func(string) bool { return true }); err == nil || faulty.Calls(storagetest.List) != 1 {
				t.Errorf("%s: %d lists, error %v", name, faulty.Calls(storagetest.List), err)
			}
			cancel()
		}
	})
}
