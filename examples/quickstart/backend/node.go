package backend

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"runtime"
	"strconv"
	"sync"
	"time"
)

// Node is a processor node: it analyses the files it gets as tasks, and keeps their reports for a while. Its exported
// fields must not change while it serves requests.
type Node struct {
	Access

	Analysis   time.Duration // how long a task takes
	Forget     time.Duration // how long it keeps a task that is completed
	NumericIDs bool          // whether task IDs consist of digits

	mu        sync.Mutex
	tasks     map[string]*task
	lastID    int64 // of NumericIDs
	forgotten int
	mux       http.ServeMux
}

// task is a file under analysis. It does not change: its state follows from the time.
type task struct {
	id, name  string
	resource  string // the ID of the file in the complete report
	submitted time.Time
	finished  time.Time
	forgotten time.Time
	analysis  *Analysis
	took      time.Duration
}

// maxFile bounds the files that are accepted, in bytes. A form of this size is read without a temporary file.
const maxFile = 32 << 20

// finishHeader is a response header of /scan that says when the task will be finished. A real node tells its broker
// afterwards; this one knows beforehand.
const finishHeader = "X-Example-Finish"

// NewNode makes a node that serves /scan, /task and /system-info.
func NewNode(secret string, analysis, forget time.Duration) *Node {
	n := &Node{Access: Access{Secret: secret}, Analysis: analysis, Forget: forget, tasks: make(map[string]*task)}
	n.mux.HandleFunc("POST /scan", n.scan)
	n.mux.HandleFunc("GET /task", n.task)
	n.mux.HandleFunc("GET /system-info", n.systemInfo)
	return n
}

// ServeHTTP answers requests that hold the secret.
func (n *Node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.forget(time.Now())
	n.serve(w, r, &n.mux)
}

// forget deletes the tasks whose time is over.
func (n *Node) forget(now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id, t := range n.tasks {
		if !now.Before(t.forgotten) {
			delete(n.tasks, id)
			n.forgotten++
		}
	}
}

// add gives a task its ID and keeps it.
func (n *Node) add(t *task) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t.id = rand.Text()
	if n.NumericIDs {
		n.lastID = max(n.lastID+1, time.Now().UnixMilli()) // also greater than any ID before a restart
		t.id = strconv.FormatInt(n.lastID, 10)
	}
	n.tasks[t.id] = t
}

// scan makes a task of a file.
func (n *Node) scan(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	name, file, ok := readFile(w, r)
	if !ok {
		return
	}
	t := &task{resource: rand.Text(), name: name, submitted: start, analysis: Analyse(file)}
	t.took = time.Since(start)
	t.finished = time.Now().Add(n.Analysis)
	t.forgotten = t.finished.Add(n.Forget)
	n.add(t)

	w.Header().Set(finishHeader, t.finished.Format(time.RFC3339Nano))
	writeJSON(w, map[string]any{
		"processTime": t.took.Milliseconds(),
		"scanTasks":   []any{map[string]any{"taskReference": t.reference("IN_PROGRESS")}},
	})
}

// readFile reads the file of a request. If there is none, or it is too large, it responds with an error.
func readFile(w http.ResponseWriter, r *http.Request) (name string, file []byte, ok bool) {
	r.Body = http.MaxBytesReader(w, r.Body, maxFile)
	content, header, err := r.FormFile("file")
	if err == nil {
		defer content.Close()
		file, err = io.ReadAll(content)
	}
	if r.MultipartForm != nil {
		_ = r.MultipartForm.RemoveAll()
	}
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		http.Error(w, "the file is larger than 32 MiB", http.StatusRequestEntityTooLarge)
		return "", nil, false
	}
	if err != nil {
		http.Error(w, `send the file as form data, named "file"`, http.StatusBadRequest)
		return "", nil, false
	}
	return header.Filename, file, true
}

// task answers with a report: the high-level one, or with all=true the complete one.
func (n *Node) task(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	query := r.URL.Query()
	id := query.Get("taskID")
	if id == "" {
		http.Error(w, "taskID is missing", http.StatusBadRequest)
		return
	}
	all, err := boolParam(query, "all")
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	n.mu.Lock()
	t, ok := n.tasks[id]
	n.mu.Unlock()
	if !ok {
		http.Error(w, "there is no such task, or it is deleted", http.StatusNotFound)
		return
	}
	writeJSON(w, map[string]any{
		"processTime": time.Since(start).Milliseconds(),
		"result":      t.report(start, all),
	})
}

// boolParam reads a query parameter that is true or false, and false if it is missing.
func boolParam(query url.Values, name string) (bool, error) {
	text := query.Get(name)
	if text == "" {
		return false, nil
	}
	value, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%s is neither true nor false", name)
	}
	return value, nil
}

// reference returns what a report says of its task.
func (t *task) reference(state string) map[string]any {
	return map[string]any{
		"name": "transform-file",
		"additionalInfo": map[string]any{
			"submitName": t.name,
			"submitTime": t.submitted.UnixMilli(),
			"digests":    map[string]string{"SHA-256": t.analysis.Digests["SHA-256"]},
		},
		"ID":                t.id,
		"state":             state,
		"resourceReference": t.resourceReference(),
		"processTime":       t.took.Milliseconds(),
	}
}

func (t *task) resourceReference() map[string]any {
	return map[string]any{"type": "TRANSFORM_FILE", "name": "file", "ID": t.resource}
}

// report returns the result of a task as a node has it. The final verdict is the broker's.
func (t *task) report(now time.Time, all bool) map[string]any {
	state, overall := stateAt(now, t.finished), "in_progress"
	if state == "SUCCESS" {
		overall = "success"
	}
	file := map[string]any{"name": t.name, "hash": t.analysis.Digests["SHA-256"], "fileSize": t.analysis.FileSize}
	result := map[string]any{
		"taskReference":     t.reference(state),
		"subtaskReferences": t.subtasks(now),
		"overallState":      overall,
		"file":              file,
	}
	if state != "SUCCESS" {
		return result
	}
	a := t.analysis
	file["type"], file["digests"], file["entropy"] = a.MediaType.String, a.Digests, a.Entropy
	file["stringCount"], file["urlCount"] = len(a.Strings), len(a.URLs)
	if a.Executable != nil {
		file["format"], file["machine"] = a.Executable.Format, a.Executable.Machine
	}
	if all {
		result["resources"] = map[string]any{t.resource: struct {
			ResourceReference map[string]any `json:"resourceReference"`
			SubmitName        string         `json:"submitName"`
			*Analysis
		}{t.resourceReference(), t.name, a}}
	}
	return result
}

// subtasks returns the parts of a task. They finish one after the other, the last one with the task.
func (t *task) subtasks(now time.Time) []any {
	names := []string{"headers", "strings"}
	subtasks := make([]any, len(names))
	for i, name := range names {
		share := t.finished.Sub(t.submitted) * time.Duration(i+1) / time.Duration(len(names))
		subtasks[i] = map[string]any{"name": name, "ID": t.id + "-" + name, "state": stateAt(now, t.submitted.Add(share))}
	}
	return subtasks
}

func stateAt(now, finished time.Time) string {
	if now.Before(finished) {
		return "IN_PROGRESS"
	}
	return "SUCCESS"
}

// systemInfo answers with the state of the node.
func (n *Node) systemInfo(w http.ResponseWriter, _ *http.Request) {
	n.mu.Lock()
	active, completed := 0, n.forgotten
	for _, t := range n.tasks {
		if time.Now().Before(t.finished) {
			active++
		} else {
			completed++
		}
	}
	n.mu.Unlock()
	info := systemInfo("example node", map[string]any{"activeCount": active, "queueCount": 0, "completedCount": completed})
	info["activeThreads"] = runtime.NumGoroutine()
	writeJSON(w, info)
}

// systemInfo returns what the answers to /system-info have in common. Memory and space are in MiB.
func systemInfo(name string, queue map[string]any) map[string]any {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	info := map[string]any{
		"versionInfo": map[string]any{"name": name, "version": runtime.Version()},
		"queueInfo":   queue,
		"memoryStats": map[string]any{"usedMemory": memory.HeapAlloc >> 20, "totalMemory": memory.Sys >> 20},
	}
	if free, ok := freeDiscSpace(); ok {
		info["freeDiscSpaceInMb"] = free
	}
	return info
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value) // the client may have left
}

func writeDocument(w http.ResponseWriter, document []byte) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(document) // the client may have left
}
