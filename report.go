package fsbroker

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
)

// report is what a node had to say about a task, at the time it said it.
type report struct {
	at       time.Time
	finished bool   // it will never change
	hash     string // of the document; empty while there is nothing to report yet

	// The document in up to two forms, each made at most once. A finished report is kept compressed, and inflated
	// again for the first caller that does not take gzip.
	plain     atomic.Pointer[form]
	gzipped   atomic.Pointer[form]
	plainSize int
	inflating sync.Mutex
}

// form is a document as it is sent, with what its header fields say of it, so that they are worded once.
type form struct {
	body   []byte
	etag   string
	length string
}

func newForm(body []byte, etag string) *form {
	return &form{body: body, etag: etag, length: strconv.Itoa(len(body))}
}

// newReport judges a node's document. The error says what is wrong with it, and shows none of it.
func newReport(document []byte, at time.Time) (*report, error) {
	finished, err := judge(document)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(document)
	r := &report{
		at:        at,
		finished:  finished,
		hash:      hex.EncodeToString(sum[:16]),
		plainSize: len(document),
	}
	r.plain.Store(r.plainForm(document))
	return r, nil
}

func (r *report) plainForm(document []byte) *form { return newForm(document, `"`+r.hash+`"`) }

func (r *report) gzippedForm(gzipped []byte) *form { return newForm(gzipped, `"`+r.hash+`-gz"`) }

// nothingYet is the report of a task that is known and has none.
func nothingYet(at time.Time) *report { return &report{at: at} }

// isEmpty tells whether there is nothing to report yet.
func (r *report) isEmpty() bool { return r.hash == "" }

// answers implements keepable.
func (r *report) answers(nocache bool) bool { return !nocache }

// isReport implements keepable.
func (r *report) isReport() bool { return !r.isEmpty() }

// since implements keepable.
func (r *report) since() time.Time { return r.at }

// size implements keepable: it is what the report's document takes as it is kept first, in bytes: those of its capacity, which is what Go's
// allocator rounds a length up to.
func (r *report) size() int {
	for _, f := range [...]*form{r.gzipped.Load(), r.plain.Load()} {
		if f != nil {
			return cap(f.body)
		}
	}
	return 0
}

// state is the name of a task's state, or empty where the document has none.
type state string

// UnmarshalJSON takes anything: a state that is not a string is none.
func (s *state) UnmarshalJSON(raw []byte) error {
	var name string
	if err := json.Unmarshal(raw, &name); err == nil {
		*s = state(name)
	}
	return nil
}

// finished tells whether a task in this state is over. Only the names of states in which work goes on are known for
// sure, so every other word ends a task; none at all does not.
func (s state) finished() bool {
	switch strings.ToUpper(string(s)) {
	case "", "QUEUED", "PENDING", "WAITING", "SCHEDULED", "STARTED", "RUNNING", "PROCESSING", "IN_QUEUE", "IN_PROGRESS":
		return false
	}
	return true
}

// judge tells whether a document is a finished report. The states of the task and its subtasks decide, and nothing else
// in the document: reports hold stale states of other tasks further down, which say nothing about this one.
func judge(document []byte) (finished bool, err error) {
	var d struct {
		Result *struct {
			TaskReference *struct {
				State state `json:"state"`
			} `json:"taskReference"`
			SubtaskReferences []struct {
				State state `json:"state"`
			} `json:"subtaskReferences"`
		} `json:"result"`
	}
	if err := json.Unmarshal(document, &d); err != nil {
		return false, describeJSONError(err)
	}
	if d.Result == nil {
		return false, errors.New("it has no result")
	}
	if d.Result.TaskReference == nil {
		return true, nil
	}
	if !d.Result.TaskReference.State.finished() {
		return false, nil
	}
	for _, subtask := range d.Result.SubtaskReferences {
		if !subtask.State.finished() {
			return false, nil
		}
	}
	return true, nil
}

// describeJSONError says what is wrong with a JSON document without showing a piece of it.
func describeJSONError(err error) error {
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("it is not JSON, or not all of it came (byte %d)", syntax.Offset)
	}
	if mismatch, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && mismatch.Field != "" {
		return fmt.Errorf("its %s has another JSON type than expected", mismatch.Field)
	}
	return errors.New("it is not a JSON object")
}

// gzipLevel makes real reports as small as higher levels do within a few percent, at several hundred MB/s.
const gzipLevel = 6

// gzipWriters saves the large tables of a writer for the next report.
var gzipWriters = sync.Pool{New: func() any {
	zw, err := gzip.NewWriterLevel(nil, gzipLevel)
	if err != nil {
		panic(err) // for another level only
	}
	return zw
}}

// compress makes the gzip form and lets go of the plain one. A document that does not shrink stays as it is.
func (r *report) compress() {
	plain := r.plain.Load().body
	zw := gzipWriters.Get().(*gzip.Writer)
	defer gzipWriters.Put(zw)
	var buf bytes.Buffer
	zw.Reset(&buf)
	if _, err := zw.Write(plain); err != nil || zw.Close() != nil || buf.Len() >= len(plain) {
		return
	}
	r.gzipped.Store(r.gzippedForm(bytes.Clone(buf.Bytes())))
	r.plain.Store(nil)
}

// inflated is the plain form, made from the gzip form where it is missing. It tells whether it was made by this call.
func (r *report) inflated() (plain *form, made bool, err error) {
	if plain = r.plain.Load(); plain != nil {
		return plain, false, nil
	}
	r.inflating.Lock()
	defer r.inflating.Unlock()
	if plain = r.plain.Load(); plain != nil {
		return plain, false, nil
	}
	zr, err := gzip.NewReader(bytes.NewReader(r.gzipped.Load().body))
	if err != nil {
		return nil, false, fmt.Errorf("inflating a kept report: %w", err)
	}
	document := slices.Grow([]byte(nil), r.plainSize)[:r.plainSize]
	if _, err := io.ReadFull(zr, document); err != nil {
		return nil, false, fmt.Errorf("inflating a kept report: %w", err)
	}
	plain = r.plainForm(document)
	r.plain.Store(plain)
	return plain, true, nil
}
