package archive

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
)

// Notes are small values beside the reports, in folders. They have a checksum or a seal as reports have, but no retention:
// neither the sweep nor a purge deletes them. Operations on them go past the queue.

const (
	// maxNotes is the number of operations on notes at once. Further ones wait.
	maxNotes = 64

	// noteTimeout bounds an operation on a note.
	noteTimeout = 10 * time.Second
)

// ErrDamagedNote means that a note is not what was stored, so nobody can read it.
var ErrDamagedNote = errors.New("the note is damaged")

// ErrLockedNote means that a note cannot be read here: another version of this package has stored it, or it is sealed with
// another key, or it is not sealed although it should be.
var ErrLockedNote = errors.New("the note cannot be read here")

var errNoteName = errors.New("the name must have letters, digits, dashes, underscores and dots, and not begin with a dot")

// StoreNote stores a note, or replaces the one of that name. Like the other operations on notes, it returns when ctx ends,
// even if the storage ignores ctx. Then the note may be stored nevertheless.
func (a *Archive) StoreNote(ctx context.Context, folder, name string, note []byte) error {
	_, err := onNote(ctx, a, folder, name, func(ctx context.Context, b *Backend, at string) (struct{}, error) {
		stored, err := encode(value{kind: kindNote, at: a.Now(), key: noteKey(folder, name), raw: note}, at, b.Keyring)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, b.store(ctx, at, stored)
	})
	return wrapNoteError("storing", folder, name, err)
}

// LoadNote returns a note. The error is fs.ErrNotExist if there is none, and ErrDamagedNote or ErrLockedNote if it cannot be
// used.
func (a *Archive) LoadNote(ctx context.Context, folder, name string) ([]byte, error) {
	note, err := onNote(ctx, a, folder, name, func(ctx context.Context, b *Backend, at string) ([]byte, error) {
		stored, err := b.Storage.Load(ctx, at)
		if err != nil {
			return nil, err
		}
		v, err := decode(stored, at, noteKey(folder, name), b.Keyring)
		switch {
		case err == nil:
			return v.raw, nil
		case isForeign(err):
			return nil, fmt.Errorf("%w: %w", ErrLockedNote, err)
		}
		return nil, fmt.Errorf("%w: %w", ErrDamagedNote, err)
	})
	return note, wrapNoteError("loading", folder, name, err)
}

// DeleteNote deletes a note. It is no error if there is none.
func (a *Archive) DeleteNote(ctx context.Context, folder, name string) error {
	_, err := onNote(ctx, a, folder, name, func(ctx context.Context, b *Backend, at string) (struct{}, error) {
		return struct{}{}, ignoreNotExist(b.Storage.Delete(ctx, at))
	})
	return wrapNoteError("deleting", folder, name, err)
}

// ListNotes returns the names of the notes in a folder.
func (a *Archive) ListNotes(ctx context.Context, folder string) ([]string, error) {
	in := a.layout.noteFolder(folder)
	names, err := onNote(ctx, a, folder, folder, func(ctx context.Context, b *Backend, _ string) ([]string, error) {
		return b.lister.below(ctx, in, func(name string) bool { return isNoteName(strings.TrimPrefix(name, in+"/")) })
	})
	if err != nil {
		return nil, fmt.Errorf("listing the notes of %s: %w", folder, shownError{err})
	}
	for i, name := range names {
		names[i] = path.Base(name)
	}
	return names, nil
}

// LockNotes takes the lock of a folder of notes, for which it may wait, and reports whether it has. If it has, the caller must
// call unlock. If it has not, another has the lock; or there is an error, which may mean the same. Not every storage has locks
// that exclude others.
func (a *Archive) LockNotes(ctx context.Context, folder string) (unlock func() error, locked bool, err error) {
	b := a.backend()
	if b == nil {
		return nil, false, ErrUnreadable
	}
	unlock, err = a.locks.lock(ctx, b.Storage, a.layout.noteLock(folder))
	return unlock, unlock != nil, wrapNoteError("locking", folder, "", err)
}

// onNote runs an operation on a note. It returns when ctx has ended, even if the storage ignores it.
func onNote[T any](
	ctx context.Context, a *Archive, folder, name string, op func(ctx context.Context, b *Backend, at string) (T, error),
) (got T, err error) {
	b := a.backend()
	if b == nil {
		return got, ErrUnreadable
	}
	if !isNoteName(folder) || !isNoteName(name) {
		return got, errNoteName
	}
	ctx, cancel := context.WithTimeout(ctx, noteTimeout)
	defer cancel()
	select {
	case a.notes <- struct{}{}:
	case <-ctx.Done():
		return got, a.noteEnd(ctx)
	}
	type result struct {
		got T
		err error
	}
	done := make(chan result, 1)
	watched, dials := watchDials(ctx)
	go func() {
		got, err := op(watched, b, a.layout.noteName(folder, name))
		<-a.notes // an operation that hangs holds its slot
		done <- result{got, err}
	}()
	select {
	case r := <-done:
		return r.got, r.err
	case refusal := <-dials.refused:
		return got, refusal
	case <-ctx.Done():
		return got, a.noteEnd(ctx)
	}
}

// noteEnd returns the error of an operation on a note whose context has ended.
func (a *Archive) noteEnd(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return a.timeout()
	}
	return ctx.Err()
}

func wrapNoteError(doing, folder, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s the note %s: %w", doing, path.Join(folder, name), shownError{err})
}
