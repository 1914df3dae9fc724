package archive

import (
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// fakeStorage keeps values in memory. Each operation takes a while, and does what fault says before.
type fakeStorage struct {
	mu     sync.Mutex
	values map[string][]byte
	counts map[string]int // operations, by name
	delay  time.Duration
	fault  func(ctx context.Context, operation, key string, value []byte) error // nil means none
}

func (s *fakeStorage) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// slow makes each operation take d.
func (s *fakeStorage) slow(d time.Duration) { s.set(func() { s.delay = d }) }

// misbehave makes each operation do what fault says.
func (s *fakeStorage) misbehave(fault func(ctx context.Context, operation, key string, value []byte) error) {
	s.set(func() { s.fault = fault })
}

// fail makes all operations fail with err, or none if it is nil.
func (s *fakeStorage) fail(err error) {
	s.misbehave(func(context.Context, string, string, []byte) error { return err })
}

func (s *fakeStorage) begin(ctx context.Context, operation, key string, value []byte) error {
	s.mu.Lock()
	if s.counts == nil {
		s.counts, s.values = make(map[string]int), make(map[string][]byte)
	}
	s.counts[operation]++
	delay, fault := s.delay, s.fault
	s.mu.Unlock()
	if err := sleep(ctx, delay); err != nil || fault == nil {
		return err
	}
	return fault(ctx, operation, key, value)
}

// sleep sleeps, unless ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	slept, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-slept.Done()
	return ctx.Err()
}

func (s *fakeStorage) Load(ctx context.Context, k string) ([]byte, error) {
	if err := s.begin(ctx, "Load", k, nil); err != nil {
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
	if err := s.begin(ctx, "Store", k, value); err != nil {
		return err
	}
	s.put(k, value)
	return nil
}

func (s *fakeStorage) Delete(ctx context.Context, k string) error {
	if err := s.begin(ctx, "Delete", k, nil); err != nil {
		return err
	}
	s.set(func() { delete(s.values, k) })
	return nil
}

func (s *fakeStorage) Exists(ctx context.Context, k string) bool {
	_, err := s.Load(ctx, k)
	return err == nil
}

func (s *fakeStorage) List(ctx context.Context, folder string, _ bool) (keys []string, err error) {
	if err := s.begin(ctx, "List", folder, nil); err != nil {
		return nil, err
	}
	return s.names(folder + "/"), nil
}

// get returns the value under a name.
func (s *fakeStorage) get(name string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values[name]
}

// put replaces the value under a name.
func (s *fakeStorage) put(name string, value []byte) { s.set(func() { s.values[name] = value }) }

// names returns the names of the values that begin with prefix.
func (s *fakeStorage) names(prefix string) (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.values {
		if strings.HasPrefix(k, prefix) {
			names = append(names, k)
		}
	}
	slices.Sort(names)
	return names
}

func (s *fakeStorage) Lock(ctx context.Context, name string) error {
	return s.begin(ctx, "Lock", name, nil)
}

func (s *fakeStorage) Unlock(ctx context.Context, name string) error {
	return s.begin(ctx, "Unlock", name, nil)
}

// Stat knows no time.
func (s *fakeStorage) Stat(ctx context.Context, k string) (certmagic.KeyInfo, error) {
	return certmagic.KeyInfo{Key: k}, s.begin(ctx, "Stat", k, nil)
}

// count returns the number of operations of a name.
func (s *fakeStorage) count(operation string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[operation]
}

// stored returns the places of the values.
func (s *fakeStorage) stored() (places []place) {
	for _, name := range s.names("") {
		if p, ok := tested.parse(name); ok {
			places = append(places, p)
		}
	}
	return places
}

// tested is the layout of the namespace in the tests.
var tested = newLayout("tested")

// fixture is an archive over a fake storage.
type fixture struct {
	*Archive
	storage *fakeStorage
	backend *Backend
	log     *observer.ObservedLogs

	mu        sync.Mutex
	confirmed map[task.Key]int // reports that are said to be stored

	room atomic.Int32 // how often room was offered
}

// newFixture returns an archive, which must be closed.
func newFixture() *fixture { return newFixtureWith(nil) }

// newFixtureWith returns an archive that set has changed before it starts.
func newFixtureWith(set func(f *fixture, c *Config)) *fixture {
	core, log := observer.New(zapcore.DebugLevel)
	f := &fixture{storage: new(fakeStorage), log: log, confirmed: make(map[task.Key]int)}
	f.backend = &Backend{Logger: zap.New(core), Retention: 24 * time.Hour}
	c := Config{
		Namespace: "tested", Seed: 1,
		Stored: func(k task.Key, _ *task.Report) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.confirmed[k]++
		},
		Room: func() { f.room.Add(1) },
	}
	if set != nil {
		set(f, &c)
	}
	f.backend.Storage = f.storage
	f.Archive = New(c)
	f.Attach(f.backend)
	return f
}

// reopen returns another archive over the same storage.
func (f *fixture) reopen() *fixture {
	return newFixtureWith(func(other *fixture, c *Config) {
		other.storage = f.storage
		c.Seed = f.Seed + 1
	})
}

func (f *fixture) confirmations() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.confirmed)
}

// find loads a report, with all the memory that it needs.
func (f *fixture) find(t *testing.T, k task.Key) (Found, error) {
	t.Helper()
	return f.Load(t.Context(), k, func(int64) error { return nil })
}

func (f *fixture) logged(message string) int { return f.log.FilterMessageSnippet(message).Len() }

func numbered(i int) task.Key { return task.NewKey("test", fmt.Sprint(i)) }

// report returns a finished report of a size that compression does not shrink.
func report(size int) *task.Report { return reportOf(size, [32]byte{}) }

// reportOf returns a finished report of a file.
func reportOf(size int, file [32]byte) *task.Report {
	return task.NewReport(task.Document{
		At: time.Now(), Hash: "0123456789abcdef0123456789abcdef", Length: size, Body: make([]byte, size), File: file,
	})
}
