package fsbroker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

func TestStoredReportsOutliveTheProcess(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	broker := newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	directives := options(node, brokerOption(broker)+"\n"+stored)
	s := startSite(t, directives)
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	etag := s.get(pair).header.Get("ETag")
	if err := caddy.Stop(); err != nil { // stores what is queued
		t.Fatal(err)
	}
	s.wantValues(2)

	node.setHandler(responds(http.StatusNotFound, ""))
	broker.setHandler(responds(http.StatusNotFound, ""))
	s.restart(directives)
	first := s.get("/task?submitID=s1")
	first.wantStatus(t, http.StatusOK)
	first.wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	first.wantHeader(t, "ETag", etag)
	if first.header.Get("Age") == "" || string(first.body) != document {
		t.Errorf("age %q, %s", first.header.Get("Age"), first.body)
	}
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	if got := s.get(pair, "Accept-Encoding: gzip"); got.header.Get("Content-Encoding") != "gzip" || got.plain(t) != document {
		t.Errorf("compressed: %v", got.header)
	}

	// A stored report is served while its node is down. The problem that a nocache caller gets mentions it.
	node.Close()
	s.restart(directives)
	r := s.get(pair + "&nocache")
	r.wantProblem(t, http.StatusBadGateway, "node_unreachable")
	if !strings.Contains(string(r.body), "without nocache") {
		t.Errorf("the problem does not say that there is a kept report: %s", r.body)
	}
	s.restart(directives)
	s.get("/task?appServerID=node-1&taskID=t2").wantProblem(t, http.StatusBadGateway, "node_unreachable")
	s.get(pair).wantStatus(t, http.StatusOK)
	node.wantRequests(t, 1)
	broker.wantRequests(t, 4) // the submission's report, and why there is none; the tasks that the node did not answer for
	s.wantNoSecretInLog()
}

func TestOnlyWhatIsFinishedIsStored(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if values := s.values(); len(values) > 0 {
		t.Errorf("without a storage, there are the values %v", values)
	}

	broker := newBackend(t, explains(`{"state":"QUEUED"}`))
	directives := options(node, brokerOption(broker)+"\npoll_interval 1ms\n"+stored)
	s.restart(directives)
	s.get("/task?submitID=s1").wantStatus(t, http.StatusNoContent)
	for _, handler := range []http.HandlerFunc{responds(204, ""), responds(404, ""), responds(200, "{"), responds(200, reportOf("t1", "QUEUED"))} {
		node.setHandler(handler)
		s.get(pair)
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if values := s.values(); len(values) > 0 {
		t.Errorf("there are the values %v", values)
	}
}

func TestDamagedValues(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, stored))
	s.get(pair).wantStatus(t, http.StatusOK)
	name := s.wantValues(1)[0]
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(i int) []byte {
		value := bytes.Clone(whole)
		value[i] ^= 1
		return value
	}
	requests := 1
	for what, value := range map[string][]byte{
		"nothing":         {},
		"a short one":     whole[:50],
		"half":            whole[:len(whole)/2],
		"one byte less":   whole[:len(whole)-1],
		"one byte more":   append(bytes.Clone(whole), 0),
		"another time":    flip(12),
		"another sum":     flip(100),
		"another payload": flip(len(whole) - 1),
		"something else":  []byte("-----BEGIN CERTIFICATE-----"),
	} {
		t.Run(what, func(t *testing.T) {
			s := s.in(t)
			if err := caddy.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, value, 0o600); err != nil {
				t.Fatal(err)
			}
			s.restart(options(node, stored))
			r := s.get(pair)
			r.wantStatus(t, http.StatusOK)
			if string(r.body) != document {
				t.Errorf("got %q", r.body)
			}
			requests++
			node.wantRequests(t, requests)
			// An envelope around it gives it a time.
			aside, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(name)), "damaged", filepath.Base(name)))
			if err != nil || !bytes.HasSuffix(aside, value) || checkStored(name, value) == nil {
				t.Errorf("set aside: %q, error %v", aside, err)
			}
			eventually(t, "the report to be stored again", func() bool {
				again, err := os.ReadFile(name)
				return err == nil && len(again) == len(whole)
			})
		})
	}
	if n := len(s.waitLogged(requests-1, "is damaged and is set aside")); n != requests-1 {
		t.Errorf("%d warnings for %d damaged values", n, requests-1)
	}

	// A report under another report's name is damaged as well.
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	node.setHandler(responds(http.StatusOK, reportOf("t2", "SUCCESS")))
	s.restart(options(node, stored))
	s.get("/task?appServerID=node-1&taskID=t2").wantStatus(t, http.StatusOK)
	for _, other := range s.wantValues(2) {
		if err := os.WriteFile(other, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.restart(options(node, stored))
	if r := s.get("/task?appServerID=node-1&taskID=t2"); string(r.body) != reportOf("t2", "SUCCESS") {
		t.Errorf("got %s", r.body)
	}
}

func TestRetentionEndsWhatIsStored(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		const retention = 500 * time.Millisecond
		directives := options(node, fmt.Sprintf("cache {\n storage\n retention %s\n }", retention))
		s := startSite(t, directives)
		start := time.Now()
		s.get(pair).wantStatus(t, http.StatusOK)
		s.wantValues(1)
		var status string
		eventually(t, "the retention to end", func() bool {
			s.restart(directives) // so that the report is not in memory
			status = s.get(pair).header.Get("Cache-Status")
			return status != "fsbroker; hit; detail=storage"
		})
		if status != "fsbroker; fwd=uri-miss; stored" {
			t.Errorf("after the retention: %s", status)
		}
		if took := time.Since(start); took < retention {
			t.Errorf("the report was stored for %s only", took)
		}
	})
}

func TestStorageFaults(t *testing.T) {
	full := &fs.PathError{Op: "write", Path: "a", Err: errors.New("no space left on device")}
	for name, test := range map[string]struct {
		err     error
		hangs   bool
		garbage bool
	}{
		"errors":  {err: errors.New("storage is away")},
		"full":    {err: full},
		"hangs":   {hangs: true},
		"garbage": {garbage: true},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				fault.dir = storageDir(t)
				node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
					responds(http.StatusOK, reportOf(r.URL.Query().Get("taskID"), "SUCCESS"))(w, r)
				})
				directives := options(node, "cache {\n storage faulty\n }\nfail_duration 500ms")
				s := startSite(t, directives)
				var hang chan struct{}
				if test.hangs {
					hang = make(chan struct{})
				}
				setFault(test.err, hang, test.garbage)
				const reports = 50
				begin := time.Now()
				var all [reports]<-chan reply
				for i := range reports {
					all[i] = s.goGet(fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i))
				}
				for i, one := range all {
					if r := <-one; r.status != 200 || string(r.body) != reportOf(fmt.Sprintf("t%d", i), "SUCCESS") {
						t.Fatalf("status %d: %s", r.status, r.body)
					}
				}
				if took := time.Since(begin); took > 5*time.Second {
					t.Errorf("%d responses took %s", reports, took)
				}
				for range 3 { // reloads do not wait for the storage, and lose nothing of the queue
					s.load(directives + "\n# again")
				}
				s.get("/task?appServerID=node-1&taskID=t0").wantHeader(t, "Cache-Status", "fsbroker; hit")
				if !test.garbage {
					s.wantUnreadable(t, node, "/task?appServerID=node-1&taskID=other")
				}

				setFault(nil, nil, false)
				if test.hangs {
					close(hang)
				}
				wantStoredIn(t, fault.dir, reports)
				node.setHandler(responds(http.StatusNotFound, ""))
				s.restart(directives)
				for i := range reports {
					s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i)).wantStatus(t, http.StatusOK)
				}
			})
		})
	}
}

// A storage that refuses connections is told at once. The log and the admin API name it and say why it fails.
func TestStorageThatRefuses(t *testing.T) {
	fault.dir = storageDir(t)
	node := newBackend(t, anyTask)
	s := startWithAdmin(t, options(node, "cache {\n storage faulty\n }"), "")
	address := testsite.Refused(t)
	var dials atomic.Int64
	beforeEach(t, func(operation, _ string, _ int) error {
		if operation == "Load" {
			dials.Add(1)
		}
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	begin := time.Now()
	for i := range 5 {
		s.get(taskPath(i)).wantStatus(t, http.StatusOK)
	}
	probes := 1 + int(time.Since(begin)/(125*time.Millisecond)) // at the most
	if n := int(dials.Load()); n > 1+probes {
		t.Errorf("the storage was read %d times", n)
	}
	refused := "dial tcp " + address + ": connect: connection refused"
	eventually(t, "writes to fail", func() bool { return len(s.logged("the storage fails")) == 2 })
	for _, line := range s.logged("storage") {
		if text, _ := line["error"].(string); line["storage"] != "faulty" || line["level"] == "warn" && !strings.HasSuffix(text, refused) {
			t.Errorf("logged is %v", line)
		}
	}
	_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
	if !strings.Contains(body, `"storage":{"module":"faulty","queued":5`) || !strings.Contains(body, `"failing":true,"error":"`) || !strings.Contains(body, refused) {
		t.Errorf("the admin API answers %s", body)
	}
	runCommand(t, "cache", "--address", s.admin).want(t, 0, `faulty fails +5 .*`+regexp.QuoteMeta(refused)+`\n$`)
	if _, body := s.requestAdmin(http.MethodDelete, "/fsbroker/cache"); !strings.Contains(body, "the storage faulty: ") || !strings.Contains(body, refused) {
		t.Errorf("a purge answers %s", body)
	}
}

func TestStoppingWithAStorageThatHangs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		s := startSite(t, options(node, "cache {\n storage faulty\n }"))
		hang := make(chan struct{})
		setFault(nil, hang, false)
		s.get(pair).wantStatus(t, http.StatusOK)
		begin := time.Now()
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 8*time.Second { // the grace period is 5s
			t.Errorf("stopping took %s", took)
		}
		setFault(nil, nil, false)
		close(hang)
		wantStoredIn(t, fault.dir, 1) // the write that hung
	})
}

// A report that has left memory before it is stored is served from the queue to the storage.
func TestEvictedBeforeItIsStored(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		broker := newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
		document := reportOf("t1", "SUCCESS")
		node := newBackend(t, responds(http.StatusOK, document))
		s := startSite(t, options(node, brokerOption(broker)+"\ncache {\n storage faulty\n max_size 4KiB\n }"))
		hang := make(chan struct{})
		beforeEach(t, func(operation, _ string, _ int) error {
			if operation == "Store" {
				<-hang
			}
			return nil
		})
		s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
		node.setHandler(responds(http.StatusOK, reportOf("t2", "SUCCESS")))
		for i := range 10 { // memory has no room for all of them
			s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=other-%d", i)).wantStatus(t, http.StatusOK)
		}
		node.setHandler(responds(http.StatusNotFound, ""))
		broker.setHandler(responds(http.StatusNotFound, ""))
		if r := s.get("/task?submitID=s1"); string(r.body) != document {
			t.Errorf("status %d: %s", r.status, r.body)
		}
		close(hang)
		wantStoredIn(t, fault.dir, 12)
	})
}

// Values that the storage refuses are retried on their own clock, are logged once each, and hold up nothing.
func TestValuesThatAreRefused(t *testing.T) {
	fsbroker.SkipIfShort(t)
	fault.dir = storageDir(t)
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Query().Get("taskID"), "large") {
			responds(http.StatusOK, dense(20_000))(w, r)
			return
		}
		responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
	})
	s := startSite(t, options(node, "cache {\n storage faulty\n }"))
	var limited atomic.Bool
	var refused atomic.Int64
	limited.Store(true)
	beforeEach(t, func(_, _ string, size int) error {
		if size > 4000 && limited.Load() {
			refused.Add(1)
			return errors.New("value too large")
		}
		return nil
	})
	const large, small = 20, 100
	for i := range large {
		s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=large-%d", i)).wantStatus(t, http.StatusOK)
	}
	for i := range small {
		s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i)).wantStatus(t, http.StatusOK)
	}
	wantStoredIn(t, fault.dir, small)
	eventually(t, "a warning for each", func() bool {
		return len(s.logged("the storage does not take a report: it is retried")) == large
	})
	if n := refused.Load(); n > 10*large {
		t.Errorf("the large reports were tried %d times", n)
	}
	s.get("/task?appServerID=node-1&taskID=another").wantStatus(t, http.StatusOK)
	wantStoredIn(t, fault.dir, small+1)
	limited.Store(false)
	wantStoredIn(t, fault.dir, small+1+large)
	if n := len(s.logged("the storage does not take a report: it is retried")); n != large {
		t.Errorf("%d warnings for %d reports", n, large)
	}
}

// A value that waits for its next try is stored at once when the site stops.
func TestStoppingDoesNotWaitForTheNextTry(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		s := startSite(t, options(node, "cache {\n storage faulty\n }"))
		setFault(errors.New("away"), nil, false)
		defer setFault(nil, nil, false)
		before := writes()
		s.get(pair).wantStatus(t, http.StatusOK)
		// The pause between two tries doubles from 250 ms on, with a jitter of up to a half: after five it is 2 s or more.
		eventually(t, "five tries", func() bool { return writes() >= before+5 })
		setFault(nil, nil, false)
		start := time.Now()
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 1500*time.Millisecond {
			t.Errorf("stopping took %s", took)
		}
		if n := len(storedIn(t, fault.dir)); n != 1 {
			t.Errorf("%d reports are stored", n)
		}
	})
}

// A report that is in memory when a reload adds a storage is stored.
func TestStorageComesWithAReload(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	s.load(options(node, stored))
	s.wantValues(1)
	node.setHandler(responds(http.StatusNotFound, ""))
	s.restart(options(node, stored))
	if r := s.get(pair); string(r.body) != document {
		t.Errorf("status %d: %s", r.status, r.body)
	}
}

// A nocache caller learns that the storage fails, and replaces no finished report by an unfinished one.
func TestNocacheBesideAStorage(t *testing.T) {
	fault.dir = storageDir(t)
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	directives := options(node, "cache {\n storage faulty\n }\nfail_duration 1ms")
	s := startSite(t, directives)
	s.get(pair).wantStatus(t, http.StatusOK)
	wantStoredIn(t, fault.dir, 1)

	s.restart(directives)
	node.setHandler(responds(http.StatusNoContent, ""))
	s.get(pair+"&nocache").wantStatus(t, http.StatusNoContent)
	if r := s.get(pair); string(r.body) != document {
		t.Errorf("after an unfinished report: status %d: %s", r.status, r.body)
	}

	s.restart(directives)
	setFault(errors.New("away"), nil, false)
	defer setFault(nil, nil, false)
	s.wantUnreadable(t, node, pair+"&nocache")
}

// A failed submission has no report, so a storage that fails does not matter.
func TestFailedSubmissionBesideAStorage(t *testing.T) {
	fault.dir = storageDir(t)
	node := newBackend(t, responds(http.StatusNotFound, ""))
	broker := newBackend(t, explains(`{"state":"FAILED"}`))
	s := startSite(t, options(node, brokerOption(broker)+"\ncache {\n storage faulty\n }"))
	setFault(errors.New("away"), nil, false)
	defer setFault(nil, nil, false)
	s.get("/task?submitID=s1").wantProblem(t, http.StatusNotFound, "submission_failed")
}

// The instance that stored the report may have a clock that is ahead.
func TestAgeIsNeverNegative(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, stored))
	s.get(pair).wantStatus(t, http.StatusOK)
	name := s.wantValues(1)[0]
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	value, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, storedLater(value, time.Minute), 0o600); err != nil {
		t.Fatal(err)
	}
	s.restart(options(node, stored))
	r := s.get(pair)
	r.wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	r.wantHeader(t, "Age", "0")
}

func TestInstancesShareReports(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	broker := newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	dir := t.TempDir()
	directives := options(node, brokerOption(broker)+"\n"+shared)
	one, other := startProcess(t, dir, directives), startProcess(t, dir, directives)

	one.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	wantStoredIn(t, dir, 2)
	r := other.get("/task?submitID=s1")
	r.wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	if string(r.body) != document {
		t.Errorf("got %s", r.body)
	}
	other.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	node.wantRequests(t, 1)
	broker.wantRequests(t, 2)
}

func TestKilledInTheMiddleOfWriting(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		responds(http.StatusOK, reportOf(r.URL.Query().Get("taskID"), "SUCCESS")+strings.Repeat(" ", 100<<10))(w, r)
	})
	dir := t.TempDir()
	directives := options(node, shared)
	confirmed := make(map[string]bool)
	for round := range 3 {
		p := startProcess(t, dir, directives)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for worker := range 4 {
			wg.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					_, _ = p.try(ctx, http.MethodGet, fmt.Sprintf("/task?appServerID=node-1&taskID=t-%d-%d-%d", round, worker, i), "Authorization: Bearer "+callerSecret)
				}
			})
		}
		before := len(storedIn(t, dir))
		eventually(t, "more reports in the storage", func() bool { return len(storedIn(t, dir)) > before+300 })
		names := storedIn(t, dir)
		p.kill()
		cancel()
		wg.Wait()
		for _, name := range names {
			confirmed[name] = true
		}
		for name := range confirmed {
			value, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := checkStored(name, value); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		t.Logf("after the kill, all %d reports that were stored are whole", len(confirmed))
	}
	if len(confirmed) < 10 {
		t.Errorf("only %d reports were stored", len(confirmed))
	}
}

// Before a report is called unknown, the storage is looked into once more: another instance may have stored it meanwhile.
func TestStoredByAnotherInstanceMeanwhile(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	dir := t.TempDir()
	knows := newBackend(t, responds(http.StatusOK, document))
	one := startProcess(t, dir, options(knows, shared))
	forgets := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		if r := <-one.goGet(pair); r.status != http.StatusOK {
			t.Errorf("the other instance: status %d", r.status)
		}
		for ctx := patience(t); len(storedIn(t, dir)) == 0 && ctx.Err() == nil; {
			time.Sleep(5 * time.Millisecond)
		}
		w.WriteHeader(http.StatusNotFound)
	})
	other := startProcess(t, dir, options(forgets, shared))
	r := other.get(pair)
	r.wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	if string(r.body) != document {
		t.Errorf("status %d: %s", r.status, r.body)
	}
	forgets.wantRequests(t, 1)
}
