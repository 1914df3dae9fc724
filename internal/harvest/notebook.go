package harvest

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
)

const (
	// maxNoting is the number of notes that are stored or deleted at once.
	maxNoting = 32

	// The delay before notes are tried again that could not be stored or deleted. It doubles with each failure.
	firstRetry = 250 * time.Millisecond
	lastRetry  = 5 * time.Second

	// remember is how long it is remembered that a note was deleted. It may have been read just before.
	remember = 2 * time.Minute
)

// note is a value in the storage that says what is followed.
type note struct {
	name    string
	content []byte

	open    int  // targets that have not ended. It is guarded by the notebook once the note has been added
	partial bool // some targets have ended, or were told. The notebook guards it
	leaving bool // other notes replace it. The follower guards it

	// pages are all notes of the same targets, of which this is the first. It is nil in the others.
	pages []*note

	// The notebook guards what follows.
	from   string        // the folder that it is moved from, or empty
	stored bool          // in the own folder
	tried  bool          // it may be in the own folder
	at     time.Time     // when it was stored
	failed bool          // the last operation on it has failed
	busy   bool          // it is queued or worked on
	done   chan struct{} // closed when it is stored, or need not be
}

func newNote(a, b uint64, content []byte) *note {
	return &note{name: fmt.Sprintf("%016x%016x", a, b), content: content, done: make(chan struct{})}
}

// confirm says that the note is stored, or need not be.
func (n *note) confirm() {
	select {
	case <-n.done:
	default:
		close(n.done)
	}
}

// isStored reports whether the note is stored.
func (n *note) isStored() bool {
	select {
	case <-n.done:
		return true
	default:
		return false
	}
}

// notebook keeps the notes of a follower in the storage. A note is stored until all its targets have ended, and then deleted.
// What fails is tried again. Work on notes begins only while the lease is fresh, so that others find what is stored. Notes that
// fail, or hang, do not hold up the others.
type notebook struct {
	ctx     context.Context
	work    *sync.WaitGroup
	storage func() (*archive.Archive, *zap.Logger)
	lease   *lease

	mu      sync.Mutex // guards the fields below and the notes
	notes   map[string]*note
	ended   map[string]time.Time // notes that were deleted, and when
	fresh   []*note              // to be worked on
	retries []*note              // to be worked on, having failed
	working [2]int               // on fresh notes, and on retries
	failing bool                 // the last operation has failed
	told    bool                 // the log says that it fails
	pause   time.Duration
	retryAt time.Time
	wake    *time.Timer
	changed chan struct{} // closed and replaced when work has ended
	closed  bool

	replacements []replacement // guarded by the follower
}

// replacement is how a note is replaced of which some targets have ended. A note is never overwritten, because a crash in
// between could damage it.
type replacement struct {
	old   []*note
	by    []*note
	items []*item // the targets that have not ended
}

func newNotebook(
	ctx context.Context, work *sync.WaitGroup, storage func() (*archive.Archive, *zap.Logger), l *lease,
) *notebook {
	nb := &notebook{
		ctx: ctx, work: work, storage: storage, lease: l,
		notes: make(map[string]*note), ended: make(map[string]time.Time), changed: make(chan struct{}),
	}
	nb.wake = time.AfterFunc(time.Hour, nb.pump)
	nb.wake.Stop()
	return nb
}

// add keeps notes from now on, which are new, or stored already.
func (nb *notebook) add(notes ...*note) {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	for _, n := range notes {
		nb.notes[n.name] = n
		if n.stored {
			n.confirm()
		}
		nb.enqueue(n)
	}
}

// release notes that a target of a note has ended.
func (nb *notebook) release(n *note) {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	n.partial = true
	if n.open--; n.open == 0 {
		nb.enqueue(n)
	}
}

// touch notes that a target of a note was told.
func (nb *notebook) touch(n *note) {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	n.partial = true
}

// partials returns the first pages of the notes of which some targets have ended or were told, but not all have ended. There
// are none while the storage fails.
func (nb *notebook) partials() map[*note][]*item {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	found := make(map[*note][]*item)
	for _, n := range nb.notes {
		if n.pages != nil && n.partial && n.open > 0 && !nb.failing && !nb.closed {
			found[n] = nil
		}
	}
	return found
}

// has reports whether a note is kept, or was deleted not long ago.
func (nb *notebook) has(name string) bool {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	_, ended := nb.ended[name]
	return ended || nb.notes[name] != nil
}

// compare stores those notes again that are missing among the names that are stored in the own folder, given when these were
// read: the storage may have lost them, or another instance may have moved them.
func (nb *notebook) compare(names []string, read time.Time) {
	listed := make(map[string]bool, len(names))
	for _, name := range names {
		listed[name] = true
	}
	nb.mu.Lock()
	defer nb.mu.Unlock()
	for name, n := range nb.notes {
		if n.stored && !n.busy && n.at.Before(read) && !listed[name] {
			n.stored = false
			nb.enqueue(n)
		}
	}
	for name, at := range nb.ended {
		if time.Since(at) > remember {
			delete(nb.ended, name)
		}
	}
}

// step is what is done with a note.
type step uint8

const (
	stepNone step = iota
	stepStore
	stepLeave // the folder that it is moved from
	stepDelete
	stepForget // it was never stored
)

// step returns the next step. The caller holds the mutex.
func (n *note) step() step {
	switch {
	case n.open > 0 && !n.stored:
		return stepStore
	case n.from != "":
		return stepLeave
	case n.open > 0:
		return stepNone
	case n.tried || n.stored:
		return stepDelete
	}
	return stepForget
}

// enqueue queues a note if there is something to do. The caller holds the mutex.
func (nb *notebook) enqueue(n *note) {
	if n.busy || n.step() == stepNone || nb.closed {
		return
	}
	nb.wake.Reset(0)
	n.busy = true
	if n.failed {
		nb.retries = append(nb.retries, n)
	} else {
		nb.fresh = append(nb.fresh, n)
	}
}

// pump starts work on notes.
func (nb *notebook) pump() {
	storage, logger := nb.storage() // before the mutex: it takes that of the follower
	if storage == nil {
		return
	}
	nb.mu.Lock()
	defer nb.mu.Unlock()
	if nb.closed || !nb.lease.fresh() {
		return
	}
	limit := maxNoting
	if nb.failing {
		limit = 1
	}
	start := func(list *[]*note, kind int) {
		n := (*list)[0]
		*list = (*list)[1:]
		nb.working[kind]++
		nb.work.Go(func() { nb.process(storage, logger, n, kind) })
	}
	for len(nb.fresh) > 0 && nb.working[0] < limit {
		start(&nb.fresh, 0)
	}
	for len(nb.retries) > 0 && nb.working[1] < limit {
		if wait := time.Until(nb.retryAt); wait > 0 {
			nb.wake.Reset(wait)
			return
		}
		start(&nb.retries, 1)
	}
}

// process does what there is to do with a note.
func (nb *notebook) process(storage *archive.Archive, logger *zap.Logger, n *note, kind int) {
	var err error
	for err == nil {
		nb.mu.Lock()
		step := n.step()
		if step == stepNone || step == stepForget {
			if step == stepForget {
				nb.forget(n)
			}
			n.busy, n.failed = false, false
			nb.mu.Unlock()
			break
		}
		n.tried = n.tried || step == stepStore
		nb.mu.Unlock()
		err = nb.do(storage, n, step)
		nb.note(logger, n, step, err)
	}
	nb.mu.Lock()
	nb.working[kind]--
	if err != nil {
		n.busy, n.failed = false, true
		nb.enqueue(n)
	}
	close(nb.changed)
	nb.changed = make(chan struct{})
	nb.mu.Unlock()
	nb.pump()
}

// do takes a step.
func (nb *notebook) do(storage *archive.Archive, n *note, s step) error {
	switch s {
	case stepStore:
		return storage.StoreNote(nb.ctx, nb.lease.holder, n.name, n.content)
	case stepLeave:
		return storage.DeleteNote(nb.ctx, n.from, n.name)
	case stepDelete:
		return storage.DeleteNote(nb.ctx, nb.lease.holder, n.name)
	case stepNone, stepForget:
	}
	return nil
}

// note notes the outcome of a step.
func (nb *notebook) note(logger *zap.Logger, n *note, s step, err error) {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	if nb.ctx.Err() != nil {
		return
	}
	nb.failing = err != nil
	if err != nil {
		nb.pause = min(max(2*nb.pause, firstRetry), lastRetry)
		nb.retryAt = time.Now().Add(nb.pause)
		if !nb.told {
			nb.told = true
			logger.Warn("what is pending cannot be noted in the storage: it is followed, but would not outlive the process", zap.Error(err))
		}
		return
	}
	if nb.told {
		nb.told = false
		logger.Info("what is pending can be noted in the storage again")
	}
	if n.failed {
		nb.pause, nb.retryAt = 0, time.Time{}
	}
	switch s {
	case stepStore:
		n.stored, n.at = true, time.Now()
		n.confirm()
	case stepLeave:
		n.from = ""
	case stepDelete:
		n.stored, n.tried = false, false
	case stepNone, stepForget:
	}
}

// forget removes a note that is not stored any more. The caller holds the mutex.
func (nb *notebook) forget(n *note) {
	n.confirm()
	delete(nb.notes, n.name)
	nb.ended[n.name] = time.Now()
}

// flush waits until there is nothing to do. It does not wait longer than patience, or while the storage fails or the lease is
// not fresh. Retries do not count.
func (nb *notebook) flush(patience time.Duration) {
	ctx, cancel := context.WithTimeout(nb.ctx, patience)
	defer cancel()
	for {
		nb.mu.Lock()
		idle := len(nb.fresh)+nb.working[0] == 0 || nb.failing
		changed := nb.changed
		nb.mu.Unlock()
		if storage, _ := nb.storage(); idle || storage == nil || !nb.lease.fresh() {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
	}
}

// close ends the work on notes.
func (nb *notebook) close() {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	nb.closed = true
	nb.wake.Stop()
}
