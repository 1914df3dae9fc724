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

const stored = "cache {\n storage\n }"

const shared = "cache {\n storage file_system SHARED\n }"

// storedIn lists the files that the module has in a storage folder, but for those that are being written.
func storedIn(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "fsbroker_task", "[0-9a-f][0-9a-f][0-9a-f]", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return len(filepath.Base(name)) != 64 })
}

// values are those of a site's own storage.
func (s *site) values() []string { return storedIn(s.t, s.dir) }

func (s *site) wantValues(want int) []string {
	s.t.Helper()
	wantStoredIn(s.t, s.dir, want)
	return s.values()
}

// wantStoredIn waits until there are that many values in a storage folder.
func wantStoredIn(t testing.TB, dir string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d values in the storage", want), func() bool { return len(storedIn(t, dir)) == want })
}

// faulty is a storage that does what a test wants. It is a real one, in a folder, otherwise.
type faulty struct {
	certmagic.Storage `json:"-"`
}

var fault struct {
	sync.Mutex
	dir     string
	err     error         // of every operation
	hang    chan struct{} // what every operation waits for, whatever its context says
	garbage bool          // is what Load finds
	most    int           // bytes that a value may have, where it is not 0
	stored  int
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

func (f *faulty) trouble() error {
	fault.Lock()
	hang, err := fault.hang, fault.err
	fault.Unlock()
	if hang != nil {
		<-hang
	}
	return err
}

func (f *faulty) Load(ctx context.Context, k string) ([]byte, error) {
	if err := f.trouble(); err != nil {
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
	if err := f.trouble(); err != nil {
		return err
	}
	fault.Lock()
	tooLarge := fault.most > 0 && len(value) > fault.most
	fault.stored++
	fault.Unlock()
	if tooLarge {
		return errors.New("value too large")
	}
	return f.Storage.Store(ctx, k, value)
}

// setFault changes what the faulty storage does.
func setFault(err error, hang chan struct{}, garbage bool) {
	fault.Lock()
	defer fault.Unlock()
	fault.err, fault.hang, fault.garbage = err, hang, garbage
}

// wantUnreadable wants a caller to hear of a storage that cannot be read.
func (s *site) wantUnreadable(t *testing.T, node *backend, path string) {
	t.Helper()
	node.setHandler(responds(http.StatusNotFound, "")) // which may be so or not
	s.get(path).wantProblem(t, http.StatusServiceUnavailable, "storage_unavailable")
	node.setHandler(responds(http.StatusInternalServerError, "")) // so that there are two who may be the reason
	r := s.get(path)
	r.wantProblem(t, http.StatusBadGateway, "node_bad_answer")
	if !strings.Contains(string(r.body), "storage that may have it cannot be read either") {
		t.Errorf("the problem does not say that the storage cannot be read: %s", r.body)
	}
}
