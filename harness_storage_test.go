package fsbroker_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/certmagic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// stored is the option for Caddy's own storage.
const stored = "cache {\n storage\n }"

// shared is the option for the folder that processes share. startProcess replaces SHARED.
const shared = "cache {\n storage file_system SHARED\n }"

// storedIn lists the module's files in a storage folder, without those that are being written.
func storedIn(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "fsbroker_task", "*", "[0-9a-f][0-9a-f][0-9a-f]", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return len(filepath.Base(name)) != 64 })
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

// faulty is a storage in a folder that fails as fault says.
type faulty struct {
	certmagic.Storage `json:"-"`
}

// fault is how all faulty storages fail.
var fault struct {
	sync.Mutex
	dir     string
	err     error         // every operation returns it
	hang    chan struct{} // every operation waits for it, without regard to its context
	garbage bool          // Load finds garbage
	most    int           // the bytes that a value may have; 0 means any number

	writes  int // calls of Store
	refused int // those that had a value with too many bytes
}

// writes returns how often a faulty storage was told to store a value, and how often it refused one for its size.
func writes() (all, refused int) {
	fault.Lock()
	defer fault.Unlock()
	return fault.writes, fault.refused
}

func init() { caddy.RegisterModule(new(faulty)) }

func (*faulty) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.storage.faulty", New: func() caddy.Module { return new(faulty) }}
}

func (f *faulty) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }

func (f *faulty) CertMagicStorage() (certmagic.Storage, error) {
	f.Storage = &certmagic.FileStorage{Path: fault.dir}
	return f, nil
}

// fail hangs or returns an error, as fault says.
func (f *faulty) fail() error {
	fault.Lock()
	hang, err := fault.hang, fault.err
	fault.Unlock()
	if hang != nil {
		<-hang
	}
	return err
}

func (f *faulty) Load(ctx context.Context, k string) ([]byte, error) {
	if err := f.fail(); err != nil {
		return nil, err
	}
	fault.Lock()
	defer fault.Unlock()
	if fault.garbage {
		return []byte("garbage"), nil
	}
	return f.Storage.Load(ctx, k)
}

func (f *faulty) Store(ctx context.Context, k string, value []byte) error {
	fault.Lock()
	fault.writes++
	fault.Unlock()
	if err := f.fail(); err != nil {
		return err
	}
	fault.Lock()
	tooLarge := fault.most > 0 && len(value) > fault.most
	if tooLarge {
		fault.refused++
	}
	fault.Unlock()
	if tooLarge {
		return errors.New("value too large")
	}
	return f.Storage.Store(ctx, k, value)
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
	s.get(path).wantProblem(t, http.StatusServiceUnavailable, "storage_unavailable")
	// With both failing, the problem is the node's and mentions the storage.
	node.setHandler(responds(http.StatusInternalServerError, ""))
	r := s.get(path)
	r.wantProblem(t, http.StatusBadGateway, "node_bad_answer")
	if !strings.Contains(string(r.body), "storage that may have it cannot be read either") {
		t.Errorf("the problem does not say that the storage cannot be read: %s", r.body)
	}
}
