package archive

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
)

// guarded is a storage whose panics are errors: a module that is at fault costs what it would have done, and not the process.
// It refuses values that the module would not keep whole.
type guarded struct {
	storage certmagic.Storage
	logger  *zap.Logger
	whole   *atomic.Int64 // the size up to which values are kept whole, in bytes
}

// guardedLocker is a guarded storage that can try to take a lock.
type guardedLocker struct {
	guarded
	locker certmagic.TryLocker
}

// guardStorage returns a storage whose panics are errors, and which refuses values that are larger than whole.
func guardStorage(storage certmagic.Storage, logger *zap.Logger, whole *atomic.Int64) certmagic.Storage {
	g := guarded{storage, logger, whole}
	if locker, ok := storage.(certmagic.TryLocker); ok {
		return guardedLocker{g, locker}
	}
	return g
}

// Store implements certmagic.Storage.
func (g guarded) Store(ctx context.Context, name string, value []byte) error {
	if whole := g.whole.Load(); int64(len(value)) > whole {
		return fmt.Errorf("%w: it has %d bytes, and the storage keeps %d", errTooLarge, len(value), whole)
	}
	return guard.Do(g.logger, func() error { return g.storage.Store(ctx, name, value) })
}

// Load implements certmagic.Storage.
func (g guarded) Load(ctx context.Context, name string) ([]byte, error) {
	return guard.Call(g.logger, func() ([]byte, error) { return g.storage.Load(ctx, name) })
}

// Delete implements certmagic.Storage.
func (g guarded) Delete(ctx context.Context, name string) error {
	return guard.Do(g.logger, func() error { return g.storage.Delete(ctx, name) })
}

// Exists implements certmagic.Storage.
func (g guarded) Exists(ctx context.Context, name string) bool {
	exists, err := guard.Call(g.logger, func() (bool, error) { return g.storage.Exists(ctx, name), nil })
	return exists && err == nil
}

// List implements certmagic.Storage.
func (g guarded) List(ctx context.Context, prefix string, recursive bool) ([]string, error) {
	return guard.Call(g.logger, func() ([]string, error) { return g.storage.List(ctx, prefix, recursive) })
}

// Stat implements certmagic.Storage.
func (g guarded) Stat(ctx context.Context, name string) (certmagic.KeyInfo, error) {
	return guard.Call(g.logger, func() (certmagic.KeyInfo, error) { return g.storage.Stat(ctx, name) })
}

// Lock implements certmagic.Storage.
func (g guarded) Lock(ctx context.Context, name string) error {
	return guard.Do(g.logger, func() error { return g.storage.Lock(ctx, name) })
}

// Unlock implements certmagic.Storage.
func (g guarded) Unlock(ctx context.Context, name string) error {
	return guard.Do(g.logger, func() error { return g.storage.Unlock(ctx, name) })
}

// TryLock implements certmagic.TryLocker.
func (g guardedLocker) TryLock(ctx context.Context, name string) (bool, error) {
	return guard.Call(g.logger, func() (bool, error) { return g.locker.TryLock(ctx, name) })
}

// Interface guards
var (
	_ certmagic.Storage   = guarded{}
	_ certmagic.TryLocker = guardedLocker{}
)
