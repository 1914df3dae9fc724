package main

import (
	"fmt"
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
// and "cold-<size>-<anything>" is the same report after a delay.
type node struct {
	address   string
	documents map[string][]byte
	requests  atomic.Int64
	server    *http.Server
}

// coldDelay is the delay of a cold report. It ensures that concurrent callers arrive while the node is still busy.
const coldDelay = 300 * time.Millisecond

func startNode(sizes []size) (*node, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	n := &node{address: listener.Addr().String(), documents: make(map[string][]byte)}
	for _, s := range sizes {
		n.documents[s.id()] = s.document
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /task", n.task)
	mux.HandleFunc("GET /submit-result", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"state":"SUCCESS","appServerID":"node-1","taskID":%q}`, r.URL.Query().Get("submitID"))
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
	id, _, _ = strings.Cut(id, "-")
	document := n.documents[id]
	if document == nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(document)))
	_, _ = w.Write(document)
}
