package fsbroker_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

// slow returns the option for a faulty storage in a folder, each operation of which takes a while.
func slow(dir string, delay time.Duration) string {
	return fmt.Sprintf("cache {\n storage faulty %s %s\n }", dir, delay)
}

// anyTask responds with the finished report of the task that is asked for.
func anyTask(w http.ResponseWriter, r *http.Request) {
	responds(http.StatusOK, reportOf(r.URL.Query().Get("taskID"), "SUCCESS"))(w, r)
}

func taskPath(i int) string { return fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i) }

// getAll asks for the tasks 0 to n-1, by a number of callers at once, and returns how long each had to wait. Each must get
// the finished report.
func (s *site) getAll(n, callers int) []time.Duration {
	s.t.Helper()
	took := make([]time.Duration, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				begin := time.Now()
				r, err := s.try(s.t.Context(), http.MethodGet, taskPath(i), "Authorization: Bearer "+callerSecret)
				took[i] = time.Since(begin)
				if err != nil || string(r.body) != reportOf(fmt.Sprintf("t%d", i), "SUCCESS") {
					s.t.Errorf("%d: status %d, error %v: %s", i, r.status, err, r.body)
				}
			}
		})
	}
	wg.Wait()
	return took
}

// 300 callers read 400 stored reports after a restart. Callers wait for a full pool, which is no failure. TestManyReads in
// internal/archive checks how long they wait, on a virtual clock.
func TestManyCallersReadFromASlowStorage(t *testing.T) {
	fsbroker.SkipIfShort(t)
	inBubble(t, func(t *testing.T) {
		dir := storageDir(t)
		node := newBackend(t, anyTask)
		s := startSite(t, options(node, slow(dir, 0)))
		const reports = 400
		s.getAll(reports, 50)
		wantStoredIn(t, dir, reports)
		node.setHandler(responds(http.StatusNotFound, ""))
		s.restart(options(node, slow(dir, 20*time.Millisecond)))
		took := s.getAll(reports, 300)
		slices.Sort(took)
		t.Logf("the p99 is %s", took[reports*99/100]) // examples/bench measures it
		if n := len(s.logged("the storage fails")); n != 0 {
			t.Errorf("the log says %d times that the storage fails", n)
		}
	})
}

// 300 finished reports a second are stored as they come.
func TestManyReportsToASlowStorage(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	inBubble(t, func(t *testing.T) {
		dir := storageDir(t)
		node := newBackend(t, anyTask)
		s := startWithAdmin(t, options(node, slow(dir, 20*time.Millisecond)), "")
		const rate, reports = 300, 1500
		most := 0
		var wg sync.WaitGroup
		tick := time.NewTicker(time.Second / rate)
		defer tick.Stop()
		for i := range reports {
			<-tick.C
			wg.Go(func() { <-s.goGet(taskPath(i)) })
			if i%100 == 0 {
				most = max(most, s.queued())
			}
		}
		wg.Wait()
		if most > rate {
			t.Errorf("%d reports were queued", most)
		}
		begin := time.Now()
		s.wantQueueEmpty()
		if took := time.Since(begin); took > time.Second {
			t.Errorf("the last report is stored %s after it was answered", took)
		}
		wantStoredIn(t, dir, reports)
	})
}

// SIGTERM right after 2,000 finished reports: all are stored, even if one slow client uses up the grace period.
func TestTerminatedWithAFullQueue(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	for name, test := range map[string]struct {
		delay time.Duration
		grace string
		holds bool
	}{
		"at once":            {20 * time.Millisecond, "5s", false},
		"with a slow client": {20 * time.Millisecond, "1ms", true},
		"with both slow":     {200 * time.Millisecond, "2s", true}, // storing takes 8 s
		"without an end":     {20 * time.Millisecond, "0", true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Query().Get("taskID") == "large" {
					responds(http.StatusOK, dense(16<<20))(w, r)
					return
				}
				anyTask(w, r)
			})
			p := startProcessWithGrace(t, dir, options(node, strings.Replace(slow("SHARED", test.delay), "}", "max_size 1GiB\n}", 1)), test.grace)
			reports := 2000
			if fsbroker.RaceDetector {
				reports = 500
			}
			all := reports
			if test.holds {
				resp := p.hold("/task?appServerID=node-1&taskID=large")
				defer resp.Body.Close()
				all++
			}
			p.getAll(reports, 100)
			if test.grace == "0" {
				p.signal(syscall.SIGTERM)
				wantStoredIn(t, dir, all) // although the process never ends
				return
			}
			p.terminate()
			if n := len(storedIn(t, dir)); n != all {
				t.Errorf("%d of %d reports are stored", n, all)
			}
		})
	}
}

// hold sends a request and reads nothing but the beginning of the response.
func (s *site) hold(path string) *http.Response {
	s.t.Helper()
	client := &http.Client{Transport: s.client.Transport.(*http.Transport).Clone()}
	s.t.Cleanup(client.CloseIdleConnections)
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, s.base+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+callerSecret)
	resp, err := client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := io.ReadFull(resp.Body, make([]byte, 10)); err != nil {
		s.t.Fatal(err)
	}
	return resp
}

// terminate ends the process like systemd does, and waits for it.
func (p *process) terminate() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	_ = p.cmd.Wait() // an exceeded grace period is an error
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	p.client.CloseIdleConnections()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// A value that takes 3 s to read costs nobody else anything, and is answered itself.
func TestOneSlowValue(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		node := newBackend(t, anyTask)
		directives := options(node, "cache {\n storage faulty\n }")
		s := startSite(t, directives)
		const reports = 200
		s.getAll(reports, 50)
		wantStoredIn(t, fault.dir, reports)
		node.setHandler(responds(http.StatusNotFound, ""))
		s.restart(directives)
		var first atomic.Bool
		beforeEach(t, func(operation, key string, _ int) error {
			if operation == "Load" && isReport(key) && !first.Swap(true) {
				time.Sleep(3 * time.Second)
			}
			return nil
		})
		begin := time.Now()
		slowest := s.goGet(taskPath(reports - 1))
		eventually(t, "the slow read to begin", first.Load)
		if took := slices.Max(s.getAll(reports-1, 50)); took > 2*time.Second {
			t.Errorf("another report took %s", took)
		}
		r := <-slowest
		r.wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
		if took := time.Since(begin); took < 3*time.Second {
			t.Errorf("the slow value took %s", took)
		}
	})
}

// A lock that hangs costs one goroutine, and neither reads nor writes.
func TestLockThatHangs(t *testing.T) {
	for _, operation := range []string{"Lock", "Unlock"} {
		t.Run(operation, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				fault.dir = storageDir(t)
				node := newBackend(t, anyTask)
				hang := make(chan struct{})
				var hung atomic.Int64
				beforeEach(t, func(called, _ string, _ int) error {
					if called == operation {
						hung.Add(1)
						<-hang
					}
					return nil
				})
				s := startSite(t, options(node, "cache {\n storage faulty\n retention 4s\n }")) // which is swept every second
				eventually(t, "the lock to hang", func() bool { return hung.Load() > 0 })
				for round := range 3 {
					time.Sleep(time.Second)
					s.get(taskPath(round)).wantStatus(t, http.StatusOK)
					s.get("/task?appServerID=node-1&taskID=other").wantStatus(t, http.StatusOK)
				}
				eventually(t, "the reports to be stored", func() bool { return len(storedIn(t, fault.dir)) > 0 })
				if n := hung.Load(); n != 1 {
					t.Errorf("%d goroutines hang", n)
				}
				close(hang)
			})
		})
	}
}

// An unfinished report that is polled is looked for in the storage once, and once more before a 404 is told.
func TestPollingReadsTheStorageOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		var reads atomic.Int64
		beforeEach(t, func(operation, key string, _ int) error {
			if operation == "Load" && isReport(key) {
				reads.Add(1)
			}
			return nil
		})
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startSite(t, options(node, "poll_interval 1ms\ncache {\n storage faulty\n }"))
		for range 40 {
			s.get(pair).wantStatus(t, http.StatusOK)
			time.Sleep(2 * time.Millisecond)
		}
		if n := reads.Load(); n != 1 {
			t.Errorf("the storage was read %d times", n)
		}
		if n := len(node.requests()); n < 30 {
			t.Fatalf("the node was asked %d times only", n)
		}
		node.setHandler(responds(http.StatusNotFound, ""))
		s.get(pair).wantProblem(t, http.StatusNotFound, "unknown_task")
		if n := reads.Load(); n != 2 {
			t.Errorf("after a 404, the storage was read %d times", n)
		}

		// What is stored meanwhile is found, although it was absent.
		node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		s.get(pair).wantStatus(t, http.StatusOK)
		wantStoredIn(t, fault.dir, 1)
	})
}

// Reports that were queued for a storage that failed are stored in the one that is configured after it.
func TestAnotherStorageAfterOneThatFailed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		node := newBackend(t, anyTask)
		s := startSite(t, options(node, "cache {\n storage faulty\n }"))
		setFault(errors.New("away"), nil, false)
		defer setFault(nil, nil, false)
		const reports = 50
		s.getAll(reports, 10)
		s.load(options(node, stored))
		s.wantValues(reports)
		node.setHandler(responds(http.StatusNotFound, ""))
		s.restart(options(node, stored))
		s.getAll(reports, 10)
	})
}

// What is read from the storage needs memory like what is read from a node. Where there is none, callers are told so.
func TestReadingFromTheStorageNeedsMemory(t *testing.T) {
	fsbroker.SkipIfShort(t)
	inBubble(t, func(t *testing.T) {
		dir := storageDir(t)
		const reports = 8
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			responds(http.StatusOK, strings.Replace(dense(2<<20), "SUCCESS", "SUCCESS "+r.URL.Query().Get("taskID"), 1))(w, r)
		})
		s := startSite(t, options(node, slow(dir, 0)))
		for i := range reports {
			s.get(taskPath(i)).wantStatus(t, http.StatusOK)
		}
		wantStoredIn(t, dir, reports)
		node.setHandler(responds(http.StatusNotFound, ""))
		s.restart(options(node, strings.Replace(slow(dir, 200*time.Millisecond), "}", "max_size 6MiB\n}", 1)))
		busy, found := 0, 0
		var replies [reports]<-chan reply
		for i := range reports {
			replies[i] = s.goGet(taskPath(i))
		}
		for _, one := range replies {
			switch r := <-one; r.status {
			case http.StatusOK:
				found++
			default:
				r.wantProblem(t, http.StatusServiceUnavailable, "busy")
				if r.header.Get("Retry-After") == "" {
					t.Error("without Retry-After")
				}
				busy++
			}
		}
		if busy == 0 || found == 0 {
			t.Errorf("%d found, %d busy", found, busy)
		}
		for i := range reports { // one after the other
			s.get(taskPath(i)).wantStatus(t, http.StatusOK)
		}
	})
}

// A value of a newer version is left alone, is no report, and is not overwritten.
func TestValueOfANewerVersion(t *testing.T) {
	node := newBackend(t, anyTask)
	s := startSite(t, options(node, stored))
	s.get(pair).wantStatus(t, http.StatusOK)
	name := s.wantValues(1)[0]
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	newer := readFile(t, name)
	newer[4]++
	overwrite(t, name, newer)
	s.restart(options(node, stored))
	for range 2 {
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
		s.restart(options(node, stored))
	}
	s.get(pair+"&nocache").wantStatus(t, http.StatusOK)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(readFile(t, name), newer) || len(s.values()) != 1 {
		t.Error("it was changed")
	}
	if n := len(s.logged("cannot be read and is left alone")); n == 0 || n > 4 { // once in each life
		t.Errorf("%d warnings", n)
	}
}

// The memory that a storage takes that is away is bounded.
func TestMemoryOfAStorageThatIsAway(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	fault.dir = storageDir(t)
	document := dense(512 << 10)
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		responds(http.StatusOK, strings.Replace(document, "SUCCESS", "SUCCESS "+r.URL.Query().Get("taskID"), 1))(w, r)
	})
	s := startSite(t, options(node, "cache {\n storage faulty\n max_size 16MiB\n }"))
	setFault(errors.New("away"), nil, false)
	defer setFault(nil, nil, false)
	before := liveHeap()
	for i := range 600 {
		s.get(taskPath(i)).wantStatus(t, http.StatusOK)
	}
	if grown := liveHeap() - before; grown > 16*mib+64*mib+20*mib {
		t.Errorf("the heap has grown by %d MiB", grown/mib)
	}
	runtime.KeepAlive(s)
}
