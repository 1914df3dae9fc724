package fsbroker_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

// stored is the option for Caddy's own storage.
const stored = "cache {\n storage\n }"

// shared is the option for the folder that processes share. startProcess replaces SHARED.
const shared = "cache {\n storage file_system SHARED\n }"

// storedIn lists the module's files in a storage folder, without those that are being written.
func storedIn(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "fsbroker_task", "*", "[0-9a-f][0-9a-f][0-9a-f]", "[0-9a-f]*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool {
		return len(filepath.Base(name)) != 64 || len(filepath.Base(filepath.Dir(name))) != 16
	})
}

// checkStored checks the value in a file of a storage.
func checkStored(name string, value []byte) error {
	_, inStorage, _ := strings.Cut(filepath.ToSlash(name), "/fsbroker_task/")
	_, err := archive.CheckValue("fsbroker_task/"+inStorage, value, nil)
	return err
}

// storedLater returns a stored value as it would be if the node had answered later. It knows where the time and the
// checksum are.
func storedLater(value []byte, later time.Duration) []byte {
	value = bytes.Clone(value)
	at, sum := value[8:16], value[48:48+sha256.Size]
	binary.BigEndian.PutUint64(at, binary.BigEndian.Uint64(at)+uint64(later))
	clear(sum)
	whole := sha256.Sum256(value)
	copy(sum, whole[:])
	return value
}

// values lists the module's files in the site's own storage.
func (s *site) values() []string { return storedIn(s.t, s.dir) }

// wantValues waits until the site's own storage has that many values, and lists them.
func (s *site) wantValues(want int) []string {
	s.t.Helper()
	wantStoredIn(s.t, s.dir, want)
	return s.values()
}

// wantStoredIn waits until a storage folder has that many values.
func wantStoredIn(t testing.TB, dir string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d values in the storage", want), func() bool { return len(storedIn(t, dir)) == want })
}

// folder is Caddy's own storage, in a folder of a test.
type folder struct {
	Dir string `json:"dir,omitempty"`

	lockingStorage `json:"-"`
}

// lockingStorage is a storage whose locks can be tried.
type lockingStorage interface {
	certmagic.Storage
	certmagic.TryLocker
}

// gates has the gate of each folder: of *storagetest.Gate.
var gates sync.Map

// storageDir returns a folder for storages of this process, which do nothing more when the test ends.
func storageDir(t testing.TB) string {
	t.Helper()
	dir, gate := t.TempDir(), storagetest.NewGate()
	gates.Store(dir, gate)
	t.Cleanup(gate.Close)
	return dir
}

func init() {
	caddy.RegisterModule(new(folder))
	caddy.RegisterModule(new(faulty))
}

func (*folder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.storage.folder", New: func() caddy.Module { return new(folder) }}
}

// UnmarshalCaddyfile reads "folder <dir>".
func (f *folder) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&f.Dir) {
		return d.ArgErr()
	}
	return nil
}

func (f *folder) CertMagicStorage() (certmagic.Storage, error) {
	f.open()
	return f, nil
}

// open opens the folder. That of another process has no gate here.
func (f *folder) open() {
	gate, _ := gates.LoadOrStore(f.Dir, storagetest.NewGate())
	f.lockingStorage = gate.(*storagetest.Gate).Guard(&certmagic.FileStorage{Path: f.Dir}).(lockingStorage)
}

// faulty is a storage in a folder that is slow, and fails as fault says.
type faulty struct {
	folder
	Delay caddy.Duration `json:"delay,omitempty"` // of each operation
}

// fault is how all faulty storages of the process fail.
var fault struct {
	sync.Mutex
	dir     string
	err     error         // every operation returns it
	hang    chan struct{} // every operation waits for it, without regard to its context
	garbage bool          // Load finds garbage

	// before is called before each operation, which returns its error. The operations are "Load", "Store" and so on. The size is
	// that of what is stored.
	before func(operation, key string, size int) error

	writes int // calls of Store
}

// writes returns how often a faulty storage was told to store a value.
func writes() int {
	fault.Lock()
	defer fault.Unlock()
	return fault.writes
}

// beforeEach sets what is called before each operation of the faulty storages, until the test ends.
func beforeEach(t testing.TB, before func(operation, key string, size int) error) {
	set := func(before func(operation, key string, size int) error) {
		fault.Lock()
		defer fault.Unlock()
		fault.before = before
	}
	set(before)
	t.Cleanup(func() { set(nil) })
}

// isReport reports whether a key of a storage is that of a report, and not what instances keep beside them.
func isReport(key string) bool {
	return regexp.MustCompile(`/[0-9a-f]{3}/[0-9a-f]{16}/[0-9a-f]{64}(\.large)?$`).MatchString(key)
}

func (*faulty) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.storage.faulty", New: func() caddy.Module { return new(faulty) }}
}

// UnmarshalCaddyfile reads "faulty [<dir> [<delay>]]".
func (f *faulty) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	var delay string
	if !d.Args(&f.Dir) || !d.Args(&delay) {
		return nil
	}
	duration, err := time.ParseDuration(delay)
	f.Delay = caddy.Duration(duration)
	return err
}

func (f *faulty) CertMagicStorage() (certmagic.Storage, error) {
	if f.Dir == "" { // by default that of fault
		f.Dir = fault.dir
	}
	f.open()
	return f, nil
}

// fail waits, hangs or returns an error, as fault says.
func (f *faulty) fail(operation, key string, size int) error {
	fault.Lock()
	hang, err, before := fault.hang, fault.err, fault.before
	fault.Unlock()
	time.Sleep(time.Duration(f.Delay))
	if hang != nil {
		<-hang
	}
	if before != nil && err == nil {
		err = before(operation, key, size)
	}
	return err
}

func (f *faulty) Load(ctx context.Context, k string) ([]byte, error) {
	if err := f.fail("Load", k, 0); err != nil {
		return nil, err
	}
	fault.Lock()
	garbage := fault.garbage
	fault.Unlock()
	if garbage && isReport(k) {
		return []byte("garbage"), nil
	}
	return f.folder.Load(ctx, k)
}

func (f *faulty) Store(ctx context.Context, k string, value []byte) error {
	fault.Lock()
	fault.writes++
	fault.Unlock()
	if err := f.fail("Store", k, len(value)); err != nil {
		return err
	}
	return f.folder.Store(ctx, k, value)
}

func (f *faulty) Delete(ctx context.Context, k string) error {
	if err := f.fail("Delete", k, 0); err != nil {
		return err
	}
	return f.folder.Delete(ctx, k)
}

func (f *faulty) List(ctx context.Context, k string, recursive bool) ([]string, error) {
	if err := f.fail("List", k, 0); err != nil {
		return nil, err
	}
	return f.folder.List(ctx, k, recursive)
}

func (f *faulty) Lock(ctx context.Context, k string) error {
	if err := f.fail("Lock", k, 0); err != nil {
		return err
	}
	return f.folder.Lock(ctx, k)
}

func (f *faulty) TryLock(ctx context.Context, k string) (bool, error) {
	if err := f.fail("Lock", k, 0); err != nil {
		return false, err
	}
	return f.folder.TryLock(ctx, k)
}

func (f *faulty) Unlock(ctx context.Context, k string) error {
	if err := f.fail("Unlock", k, 0); err != nil {
		return err
	}
	return f.folder.Unlock(ctx, k)
}

// setFault changes how the faulty storages fail.
func setFault(err error, hang chan struct{}, garbage bool) {
	fault.Lock()
	defer fault.Unlock()
	fault.err, fault.hang, fault.garbage = err, hang, garbage
}

// wantUnreadable checks that callers learn that the storage cannot be read.
func (s *site) wantUnreadable(t *testing.T, node *backend, path string) {
	t.Helper()
	// The node does not know the task, but the storage may have the report.
	node.setHandler(responds(http.StatusNotFound, ""))
	unavailable := s.get(path)
	unavailable.wantProblem(t, http.StatusServiceUnavailable, "storage_unavailable")
	if strings.Contains(string(unavailable.body), "away") {
		t.Errorf("the problem shows the storage's error: %s", unavailable.body)
	}
	// With both failing, the problem is the node's and mentions the storage.
	node.setHandler(responds(http.StatusInternalServerError, ""))
	r := s.get(path)
	r.wantProblem(t, http.StatusBadGateway, "node_bad_answer")
	if !strings.Contains(string(r.body), "storage that may have it cannot be read either") {
		t.Errorf("the problem does not say that the storage cannot be read: %s", r.body)
	}
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// overwrite replaces the content of a file.
func overwrite(t testing.TB, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
}
