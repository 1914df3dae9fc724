package fsbroker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/caddyserver/certmagic"
)

// purgeTimeout bounds a purge of a storage, which is not written to meanwhile.
const purgeTimeout = time.Minute

// reportKeys are the keys of both kinds of report of a task, on all nodes that go by an ID.
func (l *liveHandlers) reportKeys(appServerID, taskID string) (keys []key) {
	for _, h := range l.all() {
		if node, ok := h.nodes[appServerID]; ok {
			keys = append(keys, reportKey(node.address, taskID, false), reportKey(node.address, taskID, true))
		}
	}
	return keys
}

// purgeMemory takes what is kept under keys, or everything for nil, out of the cache, and tells how much it was.
func (l *liveHandlers) purgeMemory(keys []key) int {
	all := l.all()
	if len(all) == 0 {
		return 0
	}
	return all[0].store.purge(keys)
}

// purge takes entries out, all of them when keys is nil, and tells how many there were.
func (c *cache) purge(keys []key) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.second.order.Len()
	if keys == nil {
		for c.second.order.Len() > 0 {
			k := c.second.order.Back().Value.(*slot).entry.key
			c.kept.Delete(string(k[:]))
		}
	}
	for _, k := range keys {
		c.kept.Delete(string(k[:]))
	}
	return before - c.second.order.Len()
}

// purge takes values out of the queue and the storage, all of them when keys is nil, and tells how many there were. A
// write under way ends first, as it would bring back what was just deleted.
func (a *archive) purge(ctx context.Context, keys []key) (queued, stored int, err error) {
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	if err := a.holdWrites(ctx); err != nil {
		return 0, 0, err
	}
	defer a.releaseWrites()
	queued = a.purgeQueue(keys)
	// After the time is up, nobody may look at what a slow storage still counts.
	counted := make(chan int, 1)
	err = a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
		n, err := purgeStorage(ctx, storage, keys)
		counted <- n
		return err
	})
	select {
	case stored = <-counted:
	default:
	}
	return queued, stored, err
}

// purgeQueue is purge for the queue.
func (a *archive) purgeQueue(keys []key) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.queue.Len()
	if keys == nil {
		for k := range a.queued {
			keys = append(keys, k)
		}
	}
	for _, k := range keys {
		if element, ok := a.queued[k]; ok {
			a.dequeue(element)
		}
	}
	return before - a.queue.Len()
}

// purgeStorage is purge for the storage, what was set aside as damaged included.
func purgeStorage(ctx context.Context, storage certmagic.Storage, keys []key) (n int, err error) {
	if keys == nil {
		for i := range partitions + 1 {
			deleted, err := purgePartition(ctx, storage, partition(i))
			n += deleted
			if err != nil {
				return n, err
			}
		}
		return n, nil
	}
	for _, k := range keys {
		for _, name := range []string{storageKey(k), damagedKey(k)} {
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
