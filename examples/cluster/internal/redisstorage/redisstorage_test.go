package redisstorage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/cluster/internal/redistest"
)

// newStorage returns a storage in a server.
func newStorage(t *testing.T, server *redistest.Server) *Storage {
	t.Helper()
	s := new(Storage)
	options := caddyfile.NewTestDispenser(fmt.Sprintf("redis {\naddress %s\npassword %s\nkey_prefix test\n}", server.Address, server.Password))
	if err := s.UnmarshalCaddyfile(options); err != nil {
		t.Fatal(err)
	}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Cleanup() })
	return s
}

func TestWrongOptions(t *testing.T) {
	for _, options := range []string{"host localhost", "address", "address a b"} {
		if err := new(Storage).UnmarshalCaddyfile(caddyfile.NewTestDispenser("redis {\n" + options + "\n}")); err == nil {
			t.Errorf("%q is accepted", options)
		}
	}
}

func TestValues(t *testing.T) {
	server := redistest.Start(t)
	one, other := newStorage(t, server), newStorage(t, server)
	ctx := t.Context()

	if _, err := one.Load(ctx, "a/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("loading what is absent: %v", err)
	}
	if _, err := one.Stat(ctx, "a/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the time of what is absent: %v", err)
	}
	if err := one.Delete(ctx, "a/b"); err != nil {
		t.Errorf("deleting what is absent: %v", err)
	}
	value := bytes.Repeat([]byte{0, '\r', '\n', 0xff}, 1<<18)
	begin := time.Now()
	for _, value := range [][]byte{[]byte("old"), value} {
		if err := one.Store(ctx, "a/b", value); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := other.Load(ctx, "a/b"); err != nil || !bytes.Equal(got, value) {
		t.Errorf("the other loads %d bytes, %v", len(got), err)
	}
	info, err := other.Stat(ctx, "a/b")
	if err != nil || info.Key != "a/b" || info.Size != int64(len(value)) || !info.IsTerminal ||
		info.Modified.Before(begin) || info.Modified.After(time.Now()) {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err := other.Stat(ctx, "a"); err != nil || info.IsTerminal {
		t.Errorf("a folder: %+v, %v", info, err)
	}
	for key, want := range map[string]bool{"a/b": true, "a": true, "b": false, "a/": false, "a/b/c": false} {
		if got := other.Exists(ctx, key); got != want {
			t.Errorf("%s exists: %t", key, got)
		}
	}
}

func TestListAndDelete(t *testing.T) {
	s := newStorage(t, redistest.Start(t))
	ctx := t.Context()
	var many []string
	for i := range 2*batch + 1 {
		many = append(many, fmt.Sprintf("many/%04d", i))
	}
	for _, key := range slices.Concat(many, []string{"a", "a/1", "a/1/x", "a/1-", "a/10", "a/2/x/y", "a0", "b/1"}) {
		if err := s.Store(ctx, key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	list := func(folder string, recursive bool, want ...string) {
		t.Helper()
		if got, err := s.List(ctx, folder, recursive); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v, want %v", folder, got, err, want)
		}
	}
	list("", false, "a", "a0", "b", "many")
	list("many", true, many...)
	list("many/", false, many...)
	list("a", false, "a/1", "a/1-", "a/10", "a/2")
	list("a", true, "a/1", "a/1-", "a/1/x", "a/10", "a/2/x/y")
	list("c", true)

	for _, key := range []string{"many", "a/1", "b/1"} {
		if err := s.Delete(ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	list("", true, "a", "a/1-", "a/10", "a/2/x/y", "a0")
	for _, key := range []string{"a/1/x", "many/0000"} {
		if _, err := s.Load(ctx, key); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s after it was deleted: %v", key, err)
		}
	}
}

// A full database refuses new values, and serves the old ones.
func TestFull(t *testing.T) {
	server := redistest.Start(t)
	s := newStorage(t, server)
	ctx := t.Context()
	if err := s.Store(ctx, "a/old", []byte("old")); err != nil {
		t.Fatal(err)
	}
	server.Set("maxmemory", "1")
	for _, key := range []string{"a/old", "a/new"} {
		if err := s.Store(ctx, key, []byte("new")); err == nil || !strings.Contains(err.Error(), "OOM") {
			t.Errorf("the error is %v", err)
		}
	}
	if list, err := s.List(ctx, "a", true); err != nil || !slices.Equal(list, []string{"a/old"}) {
		t.Errorf("%v, %v", list, err)
	}
	if value, err := s.Load(ctx, "a/old"); err != nil || string(value) != "old" {
		t.Errorf("%s, %v", value, err)
	}
	server.Set("maxmemory", "0")
	if err := s.Store(ctx, "a/new", []byte("new")); err != nil {
		t.Error(err)
	}
}

func TestLocks(t *testing.T) {
	server := redistest.Start(t)
	one, other := newStorage(t, server), newStorage(t, server)
	ctx := t.Context()
	if err := one.Lock(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Storage{one, other} {
		if locked, err := s.TryLock(ctx, "x"); locked || err != nil {
			t.Errorf("a lock is held twice: %t, %v", locked, err)
		}
	}
	short, cancel := context.WithTimeout(ctx, 3*lockPause)
	defer cancel()
	if err := other.Lock(short, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a lock: %v", err)
	}
	if err := other.Unlock(ctx, "x"); err == nil {
		t.Error("one unlocks what the other holds")
	}
	time.Sleep(lockTTL + time.Second)
	if locked, _ := other.TryLock(ctx, "x"); locked {
		t.Error("a lock that is held expires")
	}
	done := make(chan error)
	go func() { done <- other.Lock(ctx, "x") }()
	if err := one.Unlock(ctx, "x"); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("after it is unlocked: %v", err)
	}

	// The holder ends without unlocking it.
	_ = other.Cleanup()
	if locked, err := one.TryLock(ctx, "x"); locked || err != nil {
		t.Errorf("%t, %v", locked, err)
	}
	if err := one.Lock(ctx, "x"); err != nil {
		t.Errorf("after it has expired: %v", err)
	}

	// Another process has taken it after it expired.
	if err := server.Client.Set(ctx, one.lockKey("x"), "another token", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if err := one.Unlock(ctx, "x"); err == nil {
		t.Error("unlocking what is lost succeeds")
	}
	if n := server.Client.Exists(ctx, one.lockKey("x")).Val(); n != 1 {
		t.Error("another's lock is gone")
	}
}
