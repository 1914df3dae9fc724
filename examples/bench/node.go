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

// secret is what callers and the node want to see.
const secret = "bench-secret"

// node is a processor node and a broker. Its task IDs say which report is wanted: "<size>-<anything>" is one of a size,
// "cold-<size>-<anything>" the same after a while, and "<bytes>b-<anything>" one that is made.
type node struct {
	address   string
	documents map[string][]byte
	questions atomic.Int64
	server    *http.Server
}

// coldDelay is how long the node takes for a cold report, so that callers who come together find it at work.
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
	n.questions.Add(1)
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
