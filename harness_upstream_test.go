package fsbroker_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// backend is a node or a broker: a real HTTP server, with a handler that a test can change.
type backend struct {
	*httptest.Server

	mu        sync.Mutex
	requested []*url.URL
	handler   http.HandlerFunc
}

// newBackend starts a backend, and closes it at the end of the test.
func newBackend(t testing.TB, handler http.HandlerFunc) *backend {
	t.Helper()
	b := &backend{handler: handler}
	b.Server = newServer(t, http.HandlerFunc(b.serve))
	b.Start()
	return b
}

// newServer returns a server that is not started yet. It is closed at the end of the test, which shows its log.
func newServer(t testing.TB, handler http.Handler) *httptest.Server {
	t.Helper()
	return newServerOn(t, newListener(t), handler)
}

func newServerOn(t testing.TB, listener net.Listener, handler http.Handler) *httptest.Server {
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: handler, ErrorLog: log.New(t.Output(), "", 0)}}
	t.Cleanup(server.Close)
	return server
}

// startTLSServer starts a server that speaks TLS.
func startTLSServer(t testing.TB, handler http.Handler) *httptest.Server {
	t.Helper()
	server := newServer(t, handler)
	server.StartTLS()
	return server
}

func (b *backend) serve(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	b.requested = append(b.requested, r.URL)
	handler := b.handler
	b.mu.Unlock()
	handler(w, r)
}

// setHandler changes how the backend responds from now on.
func (b *backend) setHandler(handler http.HandlerFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.handler = handler
}

// requests returns the URLs of all requests so far.
func (b *backend) requests() []*url.URL {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]*url.URL(nil), b.requested...)
}

// wantRequests checks the number of requests so far.
func (b *backend) wantRequests(t *testing.T, want int) {
	t.Helper()
	if got := len(b.requests()); got != want {
		t.Errorf("the backend got %d requests, want %d: %v", got, want, b.requests())
	}
}

// responds returns a handler that responds with a status and a body.
func responds(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// brokerResponds returns the handler of a broker with its own report of a submission, and what it says about it.
func brokerResponds(task, submitResult http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/task":
			task(w, r)
		case "/submit-result":
			submitResult(w, r)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}
}

// explains returns the handler of a broker that has no report, but says what became of a submission.
func explains(submitResult string) http.HandlerFunc {
	return brokerResponds(responds(http.StatusNotFound, ""), responds(http.StatusOK, submitResult))
}

// reportOf returns a document in a node's format, with the states of a task and its subtasks.
func reportOf(taskID, taskState string, subtaskStates ...string) string {
	subtasks := make([]map[string]any, 0, len(subtaskStates))
	for _, s := range subtaskStates {
		subtasks = append(subtasks, map[string]any{"name": "osint", "state": s})
	}
	document, err := json.Marshal(map[string]any{
		"processTime": 7,
		"result": map[string]any{
			"taskReference":     map[string]any{"name": "transform-file", "ID": taskID, "state": taskState},
			"subtaskReferences": subtasks,
			"resources": map[string]any{"r1": map[string]any{
				"additionalTasks": []any{map[string]any{"state": "IN_PROGRESS"}},
				"strings":         strings.Repeat("the quick brown fox ", 40),
			}},
		},
	})
	if err != nil {
		panic(err)
	}
	return string(document)
}

// dense returns a finished report of about the given size. gzip cannot save more than half of it.
func dense(size int) string {
	digits := make([]byte, size/2)
	_, _ = rand.NewChaCha8([32]byte{}).Read(digits)
	return fmt.Sprintf(`{"result":{"taskReference":{"state":"SUCCESS"},"digest":"%x"}}`, digits)
}

// gzipped compresses plain.
func gzipped(t *testing.T, plain []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	if _, err := zw.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// systemInfo is a handler that responds to /system-info as nodes do, and with a report to everything else.
func systemInfo(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/system-info" {
		responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
		return
	}
	responds(http.StatusOK, `{"versionInfo":{"name":"fsTransform","version":"2.1.0"},
		"queueInfo":{"activeCount":3,"queueCount":2,"completedCount":12345},"memoryStats":{"usedMemory":1}}`)(w, r)
}

// restartBackend starts a server at the address of one that was closed, and closes it at the end of the test.
func restartBackend(t *testing.T, address string, handler http.HandlerFunc) {
	t.Helper()
	newServerOn(t, listenAgain(t, address), handler).Start()
}

// gate holds requests until a test opens it.
type gate struct {
	entered chan struct{} // has a value for each request that arrived
	left    chan struct{} // has a value for each request whose client canceled it
	open    chan struct{} // is closed to open the gate
}

func newGate() *gate {
	return &gate{entered: make(chan struct{}, 1000), left: make(chan struct{}, 1000), open: make(chan struct{})}
}

// then returns a handler that waits for the gate to open, and calls handler then.
func (g *gate) then(handler http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		g.entered <- struct{}{}
		select {
		case <-g.open:
			handler(w, r)
		case <-r.Context().Done():
			g.left <- struct{}{}
		}
	}
}
