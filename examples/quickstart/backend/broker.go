package backend

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// Broker takes files in and hands them to nodes.
type Broker struct {
	Secret string    // that it wants of those who ask it
	Nodes  []NodeRef // that it hands files to, in turn

	mux   http.ServeMux
	queue chan *submission

	mu          sync.Mutex
	accepted    int // submissions, ever
	dispatched  int
	submissions map[string]*submission
}

// maxQueue bounds the files that wait for a node.
const maxQueue = 16

// NodeRef is how a broker knows a node.
type NodeRef struct {
	AppServerID string
	Address     string // a URL
	Secret      string
}

// submission is what became of a file. It is guarded by the broker's mutex.
type submission struct {
	FileSize        int               `json:"fileSize"`
	MediaType       MediaType         `json:"mediaType"`
	Digests         map[string]string `json:"digests"`
	State           string            `json:"state"`                     // QUEUED, SUCCESS or FAILED
	PositionInQueue *int              `json:"positionInQueue,omitempty"` // while it is QUEUED
	AppServerID     string            `json:"appServerID,omitempty"`
	HTTPStatus      int               `json:"httpStatus,omitempty"` // the node's
	Result          json.RawMessage   `json:"result,omitempty"`     // the node's

	number int // how many came before it
	name   string
	file   []byte // until a node has it
}

// NewBroker makes a broker that serves /submit and /submit-result. What it accepts stays queued until Run is called.
func NewBroker(secret string, nodes ...NodeRef) *Broker {
	b := &Broker{
		Secret: secret, Nodes: nodes, queue: make(chan *submission, maxQueue), submissions: make(map[string]*submission),
	}
	b.mux.HandleFunc("POST /submit", b.submit)
	b.mux.HandleFunc("GET /submit-result", b.submitResult)
	return b
}

// ServeHTTP answers who has the secret.
func (b *Broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	serveWithSecret(w, r, b.Secret, &b.mux)
}

// Run hands the files that are queued to the nodes, one after the other, until ctx ends.
func (b *Broker) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case sub := <-b.queue:
			b.dispatch(ctx, sub)
		}
	}
}

// submit takes a file in and answers at once; a node gets it afterwards.
func (b *Broker) submit(w http.ResponseWriter, r *http.Request) {
	name, file, ok := readFile(w, r)
	if !ok {
		return
	}
	id := rand.Text()
	sub := &submission{
		FileSize: len(file), MediaType: mediaType(file, readExecutable(file)), Digests: digests(file), State: "QUEUED",
		name: name, file: file,
	}
	position, ok := b.enqueue(id, sub)
	if !ok {
		http.Error(w, "the queue is full, come back later", http.StatusServiceUnavailable)
		return
	}
	writeJSON(w, map[string]any{
		"acceptedFiles": []any{map[string]any{
			"ID": id, "submitName": name, "sha256": sub.Digests["SHA-256"], "mediaType": sub.MediaType, "positionInQueue": position,
		}},
		"rejectedFiles": []any{},
	})
}

// enqueue queues a submission, unless too many wait already.
func (b *Broker) enqueue(id string, sub *submission) (position int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	sub.number = b.accepted
	select {
	case b.queue <- sub:
	default:
		return 0, false
	}
	b.accepted++
	b.submissions[id] = sub
	return sub.number - b.dispatched, true
}

// dispatch hands a file to the node whose turn it is.
func (b *Broker) dispatch(ctx context.Context, sub *submission) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	node := b.Nodes[sub.number%len(b.Nodes)]
	status, result, err := scan(ctx, node, sub.name, sub.file)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dispatched++
	sub.file = nil
	sub.HTTPStatus = status
	if err != nil || status != http.StatusOK {
		sub.State = "FAILED"
		return
	}
	sub.State, sub.AppServerID, sub.Result = "SUCCESS", node.AppServerID, result
}

// scan posts a file to a node.
func scan(ctx context.Context, node NodeRef, name string, file []byte) (status int, result []byte, err error) {
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("file", name)
	if err != nil {
		return 0, nil, err
	}
	if _, err := part.Write(file); err != nil {
		return 0, nil, err
	}
	if err := writer.Close(); err != nil {
		return 0, nil, err
	}
	target := fmt.Sprintf("%s/scan?secret=%s", node.Address, url.QueryEscape(node.Secret))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, &form)
	if err != nil {
		return 0, nil, err
	}
	req.Close = true // so that no connection outlives the broker
	req.Header.Set("Content-Type", writer.FormDataContentType())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	result, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, result, err
}

// submitResult tells what became of a submission.
func (b *Broker) submitResult(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("submitID")
	if id == "" {
		http.Error(w, "say which submission, with submitID", http.StatusBadRequest)
		return
	}
	now, ok := b.submission(id)
	if !ok {
		http.Error(w, "no such submission", http.StatusNotFound)
		return
	}
	writeJSON(w, now)
}

// submission is what a submission has become until now.
func (b *Broker) submission(id string) (now submission, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	sub, ok := b.submissions[id]
	if !ok {
		return now, false
	}
	now = *sub
	if now.State == "QUEUED" {
		position := now.number - b.dispatched
		now.PositionInQueue = &position
	}
	return now, true
}
