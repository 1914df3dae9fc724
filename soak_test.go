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
)

var soakFor = flag.Duration("soak", 0, "how long TestSoak runs")

// soak is the model: what happened, and what must be true because of it.
type soak struct {
	*site
	directives string

	running  sync.RWMutex // callers hold it for reading, a restart of Caddy for writing
	tasks    atomic.Int64 // the number of tasks
	finished sync.Map     // the numbers of the tasks that the node has finished
	seen     sync.Map     // the numbers of the tasks whose finished report a caller got

	requests, faults, reloads, restarts, repeats, excused, lost atomic.Int64
}

// TestSoak mixes callers, polls, faults of the node and the storage, reloads and restarts. Once a caller got a finished
// report, callers must get it again, byte for byte. The one excuse is a storage that fails at that moment, and the
// response must say so.
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("to run it, set a time: -soak 10m")
	}
	fault.dir = t.TempDir()
	s := new(soak)
	node := newBackend(t, s.node)
	// Memory is small, so that many of the seen reports are in the storage only.
	s.directives = options(node, `timeout 1s
		poll_interval 20ms
		fail_duration 100ms
		max_report 1MiB
		cache {
			max_size 1MiB
			storage faulty
		}`)
	s.site = startSite(t, s.directives)
	for range 200 { // a warm-up, before memory is measured
		s.request(t.Context())
	}
	heap, goroutines := usage()

	ctx, cancel := context.WithTimeout(t.Context(), *soakFor)
	defer cancel()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				s.request(ctx)
			}
		})
	}
	s.disturb(ctx)
	wg.Wait()

	// At the end, every seen report is there.
	s.seen.Range(func(n, _ any) bool {
		s.repeat(context.Background(), n.(int64), "")
		return true
	})
	s.client.CloseIdleConnections()
	heapAfter, goroutinesAfter := usage()
	seen := 0
	s.seen.Range(func(any, any) bool { seen++; return true })
	t.Logf("%s: %d requests, %d reports seen, %d repeats, %d excused, %d faults of the node and the storage, %d reloads, %d restarts, %d lost",
		*soakFor, s.requests.Load(), seen, s.repeats.Load(), s.excused.Load(), s.faults.Load(), s.reloads.Load(), s.restarts.Load(), s.lost.Load())
	t.Logf("heap %.1f MiB at the start, %.1f MiB at the end; %d goroutines at the start, %d at the end",
		float64(heap)/(1<<20), float64(heapAfter)/(1<<20), goroutines, goroutinesAfter)
	if s.lost.Load() > 0 || seen == 0 || s.repeats.Load() == 0 || s.restarts.Load() == 0 {
		t.Error("reports were lost, or the test did nothing")
	}
	if goroutinesAfter > goroutines+100 {
		t.Error("there is a leak of goroutines")
	}
}

// usage returns the size of the heap and the number of goroutines.
func usage() (heap uint64, goroutines int) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc, runtime.NumGoroutine()
}

// document returns the finished report of a task. It is always the same, and has between 1 and 60 KB.
func document(taskID string) string {
	h := fnv.New64a()
	_, _ = io.WriteString(h, taskID)
	return reportOf(taskID, "SUCCESS") + strings.Repeat(" ", int(h.Sum64()%60_000))
}

// node is a handler that responds like a node, sometimes with a fault. It knows the newest tasks only.
func (s *soak) node(w http.ResponseWriter, r *http.Request) {
	taskID := r.URL.Query().Get("taskID")
	var n int64
	_, _ = fmt.Sscanf(taskID, "t%d", &n)
	if n < s.tasks.Load()-20 {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, finished := s.finished.Load(n)
	switch choice := rand.IntN(20); {
	case choice < 4:
		s.faults.Add(1)
		s.nodeFault(w, r, choice)
	case choice < 7 && !finished:
		responds(http.StatusOK, reportOf(taskID, "SUCCESS", "IN_PROGRESS"))(w, r)
	case choice < 8 && !finished:
		w.WriteHeader(http.StatusNoContent)
	default:
		s.finished.Store(n, true) // it stays finished
		responds(http.StatusOK, document(taskID))(w, r)
	}
}

// nodeFault responds with one of four faults.
func (s *soak) nodeFault(w http.ResponseWriter, r *http.Request, choice int) {
	switch choice {
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

// request sends a caller's request for a new task, or for an old one. Some callers leave before they get the response.
func (s *soak) request(ctx context.Context) {
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
		s.repeat(ctx, n, []string{"", "gzip"}[rand.IntN(2)])
		return
	}
	if rand.IntN(20) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(2000))*time.Microsecond)
		defer cancel()
	}
	taskID := fmt.Sprintf("t%d", n)
	r, err := s.fetch(ctx, taskID, "")
	if err == nil && r.status == http.StatusOK && string(r.body) == document(taskID) {
		s.seen.Store(n, true)
	}
}

// fetch sends one request for a task.
func (s *soak) fetch(ctx context.Context, taskID, accept string) (reply, error) {
	s.requests.Add(1)
	return s.try(ctx, http.MethodGet, "/task?appServerID=node-1&taskID="+taskID, "Authorization: Bearer "+callerSecret, "Accept-Encoding: "+accept)
}

// repeat requests a report that a caller got before, and checks that it is the same.
func (s *soak) repeat(ctx context.Context, n int64, accept string) {
	taskID := fmt.Sprintf("t%d", n)
	for {
		r, err := s.fetch(ctx, taskID, accept)
		if err != nil {
			return // the test ends
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
		plain, err := r.decoded()
		if r.status != http.StatusOK || plain != document(taskID) {
			s.lost.Add(1)
			s.t.Errorf("%s is lost: status %d, error %v, %v, %.300s", taskID, r.status, err, r.header, r.body)
		}
		return
	}
}

// disturb makes the storage fail, reloads and restarts Caddy, at random times, until ctx ends.
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

// storageFault makes the storage fail or hang for a moment.
func (s *soak) storageFault(hang chan struct{}, err error) {
	s.faults.Add(1)
	setFault(err, hang, false)
	time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond) // how long the fault lasts
	setFault(nil, nil, false)
	if hang != nil {
		close(hang)
	}
}
