package backend

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"runtime"
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
	completed int // tasks, known still or not
	mux       http.ServeMux
}

// task is a file under analysis. All but done is settled before others see it.
type task struct {
	id, name  string
	resource  string // the ID under which the complete report has the file
	submitted time.Time
	analysis  *Analysis
	took      time.Duration
	done      bool
}

// maxFile bounds the files that are taken, in bytes.
const maxFile = 64 << 20

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
	serveWithSecret(w, r, n.Secret, &n.mux)
}

// serveWithSecret is the authentication of nodes and brokers: a query parameter, in both of its spellings.
func serveWithSecret(w http.ResponseWriter, r *http.Request, secret string, next http.Handler) {
	query := r.URL.Query()
	if query.Get("secret") != secret && query.Get("serect") != secret {
		http.Error(w, "wrong secret", http.StatusUnauthorized)
		return
	}
	next.ServeHTTP(w, r)
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
	n.mu.Lock()
	n.tasks[t.id] = t
	n.mu.Unlock()
	time.AfterFunc(n.Analysis, func() { n.finish(t) })

	writeJSON(w, map[string]any{
		"processTime": t.took.Milliseconds(),
		"scanTasks":   []any{map[string]any{"taskReference": t.reference("IN_PROGRESS")}},
	})
}

func (n *Node) finish(t *task) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t.done = true
	n.completed++
	time.AfterFunc(n.Forget, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.tasks, t.id)
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
		http.Error(w, "the file is larger than 64 MiB", http.StatusRequestEntityTooLarge)
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
	n.mu.Lock()
	t, ok := n.tasks[query.Get("taskID")]
	done := ok && t.done
	n.mu.Unlock()
	if !ok {
		http.Error(w, "no such task, or not any more", http.StatusNotFound)
		return
	}
	writeJSON(w, map[string]any{
		"processTime": time.Since(start).Milliseconds(),
		"result":      t.report(done, query.Get("all") == "true"),
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
		"resourceReference": map[string]any{"type": "TRANSFORM_FILE", "name": "file", "ID": t.resource},
		"processTime":       t.took.Milliseconds(),
	}
}

// report is the result of a task, in the form that nodes give it. Facts are not a verdict, and so there is none.
func (t *task) report(done, all bool) map[string]any {
	state, overall := "IN_PROGRESS", "in_progress"
	if done {
		state, overall = "SUCCESS", "success"
	}
	subtasks := make([]any, 0, 2)
	for _, name := range []string{"strings", "headers"} {
		subtasks = append(subtasks, map[string]any{"name": name, "ID": t.id + "-" + name, "state": state})
	}
	result := map[string]any{
		"taskReference":     t.reference(state),
		"subtaskReferences": subtasks,
		"overallState":      overall,
		"finalVerdict":      map[string]any{"verdict": "UNKNOWN", "threatLevel": 0, "confidence": 0},
	}
	if !done {
		return result
	}
	a := t.analysis
	file := map[string]any{
		"name": t.name, "fileSize": a.FileSize, "mediaType": a.MediaType, "entropy": a.Entropy, "digests": a.Digests,
		"stringCount": len(a.Strings), "urlCount": len(a.URLs),
	}
	if a.Executable != nil {
		file["format"], file["machine"] = a.Executable.Format, a.Executable.Machine
	}
	result["file"] = file
	if all {
		result["resources"] = map[string]any{t.resource: a}
	}
	return result
}

// systemInfo tells how the node is, in MiB where it is about memory.
func (n *Node) systemInfo(w http.ResponseWriter, _ *http.Request) {
	n.mu.Lock()
	active, completed := 0, n.completed
	for _, t := range n.tasks {
		if !t.done {
			active++
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
