package harvest

import (
	"slices"
	"time"
)

// flushTimeout bounds the time in which Flush notes what was added and what has ended.
const flushTimeout = 5 * time.Second

// Flush waits until it is noted in the storage what was added and what has ended, unless the storage fails.
func (f *Follower) Flush() {
	f.mu.Lock()
	notebook := f.notebook
	f.mu.Unlock()
	if notebook == nil {
		return
	}
	f.tidy(notebook)
	notebook.flush(flushTimeout)
	f.tidy(notebook)
	notebook.flush(flushTimeout)
}

// tidy replaces the notes of which some targets have ended, so that these are not followed again after a restart. It takes two
// calls: an old note is deleted when the new one is stored.
func (f *Follower) tidy(nb *notebook) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.notebook != nb {
		return
	}
	nb.replacements = slices.DeleteFunc(nb.replacements, func(r replacement) bool {
		if slices.ContainsFunc(r.by, func(n *note) bool { return !n.isStored() }) {
			return false
		}
		for _, it := range r.items {
			if f.items[it.ID] == it {
				it.notes = slices.DeleteFunc(it.notes, func(n *note) bool { return slices.Contains(r.old, n) })
				for _, n := range r.old {
					nb.release(n)
				}
			}
		}
		return true
	})
	partials := nb.partials()
	if len(partials) == 0 {
		return
	}
	for _, it := range f.items {
		for _, n := range it.notes {
			if items, ok := partials[n]; ok && !n.leaving {
				partials[n] = append(items, it)
			}
		}
	}
	for n, items := range partials {
		if len(items) > 0 {
			n.leaving = true
			by := f.newNotes(items)
			nb.add(by...)
			nb.replacements = append(nb.replacements, replacement{n.pages, by, items})
		}
	}
}
