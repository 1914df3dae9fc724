package archive

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

const (
	// maxSweeps is the number of values that a sweep reads and deletes at once. With 20 ms an operation, it keeps up with 60
	// million values a day.
	maxSweeps = 32

	// passTimeout bounds one pass over the index, and the scan of one partition.
	passTimeout = 5 * time.Minute

	// maxSweepFailures is the number of values that may fail at once before that is the storage's fault.
	maxSweepFailures = 20

	// sweepAgainFor is for how many days after its time a day of the index is swept again if something of it is left.
	sweepAgainFor = 3
)

// sweepAll deletes values whose retention is over, until the archive is closed. It is one goroutine with one operation at a
// time, so a storage that hangs costs no more.
func (a *Archive) sweepAll() {
	jitter := a.random("sweep")
	wait := time.Minute + time.Duration(jitter.Int64N(int64(time.Minute)))
	if b := a.backend(); b != nil {
		wait = min(wait, sweepInterval(b.Retention)+time.Duration(jitter.Int64N(int64(time.Second))))
	}
	for {
		if !a.sleep(wait) {
			return
		}
		wait = time.Minute
		if b := a.backend(); b != nil {
			a.NoteTask(TaskSweep, a.pass(b, jitter))
			interval := sweepInterval(b.Retention)
			wait = interval - interval/10 + time.Duration(jitter.Int64N(int64(interval/5)))
		}
	}
}

// pass makes one pass of the sweep, unless another instance makes one.
func (a *Archive) pass(b *Backend, jitter *rand.Rand) error {
	ctx, cancel := context.WithTimeout(a.ctx, lockPatience+2*passTimeout)
	defer cancel()
	if err := a.meetPeers(ctx, b); err != nil {
		return err
	}
	unlock, err := a.locks.lock(ctx, b.Storage, a.layout.sweepLock())
	if err != nil || unlock == nil {
		return err
	}
	err = a.sweep(ctx, b, jitter)
	return errors.Join(err, unlock())
}

// cursor is where the sweep goes on. It is stored, so that any instance can.
type cursor struct {
	Day       string `json:"day"`       // of the index: the days before are done
	Partition int    `json:"partition"` // that is scanned next
}

// sweep deletes what the index says is old, and scans one partition for what the index has lost.
func (a *Archive) sweep(ctx context.Context, b *Backend, jitter *rand.Rand) error {
	c, err := a.loadCursor(ctx, b)
	if err != nil {
		return err
	}
	before := a.Now().Add(-a.retention(b))
	failed := errors.Join(
		a.sweepIndex(ctx, b, &c, before),
		a.scan(ctx, b, c.Partition, before, jitter),
	)
	if c.Partition = (c.Partition + 1) % partitions; c.Partition == 0 {
		c.Day = "" // look for objects of the index that were left behind
	}
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return errors.Join(failed, b.Storage.Store(ctx, a.layout.sweepCursor(), text))
}

// loadCursor returns where the sweep goes on. Without a cursor that can be read, it begins anew.
func (a *Archive) loadCursor(ctx context.Context, b *Backend) (cursor, error) {
	var c cursor
	text, err := b.Storage.Load(ctx, a.layout.sweepCursor())
	if err := ignoreNotExist(err); err != nil {
		return c, fmt.Errorf("loading the cursor of the sweep: %w", err)
	}
	if err := json.Unmarshal(text, &c); err != nil || c.Partition < 0 || c.Partition >= partitions {
		return cursor{}, nil //nolint:nilerr // it begins anew
	}
	return c, nil
}

// sweepIndex deletes the values of all objects of the index whose newest value is older than a time, and the objects. A day
// with values that cannot be deleted holds up nothing, and is tried again for some days.
func (a *Archive) sweepIndex(ctx context.Context, b *Backend, c *cursor, before time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, passTimeout)
	defer cancel()
	last := indexDay(before)
	day, err := time.Parse(indexDayFormat, c.Day)
	if err != nil {
		if day, err = a.firstIndexed(ctx, b, before); err != nil {
			return err
		}
		c.Day = indexDay(day)
	}
	oldest := indexDay(before.AddDate(0, 0, -sweepAgainFor))
	allDone := true
	for ; indexDay(day) <= last; day = day.AddDate(0, 0, 1) {
		name := indexDay(day)
		done, err := a.sweepDay(ctx, b, name, before)
		if err != nil {
			return err
		}
		if allDone = allDone && (done || name < oldest); allDone && name < last {
			c.Day = indexDay(day.AddDate(0, 0, 1))
		}
	}
	return nil
}

// indexDay returns the day of the index that has a time.
func indexDay(t time.Time) string { return t.UTC().Format(indexDayFormat) }

// firstIndexed returns the first time that the index has, in UTC, or last if it has none before.
func (a *Archive) firstIndexed(ctx context.Context, b *Backend, last time.Time) (time.Time, error) {
	names, err := b.lister.below(ctx, a.layout.indexFolder(), a.isIndexName)
	if err != nil {
		return time.Time{}, err
	}
	first := last
	for _, name := range names {
		if newest, ok := a.layout.parseIndexName(name); ok && newest.Before(first) {
			first = newest
		}
	}
	return first.UTC(), nil
}

func (a *Archive) isIndexName(name string) bool {
	_, ok := a.layout.parseIndexName(name)
	return ok
}

// sweepDay deletes what is old of one day of the index, and reports whether nothing of the day is left.
func (a *Archive) sweepDay(ctx context.Context, b *Backend, day string, before time.Time) (done bool, err error) {
	names, err := b.lister.below(ctx, a.layout.indexFolder()+"/"+day, a.isIndexName)
	if err != nil {
		return false, err
	}
	done = true
	for _, name := range names {
		newest, _ := a.layout.parseIndexName(name)
		if !newest.Before(before) {
			done = false
			continue
		}
		swept, err := a.sweepObject(ctx, b, name, newest, before)
		if err != nil {
			return false, err
		}
		done = done && swept
	}
	return done, ctx.Err()
}

// sweepObject deletes the old values of an object of the index, and then the object. A value that was stored again since
// is in a later object as well. It reports whether the object is deleted: it stays if it has values that could not be
// deleted, or is of another version.
func (a *Archive) sweepObject(ctx context.Context, b *Backend, name string, newest, before time.Time) (bool, error) {
	stored, err := b.Storage.Load(ctx, name)
	if err != nil {
		return true, ignoreNotExist(err)
	}
	places, _, err := decodeIndex(stored)
	if errors.Is(err, errUnknownVersion) {
		return false, nil
	}
	if err != nil { // the scan finds what it said
		b.Logger.Warn("an object of the index is damaged and is deleted", zap.String("key", name), errorField(err))
	}
	left, err := forEach(ctx, places, func(ctx context.Context, p place) error { return a.expire(ctx, b, p, before) })
	switch {
	case err != nil:
		return false, err
	case len(left) == 0:
		return true, ignoreNotExist(b.Storage.Delete(ctx, name))
	case len(left) < len(places):
		return false, b.Storage.Store(ctx, name, encodeIndex(newest, left))
	}
	return false, nil
}

// forEach calls f for each place, for several at once. It returns those for which f has failed. If f fails for many, the
// storage is at fault, and forEach ends with an error.
func forEach(ctx context.Context, places []place, f func(context.Context, place) error) (failed []place, err error) {
	var mu sync.Mutex
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(maxSweeps)
	for _, p := range places {
		if groupCtx.Err() != nil {
			break
		}
		group.Go(func() error {
			err := f(groupCtx, p)
			if err == nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			if failed = append(failed, p); len(failed) > maxSweepFailures {
				return err
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return failed, ctx.Err()
}

// expire deletes a value if it is older than a time. Only the time inside decides.
func (a *Archive) expire(ctx context.Context, b *Backend, p place, before time.Time) error {
	name := a.layout.name(p)
	stored, err := b.Storage.Load(ctx, name)
	if err != nil {
		return ignoreNotExist(err)
	}
	at, err := timeOf(stored, name, p.key, b.Keyring)
	if err != nil {
		return a.keepWithoutTime(b, p, stored, err)
	}
	if !at.Before(before) || a.queued(p.key) != nil {
		return nil
	}
	if err := b.Storage.Delete(ctx, name); ignoreNotExist(err) != nil {
		return fmt.Errorf("deleting %s: %w", name, err)
	}
	a.Metrics.swept.Inc()
	return nil
}

// keepWithoutTime deals with a value whose time cannot be told. That of another version is left alone. A damaged one is set
// aside, which gives it a time.
func (a *Archive) keepWithoutTime(b *Backend, p place, stored []byte, err error) error {
	if errors.Is(err, errUnknownVersion) || p.kind == damaged {
		return nil
	}
	return a.setAside(b, p, stored)
}

// scan deletes the old values of a partition.
func (a *Archive) scan(ctx context.Context, b *Backend, partition int, before time.Time, jitter *rand.Rand) error {
	ctx, cancel := context.WithTimeout(ctx, passTimeout)
	defer cancel()
	places, err := a.listPlaces(ctx, b, a.layout.partition(partition))
	if err != nil {
		return err
	}
	// If the time does not suffice for all of them, the next round begins elsewhere.
	jitter.Shuffle(len(places), func(i, j int) { places[i], places[j] = places[j], places[i] })
	_, err = forEach(ctx, places, func(ctx context.Context, p place) error {
		// What was stored lately is young. If the storage knows the time, that saves reading the value.
		if info, err := b.Storage.Stat(ctx, a.layout.name(p)); err == nil && info.Modified.After(before) {
			return nil
		}
		return a.expire(ctx, b, p, before)
	})
	return err
}
