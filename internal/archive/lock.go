package archive

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
)

const (
	// lockPatience is how long a lock is waited for until it counts as held by another. Some storages free the lock of an
	// instance that has ended only for one that waits, and do so after 20 seconds or a minute.
	lockPatience = 45 * time.Second

	// lockPause is the pause before a lock is tried again that has failed at once, as it does in some storages if it is held.
	lockPause = 2 * time.Second

	unlockTimeout = 10 * time.Second
)

var errLockHangs = errors.New("an operation on the lock hangs in the storage since an earlier try")

// locks are the locks that an archive uses, by name. While an operation on a lock hangs, no other is begun.
type locks struct {
	mu   sync.Mutex
	used map[string]lockUse
}

// lockUse is what is done with a lock.
type lockUse uint8

const (
	lockUnused lockUse = iota
	lockInUse          // it is being taken, held, or being released
	lockHangs          // an operation on it hangs, and is not waited for any more
)

// claim begins the use of a lock, and returns the use that keeps it from doing so.
func (l *locks) claim(name string) lockUse {
	l.mu.Lock()
	defer l.mu.Unlock()
	use := l.used[name]
	if use == lockUnused {
		if l.used == nil {
			l.used = make(map[string]lockUse)
		}
		l.used[name] = lockInUse
	}
	return use
}

// abandon notes that the operation under way hangs, and is not waited for any more.
func (l *locks) abandon(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.used[name] == lockInUse {
		l.used[name] = lockHangs
	}
}

// end ends the use of a lock.
func (l *locks) end(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.used, name)
}

// lock takes a lock. It waits for it, but not if the storage can try to take it. It returns nil if another has the lock, or else
// what releases it. Both return in time even if the storage ignores contexts.
//
// The context with which the lock is taken lives until it is released: when that context ends, some storages release the lock,
// and others renew it no longer.
func (l *locks) lock(ctx context.Context, storage certmagic.Storage, name string) (unlock func() error, err error) {
	switch l.claim(name) {
	case lockInUse:
		return nil, nil
	case lockHangs:
		return nil, errLockHangs
	}
	held, release := context.WithCancel(context.WithoutCancel(ctx))
	type result struct {
		locked bool
		err    error
	}
	results, abandoned := make(chan result), make(chan struct{})
	go func() {
		locked, err := takeLock(held, storage, name)
		select {
		case results <- result{locked, err}:
		case <-abandoned:
			if locked {
				_ = l.unlock(storage, name)
			} else {
				l.end(name)
			}
		}
	}()
	wait, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	select {
	case r := <-results:
		if r.locked {
			return func() error {
				defer release()
				return l.unlock(storage, name)
			}, nil
		}
		release()
		l.end(name)
		return nil, r.err
	case <-wait.Done():
		release()
		l.abandon(name)
		close(abandoned)
		return nil, ctx.Err()
	}
}

// unlock releases a lock that is held.
func (l *locks) unlock(storage certmagic.Storage, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), unlockTimeout)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		err := storage.Unlock(ctx, name)
		l.end(name)
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		l.abandon(name)
		return fmt.Errorf("releasing the lock %s: %w", name, errTimeout)
	}
}

// takeLock takes a lock, and reports whether it has. A lock that fails at once is tried again for a while. The error may mean
// that another has it: some storages say no more.
func takeLock(ctx context.Context, storage certmagic.Storage, name string) (bool, error) {
	if locker, ok := storage.(certmagic.TryLocker); ok {
		return locker.TryLock(ctx, name)
	}
	for begun := time.Now(); ; {
		err := storage.Lock(ctx, name)
		if err == nil {
			return true, nil
		}
		if ctx.Err() != nil || time.Since(begun)+lockPause >= lockPatience {
			if errors.Is(err, context.DeadlineExceeded) {
				return false, nil
			}
			return false, fmt.Errorf("taking the lock %s: %w", name, err)
		}
		pause, cancel := context.WithTimeout(ctx, lockPause)
		<-pause.Done()
		cancel()
	}
}
