package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/caddyserver/certmagic"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Purge deletes the values under keys, or all values if keys is nil, from the queue and the storage, and returns how many
// there were in each. Nothing is written meanwhile: a write under way would bring back what was just deleted.
func (a *Archive) Purge(ctx context.Context, keys []task.Key) (queued, stored int, err error) {
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	if err := a.holdWrites(ctx); err != nil {
		return 0, 0, err
	}
	defer a.releaseWrites()
	queued = a.purgeQueue(keys)
	// The storage may go on counting after ctx has ended, so the count comes through a channel.
	counted := make(chan int, 1)
	err = a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
		n, err := a.layout.purge(ctx, storage, keys)
		counted <- n
		return err
	})
	select {
	case stored = <-counted:
	default:
	}
	return queued, stored, err
}

func (a *Archive) purgeQueue(keys []task.Key) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if keys == nil {
		keys = a.queue.keys()
	}
	for _, k := range keys {
		if a.queue.remove(k) {
			n++
		}
	}
	if n > 0 {
		a.notifyDequeued()
	}
	return n
}

// purge deletes from the storage, including what was set aside as damaged.
func (l layout) purge(ctx context.Context, storage certmagic.Storage, keys []task.Key) (n int, err error) {
	if keys == nil {
		for i := range partitions + 1 {
			deleted, err := purgePartition(ctx, storage, l.partition(i))
			n += deleted
			if err != nil {
				return n, err
			}
		}
		return n, nil
	}
	for _, k := range keys {
		for _, name := range []string{l.key(k), l.damagedKey(k)} {
			if !storage.Exists(ctx, name) {
				continue
			}
			if err := storage.Delete(ctx, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return n, fmt.Errorf("deleting from the storage: %w", err)
			}
			n++
		}
	}
	return n, ctx.Err()
}

func purgePartition(ctx context.Context, storage certmagic.Storage, partition string) (n int, err error) {
	keys, err := storage.List(ctx, partition, false)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("listing the storage: %w", err)
	}
	for _, k := range keys {
		if err := storage.Delete(ctx, k); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return n, fmt.Errorf("deleting from the storage: %w", err)
		}
		n++
	}
	return n, ctx.Err()
}
