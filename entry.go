package fsbroker

import (
	"sync/atomic"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// entryOverhead is the most that an entry costs beside its document, in bytes: the structs themselves, with their strings,
// and the places in go-cache's map, in the index by file, and in the order of expiry. Most cost 400 to 450. Maps that are
// half empty, and two reports of each file, cost more (TestEntryOverhead).
const entryOverhead = 704

// entry is a report and its forms. Memory may have millions of them, so it is small, and its fields are in an order that
// leaves no gaps (BenchmarkCostPerReport).
type entry struct {
	name    string // the bytes of a task.Key, which go-cache's map shares
	report  *task.Report
	target  *task.Key        // under which the report itself is stored; nil if that is its own key; guarded by memory.mu
	savedIn *archive.Archive // that stored it last; nil if none has; guarded by memory.mu

	inflated  atomic.Pointer[inflatedCopy] // nil if there is none
	whole     form
	requested atomic.Bool // whether a caller has asked for the inflated document

	expiryPlace place // in memory.expiries; guarded by memory.mu
	filePlace   place // among the reports of its file; 0 if it is not in the index; guarded by memory.mu
	kind        task.Kind
	unkept      bool // it was never kept
	inflating   bool // a caller is inflating it; guarded by memory.mu
}

// form is a representation of a report, with its place in the eviction order. Callers to which it is being sent hold it.
type form struct {
	entry        *entry
	newer, older *form // in the eviction order; guarded by memory.mu
	visited      atomic.Bool
	holders      atomic.Int32
	kept         atomic.Bool // it is in the eviction order; changes under memory.mu
	counted      bool        // as being sent, in memory.budget; guarded by memory.mu
}

// inflatedCopy is the inflated form of a report that is compressed.
type inflatedCopy struct {
	form
	rep *task.Representation
}

func newEntry(k task.Key, report *task.Report) *entry {
	e := &entry{name: string(k[:]), report: report}
	e.whole.entry = e
	return e
}

// key returns the key under which the report is kept.
func (e *entry) key() task.Key { return task.Key([]byte(e.name)) }

// size returns the memory that a form takes, in bytes.
func (f *form) size() int64 {
	if f == &f.entry.whole {
		return int64(f.entry.report.Size()) + entryOverhead
	}
	return int64(f.entry.report.Length())
}

// unkept returns an entry that is not kept.
func unkept(report *task.Report) *entry {
	e := newEntry(task.Key{}, report)
	e.unkept = true
	return e
}

// visit marks the form as requested. It reads first, which keeps the cache line shared.
func (f *form) visit() {
	if !f.visited.Load() {
		f.visited.Store(true)
	}
}

// describe returns the header fields of a form of the report.
func (e *entry) describe(inflated bool) task.Representation {
	if !inflated {
		return e.report.Representation()
	}
	if f := e.inflated.Load(); f != nil {
		return *f.rep
	}
	return e.report.Inflated()
}
