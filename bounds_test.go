package fsbroker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// stalls returns a handler that declares a large answer, sends the beginning of it and stalls until the caller leaves or
// g is opened.
func stalls(g *gate, declared, sent int) http.HandlerFunc {
	beginning := dense(2 * sent)[:sent]
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(declared))
		_, _ = io.WriteString(w, beginning)
		_ = http.NewResponseController(w).Flush()
		g.then(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })(w, r)
	}
}

// twoNodes are the options of a site with a node that works and one that is sick.
func twoNodes(healthy, sick *backend, more string) string {
	return options(healthy, fmt.Sprintf("node sick %s {env.NODE_SECRET}\n%s", sick.URL, more))
}

// A node that declares large answers and stalls does not keep out the answers of another, small or large.
func TestStallingNode(t *testing.T) {
	fsbroker.SkipIfShort(t)
	g := newGate()
	sick := newBackend(t, stalls(g, 64<<20, 2<<20))
	large := dense(4 << 20)
	healthy := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("taskID") == "large" {
			responds(http.StatusOK, large)(w, r)
			return
		}
		responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
	})
	s := startWithAdmin(t, twoNodes(healthy, sick, "timeout 1m\ncache {\n max_size 64MiB\n }"), "")
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var callers sync.WaitGroup
	var busy atomic.Int64
	for i := range 40 {
		callers.Go(func() {
			r, err := s.try(ctx, http.MethodGet, fmt.Sprintf("/task?appServerID=sick&taskID=%d", i), "Authorization: Bearer "+callerSecret)
			if err == nil && r.status == http.StatusServiceUnavailable {
				busy.Add(1)
			}
		})
	}
	// The sick node takes half of the memory at the most, and the rest of its answers is refused.
	eventually(t, "the sick node to use up its share", func() bool { return busy.Load() > 0 })
	s.get(pair).wantStatus(t, http.StatusOK)
	for range 3 {
		if r := s.get("/task?appServerID=node-1&nocache&taskID=large"); string(r.body) != large {
			t.Errorf("a large report of the healthy node: status %d, %.300s", r.status, r.body)
		}
	}
	leave()
	callers.Wait()
}

// peakHeap returns the largest heap while f runs, beyond what there was before.
func peakHeap(f func()) int64 {
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	done := make(chan struct{})
	peak := make(chan int64)
	go func() {
		var most uint64
		for {
			runtime.GC() // what is garbage does not count
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc)
			select {
			case <-done:
				peak <- int64(most) - int64(before.HeapAlloc)
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	f()
	close(done)
	return <-peak
}

const mib = 1 << 20

// However many answers stall, the memory stays within its bound.
func TestManyStalledAnswers(t *testing.T) {
	fsbroker.SkipIfShort(t)
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	g := newGate()
	sick := newBackend(t, stalls(g, 64<<20, 256<<10))
	healthy := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startWithAdmin(t, twoNodes(healthy, sick, "timeout 1h\ncache {\n max_size 64MiB\n }"), "")
	inFlight := `caddy_fsbroker_questions_in_flight{address="` + host(sick) + `",namespace="default",node="sick",role="node"}`
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	peak := peakHeap(func() {
		const all = 600
		var callers sync.WaitGroup
		var answered atomic.Int64
		for i := range all {
			callers.Go(func() {
				_, _ = s.try(ctx, http.MethodGet, fmt.Sprintf("/task?appServerID=sick&taskID=%d", i), "Authorization: Bearer "+callerSecret)
				answered.Add(1)
			})
		}
		eventually(t, "no caller to wait in line", func() bool {
			stalled := number(t, s.scrape()[inFlight])
			return stalled > 0 && int(answered.Load())+stalled == all
		})
		s.get(pair).wantStatus(t, http.StatusOK)
		leave()
		callers.Wait()
	})
	// 600 callers and their connections, on both sides, are in the same process.
	t.Logf("600 stalled answers: %d MiB", peak/mib)
	if peak > 130*mib {
		t.Errorf("600 stalled answers take %d MiB", peak/mib)
	}
}

// A long JSON string takes no more memory than any other document.
func TestLongStrings(t *testing.T) {
	fsbroker.SkipIfShort(t)
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	node := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"result":{"taskReference":{"state":"SUCCESS"},"text":"`)
		chunk := strings.Repeat("all work and no play ", 1<<10)
		for range 60 << 20 / len(chunk) {
			_, _ = io.WriteString(w, chunk)
		}
		_, _ = io.WriteString(w, `"}}`)
	})
	s := startSite(t, options(node, ""))
	peak := peakHeap(func() {
		var replies []<-chan reply
		for i := range 4 {
			replies = append(replies, s.goGet(fmt.Sprintf("/task?appServerID=node-1&taskID=%d", i), "Accept-Encoding: gzip"))
		}
		for _, r := range replies {
			(<-r).wantStatus(t, http.StatusOK)
		}
	})
	t.Logf("4 strings of 60 MiB: %d MiB", peak/mib)
	if peak > 40*mib {
		t.Errorf("4 strings of 60 MiB take %d MiB", peak/mib)
	}
}

// slowly requests a path and reads nothing of the response but its header, until release is called.
func (s *site) slowly(t *testing.T, path string) (release func()) {
	t.Helper()
	conn, err := s.dialSlow(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n", path, callerSecret)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	return func() { _ = conn.Close() }
}

// Slow readers of one report share its bytes, although each had it fetched again.
func TestSlowReaders(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	document := dense(8 * mib)
	node := newBackend(t, responds(http.StatusOK, document))
	s := startPlainSite(t, options(node, ""))
	s.get(pair, "Accept-Encoding: gzip").wantStatus(t, http.StatusOK)
	peak := peakHeap(func() {
		for range 24 {
			defer s.slowly(t, pair+"&nocache")()
		}
	})
	t.Logf("24 slow readers of a report of 8 MiB that is fetched each time: %d MiB", peak/mib)
	if peak > 50*mib {
		t.Errorf("24 slow readers take %d MiB", peak/mib)
	}
}

// Nothing is inflated to say that a report is unchanged, or how long it is.
func TestNothingIsInflatedForAHeader(t *testing.T) {
	fsbroker.SkipIfShort(t)
	document := dense(10 * mib)
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, ""))
	s.get(pair, "Accept-Encoding: gzip").wantStatus(t, http.StatusOK)
	bearer := "Authorization: Bearer " + callerSecret
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	head := s.do(t.Context(), http.MethodHead, pair, bearer)
	head.wantStatus(t, http.StatusOK)
	head.wantHeader(t, "Content-Length", fmt.Sprint(len(document)))
	head.wantHeader(t, "Content-Encoding", "")
	etag := head.header.Get("ETag")
	for range 5 {
		s.do(t.Context(), http.MethodHead, pair, bearer).wantHeader(t, "ETag", etag)
		s.get(pair, "If-None-Match: "+etag).wantStatus(t, http.StatusNotModified)
	}
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 5*mib {
		t.Errorf("11 header-only responses allocate %d MiB", allocated/mib)
	}
	// The document itself is the same, however it is sent: piece by piece, or from a copy.
	for range 3 {
		r := s.get(pair)
		r.wantHeader(t, "ETag", etag)
		if string(r.body) != document {
			t.Fatalf("got %d bytes", len(r.body))
		}
	}
}

// The requests to an upstream that are in flight are bounded. Those in line wait, first come, first served, and none fails.
func TestRequestsWaitInLine(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const most = 64
		var now atomic.Int64
		full := make(chan struct{}) // closed once as many are in flight as may be
		reached := sync.OnceFunc(func() { close(full) })
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			switch n := now.Add(1); {
			case n > most:
				t.Errorf("%d requests are in flight, want up to %d", n, most)
			case n == most:
				reached()
			}
			select {
			case <-full:
			case <-r.Context().Done():
			}
			now.Add(-1)
			responds(http.StatusOK, reportOf(r.URL.Query().Get("taskID"), "SUCCESS"))(w, r)
		})
		s := startSite(t, options(node, ""))
		var replies []<-chan reply
		for i := range 1000 {
			replies = append(replies, s.goGet(fmt.Sprintf("/task?appServerID=node-1&taskID=t%d", i)))
		}
		for i, r := range replies {
			if got := <-r; string(got.body) != reportOf(fmt.Sprintf("t%d", i), "SUCCESS") {
				t.Errorf("t%d: status %d: %s", i, got.status, got.body)
			}
		}
	})
}

// Health checks of many nodes do not begin at once.
func TestHealthChecksAreSpread(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var now, peak, checks atomic.Int64
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			peak.Store(max(peak.Load(), now.Add(1)))
			time.Sleep(2 * time.Millisecond)
			now.Add(-1)
			checks.Add(1)
			systemInfo(w, r)
		})
		var nodes strings.Builder
		for i := range 500 {
			fmt.Fprintf(&nodes, "node n%d %s/%d\n", i, node.URL, i)
		}
		startSite(t, options(node, nodes.String()+"health_interval 1h"))
		eventually(t, "all checks", func() bool { return checks.Load() > 500 })
		if n := peak.Load(); n > 16 {
			t.Errorf("%d checks ran at once", n)
		}
	})
}

// An error of this machine is not a failure of an upstream.
func TestLocalErrors(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	// An address that no interface has stands for ports that are used up: EADDRNOTAVAIL, in both cases.
	s := startSite(t, options(node, "transport http {\n local_address 192.0.2.1\n }"))
	for range 3 {
		r := s.get(pair)
		r.wantProblem(t, http.StatusServiceUnavailable, "busy")
		r.wantHeader(t, "Retry-After", "1")
	}
	if lines := s.logged("fails"); len(lines) > 0 {
		t.Errorf("the node is said to fail: %v", lines)
	}
	if lines := s.logged("no local resources"); len(lines) != 1 {
		t.Errorf("the log says %d times that no local resources are left", len(lines))
	}
}

// With a write timeout of the server, a wait ends before it.
func TestWaitWithWriteTimeout(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startWithAdmin(t, options(node, "poll_interval 200ms"), "servers {\n timeouts {\n write 2s\n }\n }")
		before := s.scrape()
		start := time.Now()
		r := s.get(pair + "&wait=6")
		r.wantStatus(t, http.StatusOK)
		r.wantHeader(t, "Retry-After", "1")
		if took := time.Since(start); took > 2*time.Second || took < time.Second {
			t.Errorf("the response took %s", took)
		}
		s.wantMetrics(before, map[string]string{`requests_total{cache="hit",client="tester",code="200",endpoint="/task"}`: "0"})
		s.wantMetrics(before, map[string]string{`requests_total{cache="miss",client="tester",code="200",endpoint="/task"}`: "1"})
	})
}

// A response that the server's write timeout cuts off is not counted as delivered.
func TestLateResponse(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(1500 * time.Millisecond)
			responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
		})
		s := startWithAdmin(t, strings.Replace(options(node, ""), "secret tester", "secret late", 1), "servers {\n timeouts {\n write 1s\n }\n }")
		before := s.scrape()
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit") // the first response breaks off, and get tries again
		s.wantMetrics(before, map[string]string{
			`requests_total{cache="miss",client="late",code="499",endpoint="/task"}`: "1",
			`requests_total{cache="miss",client="late",code="200",endpoint="/task"}`: "",
		})
	})
}

func TestOptions(t *testing.T) {
	node := newBackend(t, nil)
	s := startSite(t, options(node, ""))
	for _, header := range [][]string{nil, {"Authorization: Bearer wrong"}, {"Origin: https://example.com", "Access-Control-Request-Method: GET"}} {
		r := s.do(t.Context(), http.MethodOptions, "/task", header...)
		r.wantStatus(t, http.StatusNoContent)
		r.wantHeader(t, "Allow", "GET, HEAD, OPTIONS")
		r.wantHeader(t, "Access-Control-Allow-Origin", "") // is the site's
	}
	node.wantRequests(t, 0)
}

func TestRequestCacheControl(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, stored))
	s.get(pair, "Cache-Control: only-if-cached").wantProblem(t, http.StatusGatewayTimeout, "not_cached")
	node.wantRequests(t, 0)
	s.get(pair).wantStatus(t, http.StatusOK)
	s.get(pair, "Cache-Control: only-if-cached").wantHeader(t, "Cache-Status", "fsbroker; hit")
	s.get(pair, "Cache-Control: max-age=0, no-cache").wantHeader(t, "Cache-Status", "fsbroker; fwd=request; stored")
	node.wantRequests(t, 2)
	s.get(pair, "Cache-Control: no-cache, only-if-cached").wantProblem(t, http.StatusGatewayTimeout, "not_cached")
	s.wantValues(1)
	s.restart(options(node, stored))
	s.get(pair, "Cache-Control: only-if-cached").wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
	node.wantRequests(t, 2)
}

func TestIfMatch(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	etag := s.get(pair).header.Get("ETag")
	for value, status := range map[string]int{etag: 200, "*": 200, `"x", ` + etag: 200, "W/" + etag: 412, `"x"`: 412} {
		r := s.get(pair, "If-Match: "+value)
		r.wantStatus(t, status)
		if status == 412 {
			r.wantProblem(t, 412, "precondition_failed")
		}
	}
	s.get(pair, "If-Match: "+etag, "If-None-Match: "+etag).wantStatus(t, http.StatusNotModified)
}

// An upstream's 410 is its 404, and its 429 and 503 are passed on with its Retry-After.
func TestUpstreamStatuses(t *testing.T) {
	node := newBackend(t, responds(http.StatusGone, ""))
	s := startSite(t, options(node, ""))
	s.get(pair).wantProblem(t, http.StatusNotFound, "unknown_task")
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		for value, want := range map[string]string{
			"7": "7", "": "10", "soon": "10", "0": "1", "99999999999": "3600",
			time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat):     "1",
			time.Now().Add(48 * time.Hour).UTC().Format(http.TimeFormat): "3600",
		} {
			node.setHandler(func(w http.ResponseWriter, _ *http.Request) {
				if value != "" {
					w.Header().Set("Retry-After", value)
				}
				w.WriteHeader(status)
			})
			r := s.get(pair)
			r.wantProblem(t, http.StatusServiceUnavailable, "node_overloaded")
			r.wantHeader(t, "Retry-After", want)
		}
	}
	if lines := s.logged("node fails"); len(lines) != 1 || lines[0]["code"] != "node_overloaded" {
		t.Errorf("a busy node is not logged once: %v", lines)
	}
}

// startPlainSite is like startSite, for plain HTTP.
func startPlainSite(t *testing.T, directives string) *site {
	t.Helper()
	s := newSite(t)
	s.servePlainly()
	s.load(directives)
	s.trust()
	return s
}

// raw returns a handler that sends bytes that net/http would not send, and stalls until the client leaves.
func raw(response []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		_, _ = conn.Write(response)
		_, _ = buf.ReadByte() // until the client leaves
	}
}

// Slow readers of many large reports stay within max_size together: the first are served, and the others get 503. Small reports
// are served meanwhile.
func TestSlowReadersOfManyReports(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	document := dense(12 * mib)
	for _, accept := range []string{"gzip", "identity"} {
		t.Run(accept, func(t *testing.T) {
			node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
				task := r.URL.Query().Get("taskID")
				if task == "small" {
					responds(http.StatusOK, reportOf(task, "SUCCESS"))(w, r)
					return
				}
				responds(http.StatusOK, strings.Replace(document, "{", `{"task":"`+task+`",`, 1))(w, r)
			})
			s := startWithAdmin(t, options(node, "cache {\n max_size 32MiB\n }"), "")
			statuses, stats := map[int]int{}, ""
			// A small buffer, so that the site holds what is not read, and not the kernel.
			s.client.Transport.(*http.Transport).DialContext = s.dialSlow
			s.client.CloseIdleConnections()
			peak := peakHeap(func() {
				for i := range 15 {
					req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("%s/task?appServerID=node-1&taskID=%d", s.base, i), nil)
					if err != nil {
						t.Fatal(err)
					}
					req.Header.Set("Authorization", "Bearer "+callerSecret)
					req.Header.Set("Accept-Encoding", accept)
					resp, err := s.client.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close() // without reading it
					statuses[resp.StatusCode]++
				}
				_, stats = s.requestAdmin(http.MethodGet, "/fsbroker/cache")
				if r := s.get("/task?appServerID=node-1&taskID=small"); string(r.body) != reportOf("small", "SUCCESS") {
					t.Errorf("a small report: status %d: %s", r.status, r.body)
				}
			})
			t.Logf("15 slow readers of 15 reports of 12 MiB get %v and take %d MiB: %s", statuses, peak/mib, stats)
			if statuses[http.StatusOK] == 0 || statuses[http.StatusServiceUnavailable] == 0 || len(statuses) > 2 {
				t.Errorf("15 slow readers get %v, want some of both 200 and 503", statuses)
			}
			if peak > 50*mib {
				t.Errorf("15 slow readers take %d MiB, although max_size is 32 MiB", peak/mib)
			}
		})
	}
}

// What inflates a large report for callers that read slowly counts. Those for whom there is no memory get 503, until others
// have left.
func TestSlowReadersWithoutGzip(t *testing.T) {
	const callers, limit = 40, 2 * mib
	document := `{"result":{"taskReference":{"state":"SUCCESS"},"text":"` + strings.Repeat("x", 16*mib) + `"}}`
	node := newBackend(t, responds(http.StatusOK, document))
	s := startWithAdmin(t, options(node, "cache {\n max_size 2MiB\n }"), "")
	s.get(pair, "Accept-Encoding: gzip").wantStatus(t, http.StatusOK)
	transport := s.client.Transport.(*http.Transport)
	transport.DialContext = s.dialSlow
	s.client.CloseIdleConnections()
	var slow []*http.Response
	leave := func() {
		for _, resp := range slow {
			_ = resp.Body.Close() // without reading it
		}
	}
	defer leave()
	for range callers {
		req, err := http.NewRequest(http.MethodGet, s.base+pair, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+callerSecret)
		resp, err := s.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode == http.StatusOK {
			slow = append(slow, resp)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		refused := reply{resp.StatusCode, resp.Header, body}
		refused.wantProblem(t, http.StatusServiceUnavailable, "busy")
		refused.wantHeader(t, "Retry-After", "1")
		refused.wantHeader(t, "Age", "")
		refused.wantHeader(t, "ETag", "")
	}
	stats := s.memory()
	t.Logf("%d of %d callers get the report: %+v", len(slow), callers, stats)
	// They leave as much as they take.
	if len(slow) == 0 || stats.Reading < len(slow)*task.DecoderMemory || stats.Reading > limit/2 || stats.Bytes > limit {
		t.Errorf("%d of %d callers get the report: %+v", len(slow), callers, stats)
	}
	transport.DialContext = s.dialContext
	s.client.CloseIdleConnections()
	// What needs no decoder is sent to others.
	s.get(pair, "Accept-Encoding: gzip").wantStatus(t, http.StatusOK)
	s.do(t.Context(), http.MethodHead, pair, bearer).wantStatus(t, http.StatusOK)
	leave()
	s.getUntil(pair, "memory for another caller", func(r reply) bool { return r.status == http.StatusOK && string(r.body) == document })
	eventually(t, "nothing to be held", func() bool { return s.memory().Reading == 0 })
}

// memory returns the memory of the default namespace.
func (s *adminSite) memory() struct{ Bytes, Reading int } {
	s.t.Helper()
	_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
	var all map[string]struct{ Bytes, Reading int }
	if err := json.Unmarshal([]byte(body), &all); err != nil {
		s.t.Fatal(err)
	}
	return all["default"]
}

// A node that sends large headers takes no more memory than its share.
func TestLargeResponseHeaders(t *testing.T) {
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	header := []byte("HTTP/1.1 200 OK\r\n" + strings.Repeat("X-Long: "+strings.Repeat("a", 2000)+"\r\n", 4500))
	node := newBackend(t, raw(header))
	s := startSite(t, options(node, "timeout 1m\n cache {\n max_size 16MiB\n }"))
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	peak := peakHeap(func() {
		var callers sync.WaitGroup
		for i := range 40 {
			callers.Go(func() {
				_, _ = s.try(ctx, http.MethodGet, fmt.Sprintf("/task?appServerID=node-1&taskID=%d", i), "Authorization: Bearer "+callerSecret)
			})
		}
		callers.Wait()
	})
	t.Logf("40 responses with headers of 9 MB: %d MiB", peak/mib)
	if peak > 60*mib {
		t.Errorf("40 responses that stall in their headers take %d MiB, although max_size is 16 MiB", peak/mib)
	}
}

// A node that switches protocols and stalls is a timeout, like one that stalls otherwise.
func TestSwitchingProtocols(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, raw([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")))
		s := startSite(t, options(node, "timeout 500ms"))
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		r, err := s.try(ctx, http.MethodGet, pair, "Authorization: Bearer "+callerSecret)
		if err != nil {
			node.CloseClientConnections()
			t.Fatalf("there is no response after 8 times the timeout: %v", err)
		}
		if r.status != http.StatusGatewayTimeout && r.status != http.StatusBadGateway {
			t.Errorf("status %d: %s", r.status, r.body)
		}
	})
}

// A caller without nocache gets the report that is stored, although it joins the call of a caller with nocache, and the
// node fails.
func TestStoredReportBesideNocache(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		document := reportOf("t1", "SUCCESS")
		node := newBackend(t, responds(http.StatusOK, document))
		s := startSite(t, options(node, "cache {\n ttl 100ms\n storage\n }"))
		s.get(pair).wantStatus(t, http.StatusOK)
		s.wantValues(1)
		g := newGate()
		node.setHandler(g.then(responds(http.StatusInternalServerError, "")))
		fresh := s.goGet(pair + "&nocache")
		within(t, "the request", g.entered)
		time.Sleep(300 * time.Millisecond) // memory has it no more
		plain := s.goGet(pair)
		wantHeld(t, 2)
		close(g.open)
		(<-fresh).wantProblem(t, http.StatusBadGateway, "node_bad_answer")
		if r := <-plain; r.status != http.StatusOK || string(r.body) != document {
			t.Errorf("status %d: %s", r.status, r.body)
		}
	})
}
