package backend

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"time"
)

// Node is a processor node: it analyses the files it is given as tasks, and holds their reports for a while.
type Node struct {
	Secret   string        // that it wants of those who ask it
	Analysis time.Duration // how long a task takes
	Forget   time.Duration // how long it knows a task after that

	mu        sync.Mutex
	tasks     map[string]*task
	forgotten int
	mux       http.ServeMux
}

// task is a file under analysis. It does not change: how far it is, is a matter of time.
type task struct {
	id, name  string
	resource  string // the ID under which the complete report has the file
	submitted time.Time
	finished  time.Time
	forgotten time.Time
	analysis  *Analysis
	took      time.Duration
}

// maxFile bounds the files that are taken, in bytes. A form of this size is read without a temporary file.
const maxFile = 32 << 20

// NewNode makes a node that serves /scan, /task and /system-info.
func NewNode(secret string, analysis, forget time.Duration) *Node {
	n := &Node{Secret: secret, Analysis: analysis, Forget: forget, tasks: make(map[string]*task)}
	n.mux.HandleFunc("POST /scan", n.scan)
	n.mux.HandleFunc("GET /task", n.task)
	n.mux.HandleFunc("GET /system-info", n.systemInfo)
	return n
}

// ServeHTTP answers who has the secret.
func (n *Node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.forget(time.Now())
	serveWithSecret(w, r, n.Secret, &n.mux)
}

// serveWithSecret is the authentication of nodes and brokers: a query parameter, in both of its spellings.
func serveWithSecret(w http.ResponseWriter, r *http.Request, secret string, next http.Handler) {
	query := r.URL.Query()
	for _, name := range []string{"secret", "serect"} {
		if subtle.ConstantTimeCompare([]byte(query.Get(name)), []byte(secret)) == 1 {
			next.ServeHTTP(w, r)
			return
		}
	}
	http.Error(w, "wrong secret", http.StatusUnauthorized)
}

// forget cleans up the tasks whose time is over.
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

// scan takes a file in, as form data.
func (n *Node) scan(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	name, file, ok := readFile(w, r)
	if !ok {
		return
	}
	t := &task{id: rand.Text(), resource: rand.Text(), name: name, submitted: start, analysis: Analyse(file)}
	t.took = time.Since(start)
	t.finished = time.Now().Add(n.Analysis)
	t.forgotten = t.finished.Add(n.Forget)
	n.mu.Lock()
	n.tasks[t.id] = t
	n.mu.Unlock()

	writeJSON(w, map[string]any{
		"processTime": t.took.Milliseconds(),
		"scanTasks":   []any{map[string]any{"taskReference": t.reference("IN_PROGRESS")}},
	})
}

// readFile reads the file of a request, or says what is wrong with it.
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
	id, all := query.Get("taskID"), false
	if id == "" {
		http.Error(w, "say which task, with taskID", http.StatusBadRequest)
		return
	}
	if text := query.Get("all"); text != "" {
		var err error
		if all, err = strconv.ParseBool(text); err != nil {
			http.Error(w, "all is true or false", http.StatusBadRequest)
			return
		}
	}
	n.mu.Lock()
	t, ok := n.tasks[id]
	n.mu.Unlock()
	if !ok {
		http.Error(w, "no such task, or not any more", http.StatusNotFound)
		return
	}
	writeJSON(w, map[string]any{
		"processTime": time.Since(start).Milliseconds(),
		"result":      t.report(start, all),
	})
}

// reference says what a task is about and how it is.
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

// report is the result of a task, in the form that nodes give it. Facts are not a verdict, and so there is none.
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
		"finalVerdict":      map[string]any{"verdict": "UNKNOWN", "threatLevel": 0, "confidence": 0},
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

// subtasks are the parts of a task. They are finished one after the other, the last one with the task.
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

// systemInfo tells how the node is, in MiB where it is about memory.
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
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	writeJSON(w, map[string]any{
		"versionInfo": map[string]any{"name": "example node", "version": runtime.Version()},
		"queueInfo":   map[string]any{"activeCount": active, "queueCount": 0, "completedCount": completed},
		"memoryStats": map[string]any{"usedMemory": memory.HeapAlloc >> 20, "totalMemory": memory.Sys >> 20},
	})
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value) // the client may have left
}
