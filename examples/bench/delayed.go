package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() { caddy.RegisterModule(new(delayed)) }

// delayed is a storage whose operations take as long as those of a database across a network. Its Caddyfile is
// `bench_delayed <delay> [<folder>]`.
type delayed struct {
	// How long each operation takes at least.
	Delay caddy.Duration `json:"delay,omitempty"`

	// The folder of the values. Without a folder, values are not kept.
	Folder string `json:"folder,omitempty"`
}

func (*delayed) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.storage.bench_delayed", New: func() caddy.Module { return new(delayed) }}
}

func (d *delayed) UnmarshalCaddyfile(dispenser *caddyfile.Dispenser) error {
	dispenser.Next()
	args := dispenser.RemainingArgs()
	if len(args) == 0 || len(args) > 2 {
		return dispenser.ArgErr()
	}
	delay, err := caddy.ParseDuration(args[0])
	if err != nil {
		return dispenser.WrapErr(err)
	}
	d.Delay = caddy.Duration(delay)
	if len(args) == 2 {
		d.Folder = args[1]
	}
	return nil
}

func (d *delayed) CertMagicStorage() (certmagic.Storage, error) {
	s := &delayedStorage{Storage: forgetful{}, delay: time.Duration(d.Delay)}
	if d.Folder != "" {
		s.Storage, s.hold = folder{&certmagic.FileStorage{Path: d.Folder}}, holdFile(d.Folder)
	}
	return s, nil
}

// holdFile returns the name of the file that holds back all writes to a folder while it exists.
func holdFile(folder string) string { return filepath.Clean(folder) + ".hold" }

// delayedStorage delays the operations of another storage.
type delayedStorage struct {
	certmagic.Storage

	delay time.Duration
	hold  string // name of a file; empty without a folder
}

// wait waits for the delay to pass, or for ctx to end.
func wait(ctx context.Context, delay time.Duration) error {
	if delay <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func isThere(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// waitForHold waits while the file exists that holds back writes.
func (s *delayedStorage) waitForHold(ctx context.Context) error {
	for s.hold != "" && isThere(s.hold) {
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func (s *delayedStorage) Store(ctx context.Context, key string, value []byte) error {
	if err := errors.Join(s.waitForHold(ctx), wait(ctx, s.delay)); err != nil {
		return err
	}
	return s.Storage.Store(ctx, key, value)
}

func (s *delayedStorage) Load(ctx context.Context, key string) ([]byte, error) {
	if err := wait(ctx, s.delay); err != nil {
		return nil, err
	}
	return s.Storage.Load(ctx, key)
}

func (s *delayedStorage) Delete(ctx context.Context, key string) error {
	if err := wait(ctx, s.delay); err != nil {
		return err
	}
	return s.Storage.Delete(ctx, key)
}

func (s *delayedStorage) Exists(ctx context.Context, key string) bool {
	return wait(ctx, s.delay) == nil && s.Storage.Exists(ctx, key)
}

func (s *delayedStorage) List(ctx context.Context, prefix string, recursive bool) ([]string, error) {
	if err := wait(ctx, s.delay); err != nil {
		return nil, err
	}
	return s.Storage.List(ctx, prefix, recursive)
}

func (s *delayedStorage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	if err := wait(ctx, s.delay); err != nil {
		return certmagic.KeyInfo{}, err
	}
	return s.Storage.Stat(ctx, key)
}

func (s *delayedStorage) Lock(ctx context.Context, name string) error {
	if err := wait(ctx, s.delay); err != nil {
		return err
	}
	return s.Storage.Lock(ctx, name)
}

func (s *delayedStorage) Unlock(ctx context.Context, name string) error {
	if err := wait(ctx, s.delay); err != nil {
		return err
	}
	return s.Storage.Unlock(ctx, name)
}

// folder keeps values in files. Unlike FileStorage, it does not wait for the disk: the delay takes its place.
type folder struct{ *certmagic.FileStorage }

func (f folder) Store(_ context.Context, key string, value []byte) error {
	name := f.Filename(key)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(name), "")
	if err != nil {
		return err
	}
	_, err = file.Write(value)
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), name)
}

// forgetful keeps nothing, so that the memory of the process is the server's own.
type forgetful struct{}

func (forgetful) Store(context.Context, string, []byte) error  { return nil }
func (forgetful) Load(context.Context, string) ([]byte, error) { return nil, fs.ErrNotExist }
func (forgetful) Delete(context.Context, string) error         { return nil }
func (forgetful) Exists(context.Context, string) bool          { return false }
func (forgetful) Lock(context.Context, string) error           { return nil }
func (forgetful) Unlock(context.Context, string) error         { return nil }
func (forgetful) List(context.Context, string, bool) ([]string, error) {
	return nil, fs.ErrNotExist
}

func (forgetful) Stat(context.Context, string) (certmagic.KeyInfo, error) {
	return certmagic.KeyInfo{}, fs.ErrNotExist
}

// Interface guards
var (
	_ caddy.StorageConverter = (*delayed)(nil)
	_ caddyfile.Unmarshaler  = (*delayed)(nil)
	_ certmagic.Storage      = (*delayedStorage)(nil)
)
