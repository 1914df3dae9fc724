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

	mu          sync.Mutex
	next        int
	submissions map[string]*submission
	mux         http.ServeMux
}

// NodeRef is how a broker knows a node.
type NodeRef struct {
	AppServerID string
	Address     string // a URL
	Secret      string
}

// submission is what became of a file. It is guarded by the broker's mutex.
type submission struct {
	FileSize    int               `json:"fileSize"`
	Digests     map[string]string `json:"digests"`
	State       string            `json:"state"` // QUEUED, SUCCESS or FAILED
	AppServerID string            `json:"appServerID,omitempty"`
	HTTPStatus  int               `json:"httpStatus,omitempty"` // the node's
	Result      json.RawMessage   `json:"result,omitempty"`     // the node's
}

// NewBroker makes a broker that serves /submit and /submit-result.
func NewBroker(secret string, nodes ...NodeRef) *Broker {
	b := &Broker{Secret: secret, Nodes: nodes, submissions: make(map[string]*submission)}
	b.mux.HandleFunc("POST /submit", b.submit)
	b.mux.HandleFunc("GET /submit-result", b.submitResult)
	return b
}

// ServeHTTP answers who has the secret.
func (b *Broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	serveWithSecret(w, r, b.Secret, &b.mux)
}

// submit takes a file in and answers at once; a node gets it afterwards.
func (b *Broker) submit(w http.ResponseWriter, r *http.Request) {
	name, file, ok := readFile(w, r)
	if !ok {
		return
	}
	id := rand.Text()
	sub := &submission{FileSize: len(file), Digests: digests(file), State: "QUEUED"}
	b.mu.Lock()
	b.submissions[id] = sub
	node := b.Nodes[b.next%len(b.Nodes)]
	b.next++
	b.mu.Unlock()
	go b.dispatch(sub, node, name, file)

	writeJSON(w, map[string]any{
		"acceptedFiles": []any{map[string]any{
			"ID": id, "submitName": name, "fileSize": sub.FileSize, "digests": sub.Digests, "state": "QUEUED",
		}},
		"rejectedFiles": []any{},
	})
}

// dispatch hands a file to a node.
func (b *Broker) dispatch(sub *submission, node NodeRef, name string, file []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	status, result, err := scan(ctx, node, name, file)
	b.mu.Lock()
	defer b.mu.Unlock()
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
	b.mu.Lock()
	sub, ok := b.submissions[r.URL.Query().Get("submitID")]
	var now submission
	if ok {
		now = *sub
	}
	b.mu.Unlock()
	if !ok {
		http.Error(w, "no such submission", http.StatusNotFound)
		return
	}
	writeJSON(w, now)
}
