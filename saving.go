package fsbroker

import (
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// saving sees to it that all finished reports of a memory are stored in all archives. It knows which of them an archive has
// not taken yet.
type saving struct {
	mu   *sync.Mutex // of the memory; guards all that follows
	peek func(key string) (*entry, bool)
	all  func() iter.Seq[*entry]

	// The archives in which finished reports are to be stored. Each has the entries for which its queue had no room, and the IDs
	// by which operators know these. An ID is empty if it is not remembered.
	unsaved map[*archive.Archive]map[*entry]string

	// The keys of references that were stored before the documents that they refer to, by the entries of those documents.
	waiting map[*entry][]task.Key
}

// newSaving returns the saving of the entries that all returns, and that peek returns by their keys.
func newSaving(mu *sync.Mutex, peek func(key string) (*entry, bool), all func() iter.Seq[*entry]) *saving {
	return &saving{
		mu: mu, peek: peek, all: all,
		unsaved: make(map[*archive.Archive]map[*entry]string), waiting: make(map[*entry][]task.Key),
	}
}

// kept says how a report is kept. Only ttl matters for one that is not finished.
type kept struct {
	ttl    time.Duration
	id     harvest.ID // by which operators know it
	kind   task.Kind
	target *task.Key        // under which the report itself is stored; nil if that is its own key
	from   *archive.Archive // the report came from there, so it is not stored there again; nil if it came from an upstream
	saved  bool             // from has stored it, and has it not only in its queue
}

// maxUnsavedIDs bounds the unsaved entries of an archive whose IDs are remembered, because IDs do not count as memory.
const maxUnsavedIDs = 10_000

// keep queues a finished report to be stored in all archives. If the queue of one has no room, the report is queued later,
// provided that memory keeps it. Otherwise it is lost. The caller holds the mutex.
func (s *saving) keep(e *entry, as kept) {
	if as.saved {
		e.savedIn = as.from
	}
	for a, unsaved := range s.unsaved {
		switch {
		case a == as.from || a.Save(s.item(e)):
			delete(unsaved, e)
		case !e.whole.kept.Load():
			a.Lose(as.id.String(), e.report)
		case len(unsaved) < maxUnsavedIDs:
			unsaved[e] = strings.Clone(as.id.String()) // it may be a part of a long query
		default:
			unsaved[e] = ""
		}
	}
}

// leave queues what is still to be stored of an entry that leaves memory. It is lost if there is no room. The caller holds the
// mutex.
func (s *saving) leave(e *entry) {
	for a, unsaved := range s.unsaved {
		if id, ok := unsaved[e]; ok {
			delete(unsaved, e)
			if !a.Save(s.item(e)) {
				a.Lose(id, e.report)
			}
		}
	}
	delete(s.waiting, e)
}

// forget keeps an entry from being stored when it leaves memory. The caller holds the mutex.
func (s *saving) forget(e *entry) {
	for _, unsaved := range s.unsaved {
		delete(unsaved, e)
	}
}

// attach makes an archive one in which all finished reports are stored, including those that are kept already, and those
// that have left memory but are still queued for another archive.
func (s *saving) attach(a *archive.Archive) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for other := range s.unsaved {
		for _, i := range other.Queued() {
			i.Target = nil // it may not be stored in this one
			a.Save(i)
		}
	}
	unsaved := make(map[*entry]string)
	for e := range s.all() {
		if e.report.Finished() {
			unsaved[e] = ""
		}
	}
	s.unsaved[a] = unsaved
	s.queue(a)
}

// detach undoes attach.
func (s *saving) detach(a *archive.Archive) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.unsaved, a)
}

// resume queues what an archive had no room for, until it has none again.
func (s *saving) resume(a *archive.Archive) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue(a)
}

// queue is resume for a caller that holds the mutex.
func (s *saving) queue(a *archive.Archive) {
	for e := range s.unsaved[a] {
		if !a.Save(s.item(e)) {
			return
		}
		delete(s.unsaved[a], e)
	}
}

// stored notes that an archive has stored an item. It returns the keys of the reports that the archive has from now on. A
// reference that was stored before its target counts only when the target is stored.
func (s *saving) stored(i archive.Item, a *archive.Archive) (saved []task.Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i.Target != nil {
		target := s.keptAs(*i.Target, i.Report)
		if target != nil && target.savedIn != a && !slices.Contains(s.waiting[target], i.Key) {
			s.waiting[target] = append(s.waiting[target], i.Key)
		}
		if target == nil || target.savedIn != a {
			return nil
		}
	}
	e := s.keptAs(i.Key, i.Report)
	if e == nil {
		return []task.Key{i.Key}
	}
	e.savedIn = a
	saved = append(saved, i.Key)
	for _, k := range s.waiting[e] {
		if reference := s.keptAs(k, i.Report); reference != nil {
			reference.savedIn = a
			saved = append(saved, k)
		}
	}
	delete(s.waiting, e)
	return saved
}

// isSaved reports whether an archive has stored the report of an entry. A reference alone does not count. Without an archive,
// it is true. A report that is neither stored nor queued is queued again.
func (s *saving) isSaved(e *entry, a *archive.Archive) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a == nil || e.savedIn == a {
		return true
	}
	if a.IsQueued(e.key()) || e.target != nil && (s.keptAs(*e.target, e.report) != nil || a.IsQueued(*e.target)) {
		return false
	}
	if a.Save(s.item(e)) {
		delete(s.unsaved[a], e)
	}
	return false
}

// keptAs returns the entry under k if it has that report, or nil. The caller holds the mutex.
func (s *saving) keptAs(k task.Key, report *task.Report) *entry {
	if e, ok := s.peek(string(k[:])); ok && e.report.Same(report) {
		return e
	}
	return nil
}

// item returns how an entry is stored: as a reference if its target is kept, and so is stored as well. The caller holds the
// mutex.
func (s *saving) item(e *entry) archive.Item {
	i := archive.Item{Key: e.key(), Report: e.report, Kind: e.kind}
	if e.target != nil && s.keptAs(*e.target, e.report) != nil {
		i.Target = e.target
	}
	return i
}
