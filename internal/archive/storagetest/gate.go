package storagetest

import (
	"context"
	"errors"
	"sync"

	"github.com/caddyserver/certmagic"
)

// Gate ends the use of storages, so that a test can remove what they are in. Neither an archive nor Caddy waits for the
// operations that it has begun, and a store into a folder that was removed would make it again.
type Gate struct {
	mu       sync.Mutex
	closed   bool
	underway int
	idle     *sync.Cond
}

// NewGate returns a gate that is open.
func NewGate() *Gate {
	g := new(Gate)
	g.idle = sync.NewCond(&g.mu)
	return g
}

// ErrClosed is what operations return that begin after Close.
var ErrClosed = errors.New("the gate of the storage is closed")

// Guard returns a storage whose operations pass the gate.
func (g *Gate) Guard(s interface {
	certmagic.Storage
	certmagic.TryLocker
}) certmagic.Storage {
	return guarded{g, s, s}
}

// Close waits for the operations under way. None begins afterwards.
func (g *Gate) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for g.underway > 0 {
		g.idle.Wait()
	}
}

// pass does an operation unless the gate is closed. Unlock also passes while Close waits, since Lock may wait for it.
func (g *Gate) pass(o Op, do func() error) error {
	g.mu.Lock()
	if g.closed && (o != Unlock || g.underway == 0) {
		g.mu.Unlock()
		return ErrClosed
	}
	g.underway++
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.underway--; g.underway == 0 {
			g.idle.Broadcast()
		}
	}()
	return do()
}

// guarded is a storage behind a gate.
type guarded struct {
	gate    *Gate
	storage certmagic.Storage
	locker  certmagic.TryLocker
}

var (
	_ certmagic.Storage   = guarded{}
	_ certmagic.TryLocker = guarded{}
)

func (s guarded) Store(ctx context.Context, name string, value []byte) error {
	return s.gate.pass(Store, func() error { return s.storage.Store(ctx, name, value) })
}

func (s guarded) Load(ctx context.Context, name string) (value []byte, err error) {
	err = s.gate.pass(Load, func() (err error) {
		value, err = s.storage.Load(ctx, name)
		return err
	})
	return value, err
}

func (s guarded) Delete(ctx context.Context, name string) error {
	return s.gate.pass(Delete, func() error { return s.storage.Delete(ctx, name) })
}

func (s guarded) Exists(ctx context.Context, name string) (exists bool) {
	_ = s.gate.pass(Exists, func() error {
		exists = s.storage.Exists(ctx, name)
		return nil
	})
	return exists
}

func (s guarded) List(ctx context.Context, prefix string, recursive bool) (names []string, err error) {
	err = s.gate.pass(List, func() (err error) {
		names, err = s.storage.List(ctx, prefix, recursive)
		return err
	})
	return names, err
}

func (s guarded) Stat(ctx context.Context, name string) (info certmagic.KeyInfo, err error) {
	err = s.gate.pass(Stat, func() (err error) {
		info, err = s.storage.Stat(ctx, name)
		return err
	})
	return info, err
}

func (s guarded) Lock(ctx context.Context, name string) error {
	return s.gate.pass(Lock, func() error { return s.storage.Lock(ctx, name) })
}

func (s guarded) TryLock(ctx context.Context, name string) (locked bool, err error) {
	err = s.gate.pass(TryLock, func() (err error) {
		locked, err = s.locker.TryLock(ctx, name)
		return err
	})
	return locked, err
}

func (s guarded) Unlock(ctx context.Context, name string) error {
	return s.gate.pass(Unlock, func() error { return s.storage.Unlock(ctx, name) })
}
