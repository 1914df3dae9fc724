package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	// purgeTimeout bounds one step of a purge.
	purgeTimeout = 30 * time.Second

	// maxPurges is the number of partitions that are purged at once.
	maxPurges = 64
)

// Selection is what a purge deletes. The zero value is everything.
type Selection struct {
	Keys   []task.Key   // the reports under these keys
	Source *task.Source // the reports of a node
	File   *[32]byte    // the reports of a file, given its SHA-256 sum
	Before time.Time    // the reports that are older
}

// Matches reports whether a report under a key is selected. Target is the key under which it is stored, or nil if that is
// the same.
func (s Selection) Matches(k task.Key, target *task.Key, r *task.Report) bool {
	is := func(match func(task.Key) bool) bool { return match(k) || target != nil && match(*target) }
	switch {
	case s.Keys != nil:
		return is(func(k task.Key) bool { return slices.Contains(s.Keys, k) })
	case s.Source != nil:
		return is(func(k task.Key) bool { return k.Source() == *s.Source })
	case s.File != nil:
		return r.File() == *s.File && r.File() != [32]byte{}
	case !s.Before.IsZero():
		return r.At().Before(s.Before)
	}
	return true
}

// Purged is what one step of a purge has deleted.
type Purged struct {
	Queued, Stored int

	// Next is where the next step begins. It is Partitions when all is done.
	Next int
}

// Partitions is the number of steps that a purge is divided into at the most.
const Partitions = partitions

// Purge deletes what is selected from the queue and the storage, and verifies that it is gone. If that takes long, it
// returns how far it came, and is called again from there. What is stored meanwhile may be deleted as well.
func (a *Archive) Purge(ctx context.Context, s Selection, from int) (Purged, error) {
	b := a.backend()
	if b == nil {
		return Purged{}, ErrUnreadable
	}
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	done, err := a.purge(ctx, b, s, Purged{Next: from})
	if err == nil {
		return done, nil
	}
	if ctx.Err() != nil {
		err = a.writes.explain(timedOut(err))
	}
	return done, fmt.Errorf("the storage %s: %w", b.Name, shownError{err})
}

// purge deletes what is selected from the queue and then from the storage.
func (a *Archive) purge(ctx context.Context, b *Backend, s Selection, done Purged) (_ Purged, err error) {
	if done.Queued, err = a.purgeQueue(ctx, b, s); err != nil {
		return done, err
	}
	if err := a.renewRecord(ctx, b); err != nil { // the record must be there as long as the storage works
		return done, err
	}
	return a.purgeStorage(ctx, b, s, done)
}

// purgeStorage deletes what is selected from the storage.
func (a *Archive) purgeStorage(ctx context.Context, b *Backend, s Selection, done Purged) (_ Purged, err error) {
	switch {
	case s.Keys != nil:
		for _, k := range s.Keys {
			n, err := a.purgeKey(ctx, b, k)
			done.Stored += n
			if err != nil {
				return done, err
			}
		}
	case s.File != nil:
		if done.Stored, err = a.purgeFile(ctx, b, *s.File); err != nil {
			return done, err
		}
	default:
		return a.purgePartitions(ctx, b, s, done)
	}
	if err := a.checkRecord(ctx, b); err != nil {
		return done, err
	}
	done.Next = partitions
	return done, nil
}

// purgeQueue removes what is selected from the queue, and waits until no write of it is under way, which would bring it
// back.
func (a *Archive) purgeQueue(ctx context.Context, b *Backend, s Selection) (n int, err error) {
	match := func(i Item) bool { return s.Matches(i.Key, i.Target, i.Report) }
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		clear(a.alone)
		a.queueChanged(b)
	}()
	for {
		a.mu.Lock()
		n += a.queue.remove(match)
		underway, changed := a.queue.underway(match), a.changed
		a.mu.Unlock()
		if !underway {
			return n, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return n, fmt.Errorf("a report that is to be purged is still being written: %w", ctx.Err())
		}
	}
}

// purgeKey deletes what is stored under a key.
func (a *Archive) purgeKey(ctx context.Context, b *Backend, k task.Key) (n int, err error) {
	for _, kind := range []placeKind{inPartition, large, damaged} {
		deleted, err := a.remove(ctx, b, place{kind: kind, key: k})
		if err != nil {
			return n, err
		}
		n += deleted
	}
	return min(n, 1), nil
}

// remove deletes a value if there is one, verifies that it is gone, and returns how many there were. It also deletes the
// reference from its file.
func (a *Archive) remove(ctx context.Context, b *Backend, p place) (int, error) {
	name := a.layout.name(p)
	stored, err := b.Storage.Load(ctx, name)
	absent := errors.Is(err, fs.ErrNotExist)
	if err != nil && !absent {
		return 0, fmt.Errorf("loading %s: %w", name, err)
	}
	// Some storages say that there is nothing if they cannot be reached, but all say so if they cannot delete.
	if err := a.delete(ctx, b, p); err != nil {
		return 0, err
	}
	switch _, err := b.Storage.Load(ctx, name); {
	case err == nil:
		return 0, fmt.Errorf("%s is still there after it was deleted", name)
	case !errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("verifying that %s is deleted: %w", name, err)
	}
	if absent {
		return 0, nil
	}
	if v, err := decode(stored, name, p.key, b.Keyring); err == nil && v.report != nil && v.report.File() != [32]byte{} {
		for _, source := range a.fileSources(v.report.File()) {
			ref := place{kind: ofFile, key: task.FileKey(source, p.key), at: v.at.UnixNano()}
			if _, err := a.remove(ctx, b, ref); err != nil {
				return 1, err
			}
		}
	}
	return 1, nil
}

// fileSources returns the sources of the references to the reports of a file.
func (a *Archive) fileSources(sum [32]byte) []task.Source {
	return []task.Source{task.FileSource(a.Namespace, sum, task.Summary), task.FileSource(a.Namespace, sum, task.Complete)}
}

// purgeFile deletes the reports of a file, and the references to them.
func (a *Archive) purgeFile(ctx context.Context, b *Backend, sum [32]byte) (n int, err error) {
	for _, source := range a.fileSources(sum) {
		refs, err := a.listFile(ctx, b, source)
		if err != nil {
			return n, err
		}
		for _, p := range refs {
			deleted, err := a.purgeReference(ctx, b, p)
			n += deleted
			if err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// purgeReference deletes the report that a reference refers to, and the reference.
func (a *Archive) purgeReference(ctx context.Context, b *Backend, p place) (int, error) {
	name := a.layout.name(p)
	stored, err := b.Storage.Load(ctx, name)
	if err != nil {
		return 0, ignoreNotExist(err)
	}
	v, err := decode(stored, name, p.key, b.Keyring)
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", name, err)
	}
	n, err := a.purgeKey(ctx, b, v.target.key)
	if err != nil {
		return n, err
	}
	_, err = a.remove(ctx, b, p)
	return n, err
}

// purgePartitions deletes what is selected, partition by partition, until ctx ends.
func (a *Archive) purgePartitions(ctx context.Context, b *Backend, s Selection, done Purged) (Purged, error) {
	from := done.Next
	for done.Next < partitions && ctx.Err() == nil {
		end := min(done.Next+maxPurges, partitions)
		counts := make([]int, end-done.Next)
		group, stepCtx := errgroup.WithContext(ctx)
		for i := range counts {
			group.Go(func() (err error) {
				counts[i], err = a.purgePartition(stepCtx, b, s, done.Next+i)
				return err
			})
		}
		err := group.Wait()
		for _, n := range counts {
			done.Stored += n
		}
		if err == nil {
			err = a.checkRecord(ctx, b)
		}
		switch {
		case ctx.Err() != nil: // the next call begins with these
		case err != nil:
			return done, err
		default:
			done.Next = end
		}
	}
	if done.Next == from && from < partitions { // going on from there would not end
		return done, fmt.Errorf("the storage takes too long: %w", ctx.Err())
	}
	return done, nil
}

// purgePartition deletes what is selected of one partition, and verifies that it is gone.
func (a *Archive) purgePartition(ctx context.Context, b *Backend, s Selection, partition int) (n int, err error) {
	selected, err := a.selected(ctx, b, s, partition)
	if err != nil || len(selected) == 0 {
		return 0, err
	}
	for _, p := range selected {
		if err := a.delete(ctx, b, p); err != nil {
			return n, err
		}
		if p.kind == inPartition {
			n++
		}
	}
	left, err := a.selected(ctx, b, s, partition)
	if err != nil {
		return n, err
	}
	for _, p := range left {
		if slices.Contains(selected, p) {
			return n, fmt.Errorf("%s is still there after it was deleted", a.layout.name(p))
		}
	}
	return n, nil
}

// delete deletes a value. If that fails, the storage may no longer list the value although it is there, so the place is
// remembered for the next try.
func (a *Archive) delete(ctx context.Context, b *Backend, p place) error {
	name := a.layout.name(p)
	err := ignoreNotExist(b.Storage.Delete(ctx, name))
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		delete(a.undeleted, p)
		return nil
	}
	if a.undeleted == nil || len(a.undeleted) >= maxQueue {
		a.undeleted = make(map[place]struct{})
	}
	a.undeleted[p] = struct{}{}
	return fmt.Errorf("deleting %s: %w", name, err)
}

// undeletedIn returns the places below a folder that could not be deleted, without those that are listed.
func (a *Archive) undeletedIn(folder string, listed []place) (places []place) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for p := range a.undeleted {
		if strings.HasPrefix(a.layout.name(p), folder+"/") && !slices.Contains(listed, p) {
			places = append(places, p)
		}
	}
	slices.SortFunc(places, func(p, q place) int { return strings.Compare(a.layout.name(p), a.layout.name(q)) })
	return places
}

// selected returns where there are values of a partition that a purge deletes.
func (a *Archive) selected(ctx context.Context, b *Backend, s Selection, partition int) (selected []place, err error) {
	folders := []string{a.layout.partition(partition)}
	if s.Source != nil {
		folders = []string{a.layout.sourceFolder(partition, *s.Source), a.layout.damagedFolder(partition)}
	}
	for _, folder := range folders {
		places, err := a.listPlaces(ctx, b, folder)
		if err != nil {
			return nil, err
		}
		places = append(places, a.undeletedIn(folder, places)...)
		for _, p := range places {
			match := s.Source == nil || p.key.Source() == *s.Source
			if match && !s.Before.IsZero() {
				if match, err = a.isOlder(ctx, b, p, s.Before); err != nil {
					return nil, err
				}
			}
			if match {
				selected = append(selected, p)
			}
		}
	}
	return selected, nil
}

// isOlder reports whether a value is older than a time. One that has no time is not.
func (a *Archive) isOlder(ctx context.Context, b *Backend, p place, than time.Time) (bool, error) {
	name := a.layout.name(p)
	stored, err := b.Storage.Load(ctx, name)
	if err != nil {
		return false, ignoreNotExist(err)
	}
	at, err := timeOf(stored, name, p.key, b.Keyring)
	return err == nil && at.Before(than), nil
}
