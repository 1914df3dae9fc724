package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// secret is the secret of both the callers and the node.
const secret = "bench-secret"

// node is a processor node and a broker. A task ID selects the report: "<size>-<anything>" is a report of that size,
// "cold-<size>-<anything>" is the same report after a delay, and "own-<size>-<anything>" is a report of that size that no
// other task has. If "unfinished" comes before the size, it is that report while the task is in progress. "late-<ID>" is the
// report of another ID, once the late tasks are finished. A submission "pending-<anything>" is never finished. Other submissions
// have no report here, only an answer of /submit-result.
type node struct {
	address   string
	documents map[string][]byte
	requests  atomic.Int64
	checks    atomic.Int64 // requests for its system information
	forgets   atomic.Bool  // whether it knows no task
	delay     atomic.Int64 // how long it takes for each response, as a time.Duration
	late      lateTasks
	server    *http.Server
}

// unfinished comes before the size of an unfinished report in a task ID.
const unfinished = "unfinished"

// coldDelay is the delay of a cold report. It ensures that concurrent callers arrive while the node is still busy.
const coldDelay = 300 * time.Millisecond

func startNode(ctx context.Context, sizes []size) (*node, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	n := &node{address: listener.Addr().String(), documents: map[string][]byte{"small": []byte(smallReport), pending: []byte(pendingReport)}}
	for _, s := range sizes {
		n.documents[s.id()] = s.document
	}
	for size, document := range maps.Clone(n.documents) {
		n.documents[unfinished+size] = bytes.ReplaceAll(document, []byte(`"state":"SUCCESS"`), []byte(`"state":"IN_PROGRESS"`))
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /task", n.task)
	mux.HandleFunc("GET /submit-result", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"state":"SUCCESS","appServerID":"node-1","taskID":%q}`, r.URL.Query().Get("submitID")) //nolint:gosec // no browser asks
	})
	mux.HandleFunc("GET /system-info", func(w http.ResponseWriter, _ *http.Request) {
		n.checks.Add(1)
		fmt.Fprint(w, `{"versionInfo":{"name":"bench","version":"1"},"queueInfo":{"queueCount":0}}`)
	})
	mux.HandleFunc("POST /submit", func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(acceptance(r.URL.Query().Get("submitName")))
	})
	n.server = &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = n.server.Serve(listener) }()
	return n, nil
}

func (n *node) task(w http.ResponseWriter, r *http.Request) {
	n.requests.Add(1)
	id, cold := strings.CutPrefix(r.URL.Query().Get("taskID"), "cold-")
	if submission := r.URL.Query().Get("submitID"); strings.HasPrefix(submission, pending+"-") {
		id = submission
	}
	if cold {
		time.Sleep(coldDelay)
	}
	if delay := time.Duration(n.delay.Load()); delay > 0 {
		time.Sleep(delay)
	}
	document := n.document(id)
	if strings.HasPrefix(id, latePrefix) && !n.late.tell() {
		document = []byte(pendingReport)
	}
	if document == nil || n.forgets.Load() {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(document)))
	_, _ = w.Write(document) //nolint:gosec // no browser asks
}

// pending is the beginning of the IDs of submissions that are never finished.
const pending = "pending"

// pendingReport is the report of such a submission, and of a late task that is not finished.
var pendingReport = strings.Replace(smallReport, `"state":"SUCCESS"`, `"state":"IN_PROGRESS"`, 1)

// acceptance returns the answer to the submission of a file. The ID of the submission is the file's name.
func acceptance(name string) []byte {
	return fmt.Appendf(nil, `{"processTime":1,"acceptedFiles":[{"ID":%q,"submitName":%q,"sha256":"%x","positionInQueue":0}],`+
		`"rejectedFiles":[],"submitWarnings":[]}`, name, name, fileOf(name))
}

// lateTasks are tasks that are all finished at the same moment.
type lateTasks struct {
	mu       sync.Mutex // guards the fields below
	finished bool
	told     time.Time // when the node first answered with a finished report
}

// latePrefix is what the IDs of late tasks begin with.
const latePrefix = "late-"

// tell reports whether the tasks are finished, for a request that is answered now.
func (l *lateTasks) tell() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.finished && l.told.IsZero() {
		l.told = time.Now()
	}
	return l.finished
}

// toldAt returns when the node first answered with a finished report. It is zero if it has not.
func (l *lateTasks) toldAt() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.told
}

// finish finishes the tasks.
func (l *lateTasks) finish() { l.set(true) }

// restart makes the tasks unfinished again.
func (l *lateTasks) restart() { l.set(false) }

func (l *lateTasks) set(finished bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finished, l.told = finished, time.Time{}
}

// document returns the report of a task that is finished, or nil if there is none.
func (n *node) document(id string) []byte {
	name, own := strings.CutPrefix(strings.TrimPrefix(id, latePrefix), "own-")
	size, _, _ := strings.Cut(name, "-")
	document := n.documents[size]
	if own {
		document = ofOtherFile(document, fileOf(id))
	}
	return document
}

// fileOf returns the digest of the file that a report of its own is of.
func fileOf(id string) [sha256.Size]byte {
	return sha256.Sum256([]byte(strings.TrimPrefix(id, "own-")))
}

// digest comes before the digest of the analysed file in a report.
const digest = `"digests":{"SHA-256":"`

// ofOtherFile returns a copy of a report with another digest of the analysed file.
func ofOtherFile(document []byte, sum [sha256.Size]byte) []byte {
	at := bytes.Index(document, []byte(digest))
	if at < 0 {
		return document
	}
	other := bytes.Clone(document)
	hex.Encode(other[at+len(digest):], sum[:])
	return other
}
