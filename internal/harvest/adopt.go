package harvest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
)

const (
	// lookEvery is how often the leases of others are read.
	lookEvery = 2 * time.Second

	// expireAfter is how long a lease must not change until others take over what it covers.
	expireAfter = 30 * time.Second

	// maxGap is how long a lease may be unread until its time counts anew: its holder may not have reached the storage either.
	maxGap = 15 * time.Second

	// forgetAfter is how long nothing must be found under a lease that has expired until it is deleted.
	forgetAfter = 10 * time.Minute

	// compareEvery is how often the own folder is read.
	compareEvery = time.Minute

	// adoptTimeout bounds one try to take over what a lease covers, once it has the lock. So a lock that is held for longer does
	// not count.
	adoptTimeout = 30 * time.Second

	// maxReading is the number of notes and leases that are read at once.
	maxReading = 32
)

// adopter finds what is noted: what this instance followed before, and what nobody follows any more.
type adopter struct {
	*Follower
	notes    *archive.Archive
	notebook *notebook       // in notes
	lease    *lease          // in notes
	ctx      context.Context // ends when other notes are used

	mu    sync.Mutex       // guards the fields below
	peers map[string]*peer // by holder
	told  map[string]bool  // notes that cannot be read and were logged
}

// peer is the holder of another lease.
type peer struct {
	text     string
	changed  time.Time // when the lease was last seen to have changed
	read     time.Time
	found    time.Time // when a note was last found, or the lease expired
	adopting bool
	lockedAt time.Time // when another instance was first seen to hold the lock; zero if it does not
}

// storage returns where notes are kept, or nil if they are not kept there any more, and the logger for what happens there.
func (a *adopter) storage() (*archive.Archive, *zap.Logger) {
	f := a.Follower
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.source()
	if s == nil || s.Notes != a.notes {
		return nil, nil
	}
	if logger := a.notes.Logger(); logger != nil {
		return a.notes, logger
	}
	return a.notes, s.Logger
}

// resumeAll reads the own folder again and again until the follower is closed.
func (a *adopter) resumeAll() {
	for a.ctx.Err() == nil {
		wait := lookEvery
		if storage, logger := a.storage(); storage != nil {
			err := a.resume(storage, logger)
			if err == nil {
				wait = compareEvery
			}
			a.note(storage, archive.TaskResume, err)
		}
		sleep(a.ctx, wait)
	}
}

// lookAll reads the leases of others again and again until the follower is closed.
func (a *adopter) lookAll() {
	for a.ctx.Err() == nil {
		if storage, logger := a.storage(); storage != nil {
			a.note(storage, archive.TaskLook, a.look(storage, logger))
		}
		sleep(a.ctx, lookEvery)
	}
}

// look reads the leases of others.
func (a *adopter) look(storage *archive.Archive, logger *zap.Logger) error {
	holders, err := storage.ListNotes(a.ctx, leases)
	if err != nil {
		return err
	}
	var group errgroup.Group
	group.SetLimit(maxReading)
	for _, holder := range holders {
		if holder != a.lease.holder {
			group.Go(func() error { return a.meet(storage, logger, holder) })
		}
	}
	return group.Wait()
}

// note notes how a task has ended, unless it was broken off.
func (a *adopter) note(storage *archive.Archive, t archive.Task, err error) {
	if a.ctx.Err() == nil {
		storage.NoteTask(t, err)
	}
}

// resume follows what is noted in the own folder, and notes again what is missing there.
func (a *adopter) resume(storage *archive.Archive, logger *zap.Logger) error {
	read := time.Now()
	names, err := storage.ListNotes(a.ctx, a.lease.holder)
	if err != nil {
		return err
	}
	a.notebook.compare(names, read)
	a.tidy(a.notebook)
	notes, _, err := a.recallAll(a.ctx, storage, logger, a.lease.holder, names)
	if len(notes) > 0 {
		logger.Info("what was pending is followed again", zap.Int("notes", len(notes)))
	}
	return err
}

// meet reads the lease of another holder, and takes over what it covers if it has expired. What cannot be read here, such as the
// lease of an instance with another key, is no failure.
func (a *adopter) meet(storage *archive.Archive, logger *zap.Logger, holder string) error {
	ctx, cancel := context.WithTimeout(a.ctx, renewTimeout)
	defer cancel()
	text, err := storage.LoadNote(ctx, leases, holder)
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if errors.Is(err, archive.ErrDamagedNote) {
		text, err = nil, nil // it does not change, unless its holder is alive
	}
	switch {
	case errors.Is(err, archive.ErrLockedNote), errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	p := a.peers[holder]
	if p == nil || p.text != string(text) || now.Sub(p.read) > maxGap {
		if p == nil {
			p = new(peer)
			a.peers[holder] = p
		}
		p.text, p.changed, p.found = string(text), now, now
	}
	p.read = now
	if !p.adopting && a.expired(p) {
		p.adopting = true
		a.work.Go(func() { a.takeOver(storage, logger, holder, p) })
	}
	return nil
}

// expired reports whether a lease has not changed for so long that this instance may take over what it covers. The caller
// holds the mutex.
func (a *adopter) expired(p *peer) bool {
	return time.Since(p.changed) >= expireAfter && a.lease.fresh()
}

// hasExpired is expired for callers that do not hold the mutex.
func (a *adopter) hasExpired(p *peer) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.expired(p)
}

// takeOver takes over what a lease covers that has expired.
func (a *adopter) takeOver(storage *archive.Archive, logger *zap.Logger, holder string, p *peer) {
	found, err := a.adopt(storage, logger, holder, p)
	now := time.Now()
	a.mu.Lock()
	p.adopting = false
	if found || err != nil {
		p.found = now
	}
	over := now.Sub(p.found) >= forgetAfter
	a.mu.Unlock()
	if over {
		err = storage.DeleteNote(a.ctx, leases, holder)
	}
	if err != nil && a.ctx.Err() == nil {
		logger.Debug("taking over what another instance followed", zap.String("instance", holder), zap.Error(err))
	}
}

// adopt moves the notes of a holder into the own folder and follows their targets. It reports whether there are notes.
func (a *adopter) adopt(storage *archive.Archive, logger *zap.Logger, holder string, p *peer) (found bool, err error) {
	names, err := storage.ListNotes(a.ctx, holder)
	if err != nil || len(names) == 0 {
		return false, err
	}
	begun := time.Now()
	unlock, locked, err := storage.LockNotes(a.ctx, holder)
	if err == nil && !locked && !a.isStuck(p, begun) {
		return true, nil // another instance takes it over
	}
	ctx, cancel := context.WithTimeout(a.ctx, adoptTimeout)
	defer cancel()
	if locked {
		defer func() { _ = unlock() }()
	}
	if !a.hasExpired(p) {
		return true, nil // its holder came back while the lock was waited for
	}
	if locked {
		if names, err = storage.ListNotes(ctx, holder); err != nil {
			return true, err
		}
	}
	a.mu.Lock()
	p.lockedAt = time.Time{}
	a.mu.Unlock()
	notes, left, err := a.recallAll(ctx, storage, logger, holder, names)
	if len(notes) > 0 {
		logger.Info("what another instance followed is taken over", zap.String("instance", holder), zap.Int("notes", len(notes)))
	}
	for _, n := range notes {
		select {
		case <-n.done:
		case <-ctx.Done():
			return true, ctx.Err()
		}
	}
	return left > 0, err
}

// isStuck reports whether the lock for a holder has been held for so long that it does not count: an instance may have
// crashed that held it. A try to take it began at a time.
func (a *adopter) isStuck(p *peer, begun time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p.lockedAt.IsZero() {
		p.lockedAt = begun
	}
	return time.Since(p.lockedAt) >= adoptTimeout
}

// recallAll reads those notes of a folder that are not kept yet, and follows their targets. It returns them, and how many
// notes there are in the folder. An error means that others could not be read for the moment.
func (a *adopter) recallAll(
	ctx context.Context, storage *archive.Archive, logger *zap.Logger, folder string, names []string,
) (recalled []*note, left int, err error) {
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(maxReading)
	for _, name := range names {
		if a.notebook.has(name) {
			mu.Lock()
			left++
			mu.Unlock()
			continue
		}
		group.Go(func() error {
			n, err := a.recallNote(ctx, storage, folder, name)
			if errors.Is(err, archive.ErrDamagedNote) || errors.Is(err, archive.ErrLockedNote) {
				err = a.complain(ctx, storage, logger, folder, name, err)
			} else if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			left++
			if n != nil {
				recalled = append(recalled, n)
			}
			return err
		})
	}
	err = group.Wait()
	return recalled, left, err
}

// recallNote reads a note and follows its targets.
func (a *adopter) recallNote(ctx context.Context, storage *archive.Archive, folder, name string) (*note, error) {
	content, err := storage.LoadNote(ctx, folder, name)
	if err != nil {
		return nil, err
	}
	targets, err := decodeTargets(content)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", archive.ErrLockedNote, err)
	}
	n := &note{name: name, content: content, done: make(chan struct{})}
	n.pages = []*note{n}
	if folder == a.lease.holder {
		n.stored, n.at = true, time.Now()
	} else {
		n.from = folder
	}
	a.recall(n, targets)
	return n, nil
}

// complain logs that a note cannot be read, once. A damaged one is deleted: nobody can read it. Others are left alone, since
// another version or another key may read them.
func (a *adopter) complain(
	ctx context.Context, storage *archive.Archive, logger *zap.Logger, folder, name string, err error,
) error {
	if errors.Is(err, archive.ErrDamagedNote) {
		logger.Warn("a note of what is pending is damaged and is deleted", zap.Error(err))
		return storage.DeleteNote(ctx, folder, name)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.told[name] {
		a.told[name] = true
		logger.Warn("a note of what is pending cannot be read: what it says is not followed", zap.Error(err))
	}
	return nil
}

// recall follows the targets of a note that is stored already, at once.
func (a *adopter) recall(n *note, targets []Target) {
	f := a.Follower
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.notebook != a.notebook {
		return
	}
	s := f.source()
	for _, t := range targets {
		it := f.items[t.ID]
		if it == nil {
			it = f.begin(t)
			f.put(s, it, time.Now())
		}
		n.open++
		it.notes = append(it.notes, n)
	}
	f.notebook.add(n)
	f.dispatch()
}

// renewLease renews the lease until its storage is not used any more.
func (a *adopter) renewLease() {
	for beat := 1; a.ctx.Err() == nil; beat++ {
		begun, wait := time.Now(), renewAgain
		if a.renew(begun, beat) {
			wait = renewEvery - time.Since(begun)
		}
		sleep(a.ctx, wait)
	}
}

// renew renews the lease and reports whether it has.
func (a *adopter) renew(begun time.Time, beat int) bool {
	storage, _ := a.storage()
	text, err := json.Marshal(leaseRecord{Run: a.lease.run, Beat: beat})
	if storage == nil || err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(a.ctx, renewTimeout)
	defer cancel()
	err = storage.StoreNote(ctx, leases, a.lease.holder, text)
	a.note(storage, archive.TaskLease, err)
	if err != nil {
		return false
	}
	a.lease.mu.Lock()
	a.lease.renewed = begun
	a.lease.mu.Unlock()
	a.notebook.pump()
	return true
}
