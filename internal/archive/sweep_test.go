package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
)

// stuckStorage does not store anything until it is released.
type stuckStorage struct {
	certmagic.Storage
	release chan struct{}
}

func (s *stuckStorage) Store(ctx context.Context, k string, value []byte) error {
	<-s.release
	return s.Storage.Store(ctx, k, value)
}

// storeOld stores a value of a certain age.
func storeOld(t *testing.T, storage *certmagic.FileStorage, name string, age time.Duration) {
	t.Helper()
	if err := storage.Store(t.Context(), name, []byte("x")); err != nil {
		t.Fatal(err)
	}
	then := time.Now().Add(-age)
	if err := os.Chtimes(storage.Filename(name), then, then); err != nil {
		t.Fatal(err)
	}
}

func TestSweep(t *testing.T) {
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	var old, young []string
	for i := range 100 {
		name := tested.key(numbered(i))
		if i%2 == 0 {
			old = append(old, name)
			storeOld(t, storage, name, 2*time.Hour)
		} else {
			young = append(young, name)
			storeOld(t, storage, name, time.Minute)
		}
	}
	old = append(old, tested.partition(damagedPartition)+"/aa")
	storeOld(t, storage, old[len(old)-1], 2*time.Hour)
	// A value of another module is in no partition and is left alone.
	storeOld(t, storage, "certificates/a", 2*time.Hour)

	for n := range partitions + 1 { // a round, without the empty partitions
		if !storage.Exists(t.Context(), tested.partition(n)) {
			continue
		}
		if err := storage.Store(t.Context(), tested.sweepCursor(), fmt.Appendln(nil, n, 0)); err != nil {
			t.Fatal(err)
		}
		if err := tested.sweep(t.Context(), storage, time.Hour); err != nil {
			t.Fatal(err)
		}
		if cursor, err := storage.Load(t.Context(), tested.sweepCursor()); err != nil || !strings.HasPrefix(string(cursor), fmt.Sprint((n+1)%(partitions+1))+" ") {
			t.Errorf("partition %d is followed by %s, error %v", n, cursor, err)
		}
	}
	for _, name := range old {
		if storage.Exists(t.Context(), name) {
			t.Errorf("%s is still there", name)
		}
	}
	for _, name := range append(young, "certificates/a") {
		if !storage.Exists(t.Context(), name) {
			t.Errorf("%s is gone", name)
		}
	}
}

func TestOneInstanceSweeps(t *testing.T) {
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	cursor := func() string {
		value, err := storage.Load(t.Context(), tested.sweepCursor())
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return string(value)
	}
	if err := storage.Lock(t.Context(), tested.sweepLock()); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_ = tested.sweep(short, storage, time.Hour)
	if got := cursor(); got != "" {
		t.Errorf("a pass was made while another instance had the lock: %s", got)
	}
	if err := storage.Unlock(t.Context(), tested.sweepLock()); err != nil {
		t.Fatal(err)
	}

	if err := tested.sweep(t.Context(), storage, time.Hour); err != nil {
		t.Fatal(err)
	}
	first := cursor()
	if err := tested.sweep(t.Context(), storage, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := cursor(); got != first || first == "" {
		t.Errorf("two passes were made at once: %q, %q", first, got)
	}
	for _, broken := range []string{"", "x", "-1 0", "99999 0", "1"} {
		if err := storage.Store(t.Context(), tested.sweepCursor(), []byte(broken)); err != nil {
			t.Fatal(err)
		}
		if err := tested.sweep(t.Context(), storage, time.Hour); err != nil || cursor() == broken {
			t.Errorf("a broken cursor %q stopped the sweep: %v", broken, err)
		}
	}
}

func TestSweepIsBounded(t *testing.T) {
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	const n = maxSwept + 200
	for i := range n {
		storeOld(t, storage, fmt.Sprintf("%s/%d", tested.partition(7), i), 2*time.Hour)
	}
	left := func() int {
		keys, err := storage.List(t.Context(), tested.partition(7), false)
		if err != nil {
			t.Fatal(err)
		}
		return len(keys)
	}
	for _, want := range []int{n - maxSwept, 0} {
		if err := sweepPartition(t.Context(), storage, tested.partition(7), time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
		if got := left(); got != want {
			t.Errorf("%d are left, want %d", got, want)
		}
	}
}

// A namespace with a short retention does not delete the values of another in the same storage, and neither does a purge.
func TestNamespacesAreApart(t *testing.T) {
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	other := newLayout("other")
	k := numbered(1)
	storeOld(t, storage, tested.key(k), 2*time.Hour)
	storeOld(t, storage, other.key(k), 2*time.Hour)
	for n := range partitions {
		if storage.Exists(t.Context(), tested.partition(n)) {
			if err := storage.Store(t.Context(), tested.sweepCursor(), fmt.Appendln(nil, n, 0)); err != nil {
				t.Fatal(err)
			}
			if err := tested.sweep(t.Context(), storage, time.Hour); err != nil {
				t.Fatal(err)
			}
		}
	}
	if storage.Exists(t.Context(), tested.key(k)) || !storage.Exists(t.Context(), other.key(k)) {
		t.Error("the sweep did not delete its own value, or deleted another's")
	}
	if n, err := tested.purge(t.Context(), storage, nil); n != 0 || err != nil {
		t.Errorf("the purge deleted %d values, error %v", n, err)
	}
	if !storage.Exists(t.Context(), other.key(k)) {
		t.Error("the purge deleted the value of another namespace")
	}
}
