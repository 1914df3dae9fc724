package fsbroker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

func TestStoredReportsOutliveTheProcess(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	broker := newBackend(t, responds(http.StatusOK, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	directives := options(node, brokerOption(broker)+"\n"+stored)
	s := startSite(t, directives)
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	etag := s.get(pair).header.Get("ETag")
	if err := caddy.Stop(); err != nil { // which stores what is queued
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
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	if got := s.get(pair, "Accept-Encoding: gzip"); got.header.Get("Content-Encoding") != "gzip" || got.plain(t) != document {
		t.Errorf("compressed: %v", got.header)
	}

	// It helps where the node cannot be connected to, and a nocache caller hears of it.
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
	broker.wantRequests(t, 1)
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
		t.Errorf("without storage there is %v", values)
	}

	broker := newBackend(t, responds(http.StatusOK, `{"state":"QUEUED"}`))
	directives := options(node, brokerOption(broker)+"\npoll_interval 1ms\n"+stored)
	s.restart(directives)
	s.get("/task?submitID=s1").wantStatus(t, http.StatusNoContent)
	for _, answer := range []http.HandlerFunc{responds(204, ""), responds(404, ""), responds(200, "{"), responds(200, reportOf("t1", "QUEUED"))} {
		node.setHandler(answer)
		s.get(pair)
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if values := s.values(); len(values) > 0 {
		t.Errorf("there is %v", values)
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
	questions := 1
	for what, value := range map[string][]byte{
		"nothing":         {},
		"a short one":     whole[:50],
		"half":            whole[:len(whole)/2],
		"one byte less":   whole[:len(whole)-1],
		"one byte more":   append(bytes.Clone(whole), 0),
		"another version": flip(4),
		"another time":    flip(12),
		"another sum":     flip(100),
		"another payload": flip(len(whole) - 1),
		"something else":  []byte("-----BEGIN CERTIFICATE-----"),
	} {
		t.Run(what, func(t *testing.T) {
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
			questions++
			node.wantRequests(t, questions)
			aside, err := os.ReadFile(filepath.Join(s.dir, "fsbroker_task", "damaged", filepath.Base(name)))
			if err != nil || !bytes.Equal(aside, value) {
				t.Errorf("set aside: %q, error %v", aside, err)
			}
			eventually(t, "it to be stored again", func() bool {
				again, err := os.ReadFile(name)
				return err == nil && len(again) == len(whole)
			})
		})
	}
	if n := len(s.logged("is damaged and is set aside")); n != questions-1 {
		t.Errorf("%d warnings for %d damaged values", n, questions-1)
	}

	// A report under another's name is not taken for it.
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
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	directives := options(node, "cache {\n storage\n retention 500ms\n }")
	s := startSite(t, directives)
	s.get(pair).wantStatus(t, http.StatusOK)
	s.wantValues(1)
	time.Sleep(600 * time.Millisecond)
	s.restart(directives)
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
}

func TestStorageFaults(t *testing.T) {
	fsbroker.SetRetries(t, 10*time.Millisecond, 50*time.Millisecond)
	full := &fs.PathError{Op: "write", Path: "a", Err: errors.New("no space left on device")}
	for name, test := range map[string]struct {
		err     error
		hang    chan struct{}
		garbage bool
	}{
		"errors":  {err: errors.New("storage is away")},
		"full":    {err: full},
		"hangs":   {hang: make(chan struct{})},
		"garbage": {garbage: true},
	} {
		t.Run(name, func(t *testing.T) {
			fault.dir = t.TempDir()
			node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
				responds(http.StatusOK, reportOf(r.URL.Query().Get("taskID"), "SUCCESS"))(w, r)
			})
			directives := options(node, "cache {\n storage faulty\n }\nfail_duration 500ms")
			s := startSite(t, directives)
			setFault(test.err, test.hang, test.garbage)
			const reports = 50
			begin := time.Now()
			for i := range reports {
				task := fmt.Sprintf("t%d", i)
				if r := s.get("/task?appServerID=node-1&taskID=" + task); r.status != 200 || string(r.body) != reportOf(task, "SUCCESS") {
					t.Fatalf("status %d: %s", r.status, r.body)
				}
			}
			if took := time.Since(begin); took > 15*time.Second {
				t.Errorf("%d answers took %s", reports, took)
			}
			for range 3 { // reloads do not wait for it, nor lose what is queued
				s.load(directives + "\n# again")
			}
			s.get("/task?appServerID=node-1&taskID=t0").wantHeader(t, "Cache-Status", "fsbroker; hit")
			if !test.garbage {
				s.wantUnreadable(t, node, "/task?appServerID=node-1&taskID=other")
			}

			setFault(nil, nil, false)
			if test.hang != nil {
				close(test.hang)
			}
			wantStoredIn(t, fault.dir, reports)
			node.setHandler(responds(http.StatusNotFound, ""))
			s.restart(directives)
			for i := range reports {
				s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i)).wantStatus(t, http.StatusOK)
			}
		})
	}
}

func TestStoppingWithAStorageThatHangs(t *testing.T) {
	fault.dir = t.TempDir()
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
	wantStoredIn(t, fault.dir, 1) // the released write
}

// What has left memory before the storage has taken it is still there: in the queue to the storage.
func TestEvictedBeforeItIsStored(t *testing.T) {
	fault.dir = t.TempDir()
	broker := newBackend(t, responds(http.StatusOK, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, brokerOption(broker)+"\ncache {\n storage faulty\n max_size 4KiB\n }"))
	hang := make(chan struct{})
	setFault(nil, hang, false)
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	node.setHandler(responds(http.StatusOK, reportOf("t2", "SUCCESS")))
	for i := range 10 { // which memory has room for only in part
		s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=other-%d", i)).wantStatus(t, http.StatusOK)
	}
	node.setHandler(responds(http.StatusNotFound, ""))
	broker.setHandler(responds(http.StatusNotFound, ""))
	if r := s.get("/task?submitID=s1"); string(r.body) != document {
		t.Errorf("status %d: %s", r.status, r.body)
	}
	setFault(nil, nil, false)
	close(hang)
	wantStoredIn(t, fault.dir, 12)
}

// One value that the storage does not take keeps none of the others from it.
func TestValueThatIsRefused(t *testing.T) {
	fsbroker.SetRetries(t, 10*time.Millisecond, 50*time.Millisecond)
	fault.dir = t.TempDir()
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("taskID") == "large" {
			responds(http.StatusOK, dense(20_000))(w, r)
			return
		}
		responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
	})
	s := startSite(t, options(node, "cache {\n storage faulty\n }"))
	limit := func(most int) {
		fault.Lock()
		defer fault.Unlock()
		fault.most = most
	}
	limit(4000)
	t.Cleanup(func() { limit(0) })
	s.get("/task?appServerID=node-1&taskID=large").wantStatus(t, http.StatusOK)
	const small = 20
	for i := range small {
		s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i)).wantStatus(t, http.StatusOK)
		time.Sleep(5 * time.Millisecond) // so that it is tried between others
	}
	wantStoredIn(t, fault.dir, small)
	limit(0)
	wantStoredIn(t, fault.dir, small+1)
	eventually(t, "the storage to work again", func() bool { return len(s.logged("the storage works again")) == 1 })
	if n := len(s.logged("the storage fails: answers go on without it")); n != 1 {
		t.Errorf("it is logged %d times that the storage fails", n)
	}
}

// What waits for its next try is tried before the process ends.
func TestStoppingDoesNotWaitForTheNextTry(t *testing.T) {
	fsbroker.SetRetries(t, time.Hour, time.Hour)
	fault.dir = t.TempDir()
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, "cache {\n storage faulty\n }"))
	setFault(errors.New("away"), nil, false)
	defer setFault(nil, nil, false)
	s.get(pair).wantStatus(t, http.StatusOK)
	eventually(t, "the first try", func() bool { return len(s.logged("the storage fails: answers go on without it")) == 1 })
	setFault(nil, nil, false)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := len(storedIn(t, fault.dir)); n != 1 {
		t.Errorf("%d reports are stored", n)
	}
}

// What is in memory when a configuration brings a storage is stored once it is asked for.
func TestStorageComesWithAReload(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	s.load(options(node, stored))
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	s.wantValues(1)
	node.setHandler(responds(http.StatusNotFound, ""))
	s.restart(options(node, stored))
	if r := s.get(pair); string(r.body) != document {
		t.Errorf("status %d: %s", r.status, r.body)
	}
}

// Who wants nothing that is only kept still hears of the storage, and takes nothing away from the others.
func TestNocacheBesideAStorage(t *testing.T) {
	fault.dir = t.TempDir()
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
		t.Errorf("after an answer that is less: status %d: %s", r.status, r.body)
	}

	s.restart(directives)
	setFault(errors.New("away"), nil, false)
	defer setFault(nil, nil, false)
	s.wantUnreadable(t, node, pair+"&nocache")
}

// That a submission failed is certain, whatever the storage may have.
func TestFailedSubmissionBesideAStorage(t *testing.T) {
	fault.dir = t.TempDir()
	node := newBackend(t, responds(http.StatusNotFound, ""))
	broker := newBackend(t, responds(http.StatusOK, `{"state":"FAILED"}`))
	s := startSite(t, options(node, brokerOption(broker)+"\ncache {\n storage faulty\n }"))
	setFault(errors.New("away"), nil, false)
	defer setFault(nil, nil, false)
	s.get("/task?submitID=s1").wantProblem(t, http.StatusNotFound, "submission_failed")
}

// An instance whose clock is ahead may have stored it.
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
	if err := os.WriteFile(name, fsbroker.StoredLater(t, filepath.Base(name), value, time.Minute), 0o600); err != nil {
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
	broker := newBackend(t, responds(http.StatusOK, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
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
	other.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	node.wantRequests(t, 1)
	broker.wantRequests(t, 1)
}

func TestKilledInTheMiddleOfWriting(t *testing.T) {
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
		time.Sleep(700 * time.Millisecond)
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
			if err := fsbroker.CheckStored(filepath.Base(name), value); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		t.Logf("killed: all %d reports that had been stored are whole", len(confirmed))
	}
	if len(confirmed) < 10 {
		t.Errorf("only %d reports were stored", len(confirmed))
	}
}
