package archive

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// testStorage is a storage in memory that fails on demand.
type testStorage struct {
	*storagetest.Faulty
	*storagetest.Memory
}

func newTestStorage() testStorage {
	m := storagetest.New(storagetest.Redis)
	return testStorage{storagetest.NewFaulty(m), m}
}

// Storage returns the storage with its faults.
func (s testStorage) Storage() certmagic.Storage { return s.Faulty.Storage() }

// slow makes each operation take d.
func (s testStorage) slow(d time.Duration) { s.Set(storagetest.Delayed(d)) }

// fail makes each operation fail.
func (s testStorage) fail(err error) { s.Set(storagetest.Failing(err)) }

// stored returns the places of the values.
func (s testStorage) stored() (places []place) {
	for _, name := range s.Names("") {
		if p, ok := tested.parse(name); ok {
			places = append(places, p)
		}
	}
	return places
}

// refuseLarge refuses values of more than 4000 bytes, and lets the others take a while.
func refuseLarge(c storagetest.Call) storagetest.Fault {
	if c.Size > 4000 {
		return storagetest.Fault{Effect: storagetest.None, Err: errors.New("value too large")}
	}
	return storagetest.Fault{Before: time.Millisecond}
}

// tested is the layout of the namespace in the tests.
var tested = newLayout("tested")

// fixture is an archive over a fake storage.
type fixture struct {
	*Archive
	storage testStorage
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
	f := &fixture{storage: newTestStorage(), log: log, confirmed: make(map[task.Key]int)}
	f.backend = &Backend{Name: "tested", Logger: zap.New(core), Retention: 24 * time.Hour}
	c := Config{
		Namespace: "tested", Seed: 1,
		Stored: func(i Item) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.confirmed[i.Key]++
		},
		Room: func() { f.room.Add(1) },
	}
	if set != nil {
		set(f, &c)
	}
	if f.backend.Storage == nil {
		f.backend.Storage = f.storage.Storage()
	}
	f.Archive = New(c)
	f.Attach(f.backend)
	return f
}

// Close closes the archive, and waits for what is under way, which Close of the archive does not.
func (f *fixture) Close() {
	f.Archive.Close()
	f.storage.Mend()
	time.Sleep(time.Minute)
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

// lines returns the lines of the log whose messages have a text, when all are written.
func (f *fixture) lines(text string) *observer.ObservedLogs {
	f.Archive.log.Flush()
	return f.log.FilterMessageSnippet(text)
}

func (f *fixture) logged(text string) int { return f.lines(text).Len() }

func numbered(i int) task.Key { return task.NewKey("test", fmt.Sprint(i)) }

// report returns a finished report of a size that compression does not shrink.
func report(size int) *task.Report { return reportOf(size, [32]byte{}) }

// reportOf returns a finished report of a file.
func reportOf(size int, file [32]byte) *task.Report {
	return task.NewReport(task.Document{
		At: time.Now(), Hash: "0123456789abcdef0123456789abcdef", Length: size, Body: make([]byte, size), File: file,
	})
}
