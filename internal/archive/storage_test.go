package archive

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// fakeStorage keeps values in memory, each operation after a delay, and fails on demand.
type fakeStorage struct {
	mu     sync.Mutex
	values map[string][]byte
	delay  time.Duration
	err    error // of every operation
	max    int   // size of a value, if not 0
	loads  int
	stores int
}

func (s *fakeStorage) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *fakeStorage) begin(ctx context.Context) error {
	s.mu.Lock()
	delay, err := s.delay, s.err
	s.mu.Unlock()
	select {
	case <-time.After(delay):
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *fakeStorage) Load(ctx context.Context, k string) ([]byte, error) {
	s.set(func() { s.loads++ })
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	value, ok := s.values[k]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return value, nil
}

func (s *fakeStorage) Store(ctx context.Context, k string, value []byte) error {
	s.set(func() { s.stores++ })
	if err := s.begin(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.max > 0 && len(value) > s.max {
		return fmt.Errorf("value of %d bytes is too large", len(value))
	}
	if s.values == nil {
		s.values = make(map[string][]byte)
	}
	s.values[k] = value
	return nil
}

func (s *fakeStorage) Delete(ctx context.Context, k string) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	s.set(func() { delete(s.values, k) })
	return nil
}

func (s *fakeStorage) Exists(_ context.Context, k string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.values[k]
	return ok
}

func (s *fakeStorage) List(_ context.Context, dir string, _ bool) (keys []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.values {
		if strings.HasPrefix(k, dir+"/") {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// The sweep takes its lock.
func (s *fakeStorage) Lock(context.Context, string) error   { return nil }
func (s *fakeStorage) Unlock(context.Context, string) error { return nil }

func (s *fakeStorage) Stat(context.Context, string) (certmagic.KeyInfo, error) {
	return certmagic.KeyInfo{Modified: time.Now()}, nil
}

// len returns the number of values, without the cursor of the sweep.
func (s *fakeStorage) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.values)
	if _, ok := s.values[tested.sweepCursor()]; ok {
		n--
	}
	return n
}

// tested is the layout of the namespace in the tests.
var tested = newLayout("tested")

// fixture is an archive over a fake storage.
type fixture struct {
	*Archive
	storage *fakeStorage
	backend *Backend
	log     *observer.ObservedLogs
}

// newFixture returns an archive that is closed when the test ends. In a synctest bubble, the test must close it itself.
func newFixture(t *testing.T) *fixture {
	t.Helper()
	core, log := observer.New(zapcore.DebugLevel)
	f := &fixture{Archive: New("tested"), storage: new(fakeStorage), log: log}
	f.backend = &Backend{Storage: f.storage, Logger: zap.New(core), Retention: 24 * time.Hour}
	f.Attach(f.backend)
	t.Cleanup(f.Close)
	return f
}

func numbered(i int) task.Key { return task.NewKey("test", fmt.Sprint(i)) }

// report returns a finished report of a size that compression does not shrink.
func report(size int) *task.Report {
	return task.NewReport(task.Document{
		At: time.Now(), Hash: "0123456789abcdef0123456789abcdef", Length: size, Body: make([]byte, size),
	})
}

func (f *fixture) logged(message string) int { return f.log.FilterMessageSnippet(message).Len() }
