package fsbroker_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

var soakFor = flag.Duration("soak", 0, "how long TestSoak goes on")

// soak is the model: what was done, and what must be true because of it.
type soak struct {
	*site
	directives string

	running  sync.RWMutex // callers hold it to read; who restarts Caddy holds it to write
	tasks    atomic.Int64 // how many there are
	finished sync.Map     // the numbers of those that a node has called finished
	seen     sync.Map     // the numbers of those whose finished report was answered

	requests, faults, reloads, restarts, repeats, excused, lost atomic.Int64
}

// TestSoak mixes callers, polls, faults of nodes and of the storage, reloads and restarts, against the model that every
// finished report that was ever answered is answered again, byte for byte. Only a storage that is away at that moment
// excuses an answer, and then it has to say so.
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("say for how long: -soak 10m")
	}
	fsbroker.SetRetries(t, 10*time.Millisecond, 200*time.Millisecond)
	fault.dir = t.TempDir()
	s := new(soak)
	node := newBackend(t, s.node)
	// Memory is small, so that much of what was seen is only stored.
	s.directives = options(node, `timeout 1s
		poll_interval 20ms
		fail_duration 100ms
		max_report 1MiB
		cache {
			max_size 1MiB
			storage faulty
		}`)
	s.site = startSite(t, s.directives)
	for range 200 { // until what is made once is made
		s.ask(t.Context())
	}
	heap, goroutines := figures()

	ctx, cancel := context.WithTimeout(t.Context(), *soakFor)
	defer cancel()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				s.ask(ctx)
			}
		})
	}
	s.disturb(ctx)
	wg.Wait()

	// In the end, everything that was seen is there.
	s.seen.Range(func(n, _ any) bool {
		s.again(context.Background(), n.(int64), "")
		return true
	})
	s.client.CloseIdleConnections()
	heapAfter, goroutinesAfter := figures()
	seen := 0
	s.seen.Range(func(any, any) bool { seen++; return true })
	t.Logf("%s: %d requests, %d reports seen, %d times answered again, %d times excused, %d faults of nodes and storage, %d reloads, %d restarts, lost: %d",
		*soakFor, s.requests.Load(), seen, s.repeats.Load(), s.excused.Load(), s.faults.Load(), s.reloads.Load(), s.restarts.Load(), s.lost.Load())
	t.Logf("heap %.1f MiB at the start, %.1f MiB at the end; %d goroutines at the start, %d at the end",
		float64(heap)/(1<<20), float64(heapAfter)/(1<<20), goroutines, goroutinesAfter)
	if s.lost.Load() > 0 || seen == 0 || s.repeats.Load() == 0 || s.restarts.Load() == 0 {
		t.Error("reports were lost, or nothing was tried")
	}
	if goroutinesAfter > goroutines+100 {
		t.Error("goroutines are left behind")
	}
}

func figures() (heap uint64, goroutines int) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc, runtime.NumGoroutine()
}

// document is the finished report of a task: always the same, and of a size between 1 and 60 KB.
func document(taskID string) string {
	h := fnv.New64a()
	_, _ = io.WriteString(h, taskID)
	return reportOf(taskID, "SUCCESS") + strings.Repeat(" ", int(h.Sum64()%60_000))
}

// node answers as nodes do, on good days and on bad ones. It knows the newest tasks only.
func (s *soak) node(w http.ResponseWriter, r *http.Request) {
	taskID := r.URL.Query().Get("taskID")
	var n int64
	_, _ = fmt.Sscanf(taskID, "t%d", &n)
	if n < s.tasks.Load()-20 {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, finished := s.finished.Load(n)
	switch fate := rand.IntN(20); {
	case fate < 4:
		s.faults.Add(1)
		s.misbehave(w, r, fate)
	case fate < 7 && !finished:
		responds(http.StatusOK, reportOf(taskID, "SUCCESS", "IN_PROGRESS"))(w, r)
	case fate < 8 && !finished:
		w.WriteHeader(http.StatusNoContent)
	default:
		s.finished.Store(n, true) // a task does not begin again
		responds(http.StatusOK, document(taskID))(w, r)
	}
}

func (s *soak) misbehave(w http.ResponseWriter, r *http.Request, fate int) {
	switch fate {
	case 0:
		w.WriteHeader(http.StatusInternalServerError)
	case 1:
		_, _ = io.WriteString(w, `{"result":{"taskRef`)
	case 2:
		_, _ = io.WriteString(w, strings.Repeat(" ", 2<<20))
	case 3:
		if rand.IntN(10) == 0 {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	}
}

// ask is a caller's: about a new task, or about one whose report was seen before. Some do not wait for the answer.
func (s *soak) ask(ctx context.Context) {
	s.running.RLock()
	defer s.running.RUnlock()
	last := s.tasks.Load()
	n := last
	switch {
	case last == 0 || rand.IntN(10) == 0:
		n = s.tasks.Add(1)
	case rand.IntN(3) > 0:
		n = 1 + rand.Int64N(last)
	}
	if _, ok := s.seen.Load(n); ok {
		s.again(ctx, n, []string{"", "gzip"}[rand.IntN(2)])
		return
	}
	if rand.IntN(20) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(2000))*time.Microsecond)
		defer cancel()
	}
	taskID := fmt.Sprintf("t%d", n)
	r, err := s.question(ctx, taskID, "")
	if err == nil && r.status == http.StatusOK && string(r.body) == document(taskID) {
		s.seen.Store(n, true)
	}
}

func (s *soak) question(ctx context.Context, taskID, accept string) (reply, error) {
	s.requests.Add(1)
	return s.try(ctx, http.MethodGet, "/task?appServerID=node-1&taskID="+taskID, "Authorization: Bearer "+callerSecret, "Accept-Encoding: "+accept)
}

// again asks for what was seen before.
func (s *soak) again(ctx context.Context, n int64, accept string) {
	taskID := fmt.Sprintf("t%d", n)
	for {
		r, err := s.question(ctx, taskID, accept)
		if err != nil {
			return // the end of the soak
		}
		if r.status >= 500 && strings.Contains(string(r.body), "the storage that may have it cannot be read") {
			s.excused.Add(1)
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
				continue
			}
		}
		s.repeats.Add(1)
		if r.status != http.StatusOK || r.plain(s.t) != document(taskID) {
			s.lost.Add(1)
			s.t.Errorf("%s was answered once, and now: status %d, %v, %.300s", taskID, r.status, r.header, r.body)
		}
		return
	}
}

// disturb makes what operators and storages do to a server.
func (s *soak) disturb(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(rand.N(400 * time.Millisecond)):
		}
		switch rand.IntN(4) {
		case 0:
			s.storageFault(nil, errors.New("storage is away"))
		case 1:
			s.storageFault(make(chan struct{}), nil)
		case 2:
			s.load(s.directives + fmt.Sprintf("\n# %d", s.reloads.Add(1)))
		case 3:
			s.running.Lock()
			if err := caddy.Stop(); err != nil {
				s.t.Error(err)
			}
			s.client.CloseIdleConnections()
			s.load(s.directives)
			s.running.Unlock()
			s.restarts.Add(1)
		}
	}
}

// storageFault lets the storage fail or hang for a moment.
func (s *soak) storageFault(hang chan struct{}, err error) {
	s.faults.Add(1)
	setFault(err, hang, false)
	time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
	setFault(nil, nil, false)
	if hang != nil {
		close(hang)
	}
}
