package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
)

const (
	sweepTimeout = time.Minute // for one pass

	// maxSwept bounds the values that one pass looks at. The next pass of the partition begins at a random place.
	maxSwept = 1000
)

// sweepInterval is the time between two passes of all instances together. Each pass sweeps one partition, so a round
// takes a day.
const sweepInterval = 24 * time.Hour / (partitions + 1)

// sweepAll deletes what is older than the retention, one partition at a time.
func (a *Archive) sweepAll() {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-a.ctx.Done():
			return
		}
		b := a.backend()
		if b == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(a.ctx, sweepTimeout)
		err := a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
			return a.layout.sweep(ctx, storage, b.Retention)
		})
		cancel()
		if err != nil && a.ctx.Err() == nil {
			b.Logger.Debug("sweeping the storage", zap.Error(err))
		}
	}
}

// sweep makes one pass, unless another instance makes one or has just made one.
func (l layout) sweep(ctx context.Context, storage certmagic.Storage, retention time.Duration) error {
	locked, err := tryLock(ctx, storage, l.sweepLock())
	if err != nil || !locked {
		return err
	}
	defer func() { _ = storage.Unlock(context.WithoutCancel(ctx), l.sweepLock()) }()

	next, at := 0, int64(0)
	if cursor, err := storage.Load(ctx, l.sweepCursor()); err == nil {
		if _, err := fmt.Sscan(string(cursor), &next, &at); err != nil || next < 0 || next > damagedPartition {
			next, at = 0, 0
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if since := time.Since(time.Unix(0, at)); since >= 0 && since < sweepInterval/2 {
		return nil
	}
	cursor := fmt.Sprintln((next+1)%(partitions+1), time.Now().UnixNano())
	if err := storage.Store(ctx, l.sweepCursor(), []byte(cursor)); err != nil {
		return err
	}
	return sweepPartition(ctx, storage, l.partition(next), time.Now().Add(-retention))
}

// tryLock takes the lock of the sweep if it is free. The instance that holds it does the work.
func tryLock(ctx context.Context, storage certmagic.Storage, name string) (bool, error) {
	if locker, ok := storage.(certmagic.TryLocker); ok {
		return locker.TryLock(ctx, name)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	err := storage.Lock(ctx, name)
	if errors.Is(err, context.DeadlineExceeded) {
		return false, nil
	}
	return err == nil, err
}

// sweepPartition deletes what was stored before a time.
func sweepPartition(ctx context.Context, storage certmagic.Storage, partition string, before time.Time) error {
	keys, err := storage.List(ctx, partition, false)
	if errors.Is(err, fs.ErrNotExist) || len(keys) == 0 && err == nil {
		return nil
	}
	if err != nil {
		return err
	}
	first := rand.IntN(len(keys)) //nolint:gosec // it need not be unpredictable
	for i := range min(len(keys), maxSwept) {
		k := keys[(first+i)%len(keys)]
		info, err := storage.Stat(ctx, k)
		if err != nil || !info.Modified.Before(before) {
			continue // deleted meanwhile, or young
		}
		if err := storage.Delete(ctx, k); err != nil {
			return err
		}
	}
	return ctx.Err()
}
