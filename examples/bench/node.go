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
	"sync/atomic"
	"time"
)

// secret is the secret of both the callers and the node.
const secret = "bench-secret"

// node is a processor node and a broker. A task ID selects the report: "<size>-<anything>" is a report of that size,
// "cold-<size>-<anything>" is the same report after a delay, and "own-<size>-<anything>" is a report of that size that no
// other task has. If "unfinished" comes before the size, it is that report while the task is in progress.
type node struct {
	address   string
	documents map[string][]byte
	requests  atomic.Int64
	forgets   atomic.Bool  // whether it knows no task
	delay     atomic.Int64 // how long it takes for each response, as a time.Duration
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
	n := &node{address: listener.Addr().String(), documents: map[string][]byte{"small": []byte(smallReport)}}
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
	n.server = &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = n.server.Serve(listener) }()
	return n, nil
}

func (n *node) task(w http.ResponseWriter, r *http.Request) {
	n.requests.Add(1)
	id, cold := strings.CutPrefix(r.URL.Query().Get("taskID"), "cold-")
	if cold {
		time.Sleep(coldDelay)
	}
	if delay := time.Duration(n.delay.Load()); delay > 0 {
		time.Sleep(delay)
	}
	document := n.document(id)
	if document == nil || n.forgets.Load() {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(document)))
	_, _ = w.Write(document) //nolint:gosec // no browser asks
}

// document returns the report of a task, or nil if there is none.
func (n *node) document(id string) []byte {
	id, own := strings.CutPrefix(id, "own-")
	size, _, _ := strings.Cut(id, "-")
	document := n.documents[size]
	if own {
		document = ofOtherFile(document, sha256.Sum256([]byte(id)))
	}
	return document
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
