package fsbroker

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
	"go.uber.org/zap"
)

// storeOld stores a value as if that had been done some time ago.
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
		name := storageKey(numbered(i))
		if i%2 == 0 {
			old = append(old, name)
			storeOld(t, storage, name, 2*time.Hour)
		} else {
			young = append(young, name)
			storeOld(t, storage, name, time.Minute)
		}
	}
	old = append(old, partition(damagedPartition)+"/aa")
	storeOld(t, storage, old[len(old)-1], 2*time.Hour)
	// What is not ours, and in no partition, is left alone.
	storeOld(t, storage, "certificates/a", 2*time.Hour)

	for n := range partitions + 1 { // a round, but for the partitions that hold nothing
		if !storage.Exists(t.Context(), partition(n)) {
			continue
		}
		if err := storage.Store(t.Context(), sweepCursor, fmt.Appendln(nil, n, 0)); err != nil {
			t.Fatal(err)
		}
		if err := sweep(t.Context(), storage, time.Hour); err != nil {
			t.Fatal(err)
		}
		if cursor, err := storage.Load(t.Context(), sweepCursor); err != nil || !strings.HasPrefix(string(cursor), fmt.Sprint((n+1)%(partitions+1))+" ") {
			t.Errorf("after partition %d comes %s, error %v", n, cursor, err)
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

func TestSweepIsOneInstancesWork(t *testing.T) {
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	cursor := func() string {
		value, err := storage.Load(t.Context(), sweepCursor)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return string(value)
	}
	if err := storage.Lock(t.Context(), sweepLock); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_ = sweep(short, storage, time.Hour)
	if got := cursor(); got != "" {
		t.Errorf("a pass was done while another instance had the lock: %s", got)
	}
	if err := storage.Unlock(t.Context(), sweepLock); err != nil {
		t.Fatal(err)
	}

	if err := sweep(t.Context(), storage, time.Hour); err != nil {
		t.Fatal(err)
	}
	first := cursor()
	if err := sweep(t.Context(), storage, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := cursor(); got != first || first == "" {
		t.Errorf("two passes were done at once: %q, %q", first, got)
	}
	for _, broken := range []string{"", "x", "-1 0", "99999 0", "1"} {
		if err := storage.Store(t.Context(), sweepCursor, []byte(broken)); err != nil {
			t.Fatal(err)
		}
		if err := sweep(t.Context(), storage, time.Hour); err != nil || cursor() == broken {
			t.Errorf("a broken cursor %q stopped the sweep: %v", broken, err)
		}
	}
}

func TestSweepIsBounded(t *testing.T) {
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	const n = maxSwept + 200
	for i := range n {
		storeOld(t, storage, fmt.Sprintf("%s/%d", partition(7), i), 2*time.Hour)
	}
	left := func() int {
		keys, err := storage.List(t.Context(), partition(7), false)
		if err != nil {
			t.Fatal(err)
		}
		return len(keys)
	}
	for _, want := range []int{n - maxSwept, 0} {
		if err := sweepPartition(t.Context(), storage, partition(7), time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
		if got := left(); got != want {
			t.Errorf("%d are left, want %d", got, want)
		}
	}
}

// stuck is a storage in which nothing ends until it is let go.
type stuck struct {
	certmagic.Storage
	release chan struct{}
}

func (s *stuck) Store(ctx context.Context, k string, value []byte) error {
	<-s.release
	return s.Storage.Store(ctx, k, value)
}

func TestFullQueue(t *testing.T) {
	storage := &stuck{&certmagic.FileStorage{Path: t.TempDir()}, make(chan struct{})}
	user := &archiveUser{storage: storage, logger: zap.NewNop(), retention: time.Hour}
	a, err := openArchive("full queue", user)
	if err != nil {
		t.Fatal(err)
	}
	r := plainReport(2 << 20)
	fit := 0
	for ; a.save(numbered(fit), r); fit++ {
		if fit > maxQueueBytes/(2<<20) {
			t.Fatal("the queue has no bound")
		}
	}
	if fit < maxQueueBytes/(2<<20)-2 {
		t.Errorf("only %d reports fit", fit)
	}
	if !a.save(numbered(0), r) {
		t.Error("a newer value does not take the place of one that waits")
	}
	a.mu.Lock()
	refused := a.refused
	a.mu.Unlock()
	if refused != 1 {
		t.Errorf("%d were refused", refused)
	}

	// It is stored when it is asked for again.
	h := &Handler{archive: a}
	e := &entry{key: numbered(fit), value: r}
	if h.save(e); !e.unsaved.Load() {
		t.Error("an entry that found no room does not know")
	}
	close(storage.release)
	if err := a.drain(t.Context(), &archiveUser{}); err != nil { // not its last user, so it does not wait
		t.Error(err)
	}
	if err := a.drain(t.Context(), user); err != nil {
		t.Error(err)
	}
	if h.save(e); e.unsaved.Load() {
		t.Error("there is room now, but it was refused again")
	}
	if err := a.drain(t.Context(), user); err != nil {
		t.Error(err)
	}
	if err := a.leave("full queue", user); err != nil {
		t.Error(err)
	}
	for i := range fit + 1 {
		value, err := storage.Load(t.Context(), storageKey(numbered(i)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeStored(numbered(i), value); err != nil {
			t.Error(err)
		}
	}
}

func FuzzStored(f *testing.F) {
	k := numbered(1)
	for _, v := range []keepable{gzippedReport(f, 10), &submission{appServerID: "n1", taskID: "t1"}} {
		value, err := encodeStored(k, v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		v, err := decodeStored(k, value)
		if err != nil {
			return
		}
		if again, err := encodeStored(k, v); err != nil || string(again) != string(value) {
			t.Errorf("%x became %x, error %v", value, again, err)
		}
	})
}
