package backend

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

// Broker takes files in, hands them to nodes, and fetches their reports. Its exported fields must not change while it
// serves requests.
type Broker struct {
	Access

	Nodes        []NodeRef        // get the files in turn
	NodeClient   *http.Client     // sends the requests to nodes; default: http.DefaultClient
	SubmitResult SubmitResultMode // the form of the answers to /submit-result; default: SubmitResultIDs
	Forget       time.Duration    // how long it keeps a submission that is completed; default: ten minutes

	// Dispatched is called when a node has got a submission, with the time when its analysis is finished. Default: nothing
	Dispatched func(submitID string, finish time.Time)

	mux   http.ServeMux
	queue chan *submission

	mu          sync.Mutex
	accepted    int // the number of submissions so far
	dispatched  int
	submissions map[string]*submission
	tasks       map[taskKey]*brokerTask
}

const (
	maxQueue      = 16       // files that wait for a node
	maxNodeAnswer = 64 << 20 // bytes
	defaultForget = 10 * time.Minute
	nodeTimeout   = 30 * time.Second
)

// NodeRef is a node as a broker knows it.
type NodeRef struct {
	AppServerID string
	Address     string // a URL
	Secret      string
}

// submission is a file that the broker accepted. The broker's mutex guards it. Its JSON is the answer to
// /submit-result.
type submission struct {
	FileSize        int               `json:"fileSize"`
	MediaType       MediaType         `json:"mediaType"`
	Digests         map[string]string `json:"digests"`
	State           string            `json:"state"`                     // QUEUED, SUCCESS or FAILED
	PositionInQueue *int              `json:"positionInQueue,omitempty"` // while QUEUED
	AppServerID     string            `json:"appServerID,omitempty"`
	HTTPStatus      int               `json:"httpStatus,omitempty"` // of the node's answer
	Result          json.RawMessage   `json:"result,omitempty"`     // the node's answer

	id      string
	number  int // of the submissions before it
	name    string
	file    []byte // until a node has it
	taskID  string
	deleted time.Time // when the broker deletes it; zero while QUEUED
}

// taskKey names a task.
type taskKey struct {
	appServerID, taskID string
}

// brokerTask holds the finished reports of a task that the broker has fetched. The broker's mutex guards it.
type brokerTask struct {
	reports map[bool][]byte // by the parameter all
	deleted time.Time       // when the broker deletes it
}

// NewBroker makes a broker that serves /submit, /submit-result, /task and /system-info. Submissions stay queued until
// Run is called.
func NewBroker(secret string, nodes ...NodeRef) *Broker {
	b := &Broker{
		Access:      Access{Secret: secret},
		Nodes:       nodes,
		queue:       make(chan *submission, maxQueue),
		submissions: make(map[string]*submission),
		tasks:       make(map[taskKey]*brokerTask),
	}
	b.mux.HandleFunc("POST /submit", b.submit)
	b.mux.HandleFunc("GET /submit-result", b.submitResult)
	b.mux.HandleFunc("GET /task", b.task)
	b.mux.HandleFunc("GET /system-info", b.systemInfo)
	return b
}

// ServeHTTP answers requests that hold the secret.
func (b *Broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.forget(time.Now())
	b.serve(w, r, &b.mux)
}

// forget deletes the submissions and tasks whose time is over.
func (b *Broker) forget(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.submissions, func(_ string, sub *submission) bool {
		return !sub.deleted.IsZero() && !now.Before(sub.deleted)
	})
	maps.DeleteFunc(b.tasks, func(_ taskKey, t *brokerTask) bool { return !now.Before(t.deleted) })
}

// deletion returns when the broker deletes what is completed at a time.
func (b *Broker) deletion(completed time.Time) time.Time {
	return completed.Add(cmp.Or(b.Forget, defaultForget))
}

// Run hands the queued files to the nodes, one after the other, until ctx ends.
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

// submit queues a file and answers at once.
func (b *Broker) submit(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	name, file, ok := readFile(w, r)
	if !ok {
		return
	}
	id := rand.Text()
	sub := &submission{
		FileSize: len(file), MediaType: mediaType(file, readExecutable(file)), Digests: digests(file), State: "QUEUED",
		id: id, name: name, file: file,
	}
	position, ok := b.enqueue(sub)
	if !ok {
		http.Error(w, "the queue is full, come back later", http.StatusServiceUnavailable)
		return
	}
	writeJSON(w, map[string]any{
		"processTime": time.Since(start).Milliseconds(),
		"acceptedFiles": []any{map[string]any{
			"ID": id, "submitName": name, "sha256": sub.Digests["SHA-256"], "mediaType": sub.MediaType, "positionInQueue": position,
		}},
		"rejectedFiles":  []any{},
		"submitWarnings": []any{},
	})
}

// enqueue queues a submission. It reports false if the queue is full.
func (b *Broker) enqueue(sub *submission) (position int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	sub.number = b.accepted
	select {
	case b.queue <- sub:
	default:
		return 0, false
	}
	b.accepted++
	b.submissions[sub.id] = sub
	return sub.number - b.dispatched, true
}

// dispatch hands a file to the next node.
func (b *Broker) dispatch(ctx context.Context, sub *submission) {
	node := b.Nodes[sub.number%len(b.Nodes)]
	answer, err := b.scan(ctx, node, sub.name, sub.file)
	if answer.finish.IsZero() {
		answer.finish = time.Now()
	}
	if b.complete(sub, node, answer, err) && b.Dispatched != nil {
		b.Dispatched(sub.id, answer.finish)
	}
}

// complete notes a node's answer to a submission. It reports whether the node has accepted the file.
func (b *Broker) complete(sub *submission, node NodeRef, answer nodeAnswer, err error) bool {
	taskID := taskIDOf(answer.body)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dispatched++
	sub.file = nil
	sub.HTTPStatus = answer.status
	sub.deleted = b.deletion(answer.finish)
	if err != nil || answer.status != http.StatusOK || taskID == "" {
		sub.State = "FAILED"
		return false
	}
	sub.State, sub.AppServerID, sub.Result, sub.taskID = "SUCCESS", node.AppServerID, answer.body, taskID
	b.tasks[taskKey{node.AppServerID, taskID}] = &brokerTask{reports: make(map[bool][]byte), deleted: sub.deleted}
	return true
}

// taskIDOf reads the ID of the task from a node's answer to /scan.
func taskIDOf(answer []byte) string {
	var document struct {
		ScanTasks []struct {
			TaskReference struct{ ID string }
		}
	}
	if err := json.Unmarshal(answer, &document); err != nil || len(document.ScanTasks) == 0 {
		return ""
	}
	return document.ScanTasks[0].TaskReference.ID
}

// submission returns a copy of a submission.
func (b *Broker) submission(id string) (sub submission, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	found, ok := b.submissions[id]
	if !ok {
		return sub, false
	}
	sub = *found
	if sub.State == "QUEUED" {
		position := sub.number - b.dispatched
		sub.PositionInQueue = &position
	}
	return sub, true
}

// task answers with the report of a submission or of a node's task.
func (b *Broker) task(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	all, errAll := boolParam(query, "all")
	nocache, errNocache := boolParam(query, "nocache")
	if err := errors.Join(errAll, errNocache); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	key := taskKey{query.Get("appServerID"), query.Get("taskID")}
	if id := query.Get("submitID"); id != "" {
		sub, ok := b.submission(id)
		switch {
		case !ok:
			http.Error(w, "there is no such submission", http.StatusNotFound)
			return
		case sub.State == "QUEUED":
			w.WriteHeader(http.StatusNoContent)
			return
		case sub.State == "FAILED":
			http.Error(w, "the submission failed and has no report", http.StatusNotFound)
			return
		}
		key = taskKey{sub.AppServerID, sub.taskID}
	}
	if key.appServerID == "" || key.taskID == "" {
		http.Error(w, "submitID, or appServerID and taskID, are missing", http.StatusBadRequest)
		return
	}
	if report, ok := b.kept(key, all); ok && !nocache {
		writeDocument(w, report)
		return
	}
	status, report := b.report(r.Context(), key, all)
	switch status {
	case http.StatusOK:
		writeDocument(w, report)
	case http.StatusNoContent:
		w.WriteHeader(status)
	case http.StatusNotFound:
		http.Error(w, "there is no such task", status)
	default:
		http.Error(w, "the node did not answer with a report", http.StatusInternalServerError)
	}
}

// kept returns the report of a task if the broker has fetched it as finished.
func (b *Broker) kept(key taskKey, all bool) (report []byte, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if t := b.tasks[key]; t != nil {
		report, ok = t.reports[all]
	}
	return report, ok
}

// keep keeps the finished report of a task.
func (b *Broker) keep(key taskKey, all bool, report []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.tasks[key]
	if t == nil { // the task did not go through this broker
		t = &brokerTask{reports: make(map[bool][]byte), deleted: b.deletion(time.Now())}
		b.tasks[key] = t
	}
	t.reports[all] = report
}

// report fetches the report of a task from its node, and keeps it if it is finished.
func (b *Broker) report(ctx context.Context, key taskKey, all bool) (status int, report []byte) {
	for _, node := range b.Nodes {
		if node.AppServerID != key.appServerID {
			continue
		}
		query := url.Values{"taskID": {key.taskID}, "all": {strconv.FormatBool(all)}}
		answer, err := b.ask(ctx, node, http.MethodGet, "/task?"+query.Encode(), "", nil)
		if err != nil {
			return http.StatusInternalServerError, nil
		}
		if answer.status != http.StatusOK {
			return answer.status, nil
		}
		report, finished, err := withVerdict(answer.body)
		if err != nil {
			return http.StatusInternalServerError, nil
		}
		if finished {
			b.keep(key, all, report)
		}
		return http.StatusOK, report
	}
	return http.StatusNotFound, nil
}

// withVerdict adds the final verdict to a node's report if it is finished. Facts alone are no verdict, so it is UNKNOWN.
func withVerdict(report []byte) (document []byte, finished bool, err error) {
	var parts struct {
		ProcessTime int64                      `json:"processTime"`
		Result      map[string]json.RawMessage `json:"result"`
	}
	if err := json.Unmarshal(report, &parts); err != nil {
		return nil, false, err
	}
	var reference struct{ State string }
	if err := json.Unmarshal(parts.Result["taskReference"], &reference); err != nil {
		return nil, false, err
	}
	if reference.State == "IN_PROGRESS" {
		return report, false, nil
	}
	parts.Result["finalVerdict"] = json.RawMessage(`{"verdict":"UNKNOWN","threatLevel":0,"confidence":0}`)
	document, err = json.Marshal(parts)
	return document, true, err
}

// nodeAnswer is an answer of a node.
type nodeAnswer struct {
	status int
	body   []byte
	finish time.Time // of the task that a file became; zero if the node does not say
}

// scan posts a file to a node.
func (b *Broker) scan(ctx context.Context, node NodeRef, name string, file []byte) (nodeAnswer, error) {
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("file", name)
	if err != nil {
		return nodeAnswer{}, err
	}
	if _, err := part.Write(file); err != nil {
		return nodeAnswer{}, err
	}
	if err := writer.Close(); err != nil {
		return nodeAnswer{}, err
	}
	return b.ask(ctx, node, http.MethodPost, "/scan", writer.FormDataContentType(), &form)
}

// ask sends a request to a node. An error may hold the URL with the secret: do not show it to anyone.
func (b *Broker) ask(ctx context.Context, node NodeRef, method, target, contentType string, body io.Reader) (nodeAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, node.Address+target, body)
	if err != nil {
		return nodeAnswer{}, err
	}
	req.Close = true // so that no connection outlives the broker
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	addSecret(req, node.Secret)
	resp, err := cmp.Or(b.NodeClient, http.DefaultClient).Do(req)
	if err != nil {
		return nodeAnswer{}, err
	}
	defer resp.Body.Close()
	answer := nodeAnswer{status: resp.StatusCode}
	answer.finish, _ = time.Parse(time.RFC3339Nano, resp.Header.Get(finishHeader))
	answer.body, err = io.ReadAll(io.LimitReader(resp.Body, maxNodeAnswer))
	return answer, err
}

// systemInfo answers with the state of the broker.
func (b *Broker) systemInfo(w http.ResponseWriter, _ *http.Request) {
	b.mu.Lock()
	queued := b.accepted - b.dispatched
	b.mu.Unlock()
	writeJSON(w, systemInfo("fsBroker", map[string]any{"queueCount": queued}))
}
