package fsbroker_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// backend is a node or a broker over real HTTP, which does what a test tells it to.
type backend struct {
	*httptest.Server

	mu        sync.Mutex
	requested []*url.URL
	answer    http.HandlerFunc
}

// newBackend starts a backend. It closes with the test.
func newBackend(t testing.TB, answer http.HandlerFunc) *backend {
	t.Helper()
	b := &backend{answer: answer}
	b.Server = httptest.NewServer(http.HandlerFunc(b.serve))
	t.Cleanup(b.Close)
	return b
}

func (b *backend) serve(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	b.requested = append(b.requested, r.URL)
	answer := b.answer
	b.mu.Unlock()
	answer(w, r)
}

// setHandler changes what the backend does from now on.
func (b *backend) setHandler(answer http.HandlerFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answer = answer
}

// requests is what the backend was asked so far.
func (b *backend) requests() []*url.URL {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]*url.URL(nil), b.requested...)
}

func (b *backend) wantRequests(t *testing.T, want int) {
	t.Helper()
	if got := len(b.requests()); got != want {
		t.Errorf("the backend was asked %d questions, want %d: %v", got, want, b.requests())
	}
}

// responds answers with a status and a body.
func responds(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// reportOf is a document in the form of a node's, with the states of a task and its subtasks.
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

// dense is a finished report of about a size, of which gzip can save no more than half.
func dense(size int) string {
	digits := make([]byte, size/2)
	_, _ = rand.NewChaCha8([32]byte{}).Read(digits)
	return fmt.Sprintf(`{"result":{"taskReference":{"state":"SUCCESS"},"digest":"%x"}}`, digits)
}

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

// systemInfo answers as nodes do for /system-info, and with a report for anything else.
func systemInfo(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/system-info" {
		responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
		return
	}
	responds(http.StatusOK, `{"versionInfo":{"name":"fsTransform","version":"2.1.0"},
		"queueInfo":{"activeCount":3,"queueCount":2,"completedCount":12345},"memoryStats":{"usedMemory":1}}`)(w, r)
}

// restartBackend starts a backend where another was.
func restartBackend(t *testing.T, address string, answer http.HandlerFunc) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: answer}}
	server.Start()
	t.Cleanup(server.Close)
}

// gate is an answer that waits until it is opened.
type gate struct {
	entered, left chan struct{} // one value for each question that came, and that its asker gave up
	open          chan struct{}
}

func newGate() *gate {
	return &gate{entered: make(chan struct{}, 1000), left: make(chan struct{}, 1000), open: make(chan struct{})}
}

func (g *gate) then(answer http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		g.entered <- struct{}{}
		select {
		case <-g.open:
			answer(w, r)
		case <-r.Context().Done():
			g.left <- struct{}{}
		}
	}
}
