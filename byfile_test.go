package fsbroker_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// sumA and sumB are SHA-256 sums of files.
const (
	sumA = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	sumB = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"
)

// finishedOf returns a finished report of a file.
func finishedOf(sum, taskID, all string) string {
	return fmt.Sprintf(`{"result":{"taskReference":{"state":"SUCCESS","ID":"%s","additionalInfo":{"digests":{"SHA-256":"%s"}}},"all":"%s","text":"%s"}}`,
		taskID, strings.ToUpper(sum), all, strings.Repeat("the quick brown fox ", 40))
}

// filesNode answers with reports of sumA, but for tasks that begin with b. Tasks that begin with x are unfinished.
func filesNode(t *testing.T) *backend {
	return newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		taskID, all, sum := r.URL.Query().Get("taskID"), r.URL.Query().Get("all"), sumA
		if strings.HasPrefix(taskID, "b") {
			sum = sumB
		}
		document := finishedOf(sum, taskID, all)
		if strings.HasPrefix(taskID, "x") {
			document = strings.Replace(document, "SUCCESS", "IN_PROGRESS", 1)
		}
		responds(http.StatusOK, document)(w, r)
	})
}

func byTask(taskID string) string { return "/task?appServerID=node-1&taskID=" + taskID }

func byFile(sum string) string { return "/task?sha256=" + sum }

// wantReport checks which report was found, and how.
func (r reply) wantReport(t *testing.T, document, cacheStatus string) {
	t.Helper()
	r.wantStatus(t, http.StatusOK)
	r.wantHeader(t, "Cache-Status", cacheStatus)
	if got := r.plain(t); got != document {
		t.Errorf("got %.120s, want %.120s", got, document)
	}
}

func TestByFile(t *testing.T) {
	for name, cache := range map[string]string{"memory alone": "", "with a storage": stored} {
		t.Run(name, func(t *testing.T) {
			node := filesNode(t)
			s := startWithAdmin(t, options(node, cache), "")
			s.get(byFile(sumA)).wantProblem(t, http.StatusNotFound, "unknown_file")
			for _, taskID := range []string{"a1", "a2", "b1", "x3"} {
				s.get(byTask(taskID)).wantStatus(t, http.StatusOK)
			}
			s.get(byTask("a1")+"&all").wantStatus(t, http.StatusOK)
			before := s.scrape()
			node.setHandler(responds(http.StatusInternalServerError, "")) // nothing asks it any more
			const hit = "fsbroker; hit"
			r := s.get(byFile(sumA), "User-Agent: by-file")
			r.wantReport(t, finishedOf(sumA, "a2", "false"), hit)
			if r.header.Get("Age") == "" || r.header.Get("Cache-Control") != "private, no-cache" {
				t.Errorf("header %v", r.header)
			}
			if fields := s.accessLog("by-file"); fields["fsbroker_cache"] != "hit" || fields["fsbroker_node"] != "node-1" || fields["fsbroker_upstream"] != nil {
				t.Errorf("logged %v", fields)
			}
			s.wantMetrics(before, map[string]string{`requests_total{cache="hit",client="tester",code="200",endpoint="/task"}`: "1"})
			s.get(byFile(strings.ToUpper(sumB))).wantReport(t, finishedOf(sumB, "b1", "false"), hit)
			s.get(byFile(sumA)+"&all").wantReport(t, finishedOf(sumA, "a1", "true"), hit)
			s.get(byFile(sumA), "Accept-Encoding: gzip").wantReport(t, finishedOf(sumA, "a2", "false"), hit)
			s.get(byFile(sumA), "Cache-Control: only-if-cached", "Prefer: wait=1").wantReport(t, finishedOf(sumA, "a2", "false"), hit)
			s.get(byFile(sumA), "If-None-Match: "+r.header.Get("ETag")).wantStatus(t, http.StatusNotModified)
			head := s.do(t.Context(), http.MethodHead, byFile(sumA), "Authorization: Bearer "+callerSecret)
			head.wantStatus(t, http.StatusOK)
			head.wantHeader(t, "ETag", r.header.Get("ETag"))
			s.get(byFile(sumB)+"&all", "Cache-Control: only-if-cached").wantProblem(t, http.StatusNotFound, "unknown_file")

			// An older one is the newest again when the upstream has answered with it again.
			node.setHandler(responds(http.StatusOK, finishedOf(sumA, "a1", "false")))
			s.get(byTask("a1")+"&nocache").wantStatus(t, http.StatusOK)
			s.get(byFile(sumA)).wantReport(t, finishedOf(sumA, "a1", "false"), hit)

			s.purgeFile(sumA)
			for _, path := range []string{byFile(sumA), byFile(sumA) + "&all"} {
				r := s.get(path)
				r.wantProblem(t, http.StatusNotFound, "unknown_file")
				r.wantHeader(t, "Cache-Status", "fsbroker; detail=unknown_file")
			}
			s.get(byFile(sumB)).wantStatus(t, http.StatusOK)
		})
	}
}

// purgeFile purges the reports of a file.
func (s *adminSite) purgeFile(sum string) {
	s.t.Helper()
	if status, body := s.requestAdmin(http.MethodDelete, "/fsbroker/cache?sha256="+sum); status != http.StatusOK {
		s.t.Fatalf("status %d: %s", status, body)
	}
}

// The reports of a file are found by every instance, after restarts, and although another instance has a newer one.
func TestByFileOnEveryInstance(t *testing.T) {
	node, dir := filesNode(t), t.TempDir()
	directives := options(node, shared)
	one, other := startProcess(t, dir, directives), startProcess(t, dir, directives)
	const fromStorage, hit = "fsbroker; hit; detail=storage", "fsbroker; hit"

	one.get(byTask("a1")).wantStatus(t, http.StatusOK)
	one.get(byTask("a1")+"&all").wantStatus(t, http.StatusOK)
	wantStoredIn(t, dir, 2)
	eventually(t, "the report on the other instance", func() bool { return other.get(byFile(sumA)).status == http.StatusOK })
	other.get(byFile(sumA)).wantReport(t, finishedOf(sumA, "a1", "false"), hit)
	eventually(t, "the complete report", func() bool { return other.get(byFile(sumA)+"&all").status == http.StatusOK })
	other.get(byFile(sumA)+"&all").wantReport(t, finishedOf(sumA, "a1", "true"), hit)
	other.get(byTask("a1")).wantReport(t, finishedOf(sumA, "a1", "false"), hit)

	// The one has the older report in memory.
	other.get(byTask("a2")).wantStatus(t, http.StatusOK)
	wantStoredIn(t, dir, 3)
	eventually(t, "the newer report", func() bool {
		return one.get(byFile(sumA)).plain(t) == finishedOf(sumA, "a2", "false")
	})
	one.kill()
	other.kill()
	again := startProcess(t, dir, directives)
	again.get(byFile(sumA)).wantReport(t, finishedOf(sumA, "a2", "false"), fromStorage)
	again.get(byFile(sumA)).wantReport(t, finishedOf(sumA, "a2", "false"), hit)
	again.get(byFile(sumA)+"&all").wantReport(t, finishedOf(sumA, "a1", "true"), fromStorage)
	again.get(byFile(sumB)).wantProblem(t, http.StatusNotFound, "unknown_file")
	node.wantRequests(t, 3)
}

// While the storage is away, what memory and the queue have is found.
func TestByFileWhileTheStorageIsAway(t *testing.T) {
	fault.dir = storageDir(t)
	node := filesNode(t)
	s := startWithAdmin(t, options(node, "cache {\n storage faulty\n max_size 1MiB\n }"), "")
	t.Cleanup(func() { setFault(nil, nil, false) })
	setFault(errors.New("the storage is away"), nil, false)
	s.get(byTask("a1")).wantStatus(t, http.StatusOK)
	s.get(byFile(sumA)).wantReport(t, finishedOf(sumA, "a1", "false"), "fsbroker; hit")
	r := s.get(byFile(sumB))
	r.wantProblem(t, http.StatusServiceUnavailable, "storage_unavailable")
	if r.header.Get("Retry-After") == "" || strings.Contains(string(r.body), "upstream") {
		t.Errorf("header %v, %s", r.header, r.body)
	}

	// Other reports drive it out of memory. It is still queued.
	node.setHandler(responds(http.StatusOK, dense(200<<10)))
	for i := range 12 {
		s.get(byTask(fmt.Sprint("c", i))).wantStatus(t, http.StatusOK)
	}
	s.get(byFile(sumA)).wantReport(t, finishedOf(sumA, "a1", "false"), "fsbroker; hit; detail=storage")

	setFault(nil, nil, false)
	eventually(t, "the storage to be read again", func() bool { return s.get(byFile(sumB)).status == http.StatusNotFound })
}

// All callers of a file share one look into the storage.
func TestByFileTogether(t *testing.T) {
	fault.dir = storageDir(t)
	node := filesNode(t)
	s := startSite(t, options(node, "cache {\n storage faulty\n }"))
	gate := make(chan struct{})
	lists := make(chan struct{}, 100)
	beforeEach(t, func(operation, key string, _ int) error {
		if operation == "List" && strings.HasSuffix(key, "/files") {
			lists <- struct{}{}
			<-gate
		}
		return nil
	})
	var replies []<-chan reply
	for range 20 {
		replies = append(replies, s.goGet(byFile(sumA)))
	}
	<-lists
	s.get(byTask("a1")).wantStatus(t, http.StatusOK)
	own := s.goGet(byFile(sumA)) // joins a call that began before its report was kept
	wantHeld(t, 21)
	close(gate)
	if r := <-own; r.plain(t) != finishedOf(sumA, "a1", "false") {
		t.Errorf("got status %d, %s", r.status, r.body)
	}
	for _, r := range replies {
		<-r
	}
	if n := len(lists); n > 5 {
		t.Errorf("the storage was listed %d more times", n)
	}
}
