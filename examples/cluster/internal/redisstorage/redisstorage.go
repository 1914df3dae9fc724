// Package redisstorage is a Caddy storage in a Redis database. It exists so that the example's tests need no module of
// others, and has only what they use. Use github.com/pberkel/caddy-storage-redis to run Caddy.
package redisstorage

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/redis/go-redis/v9"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(new(Storage))
}

const (
	// batch is how many keys are listed or deleted at once.
	batch = 1000

	// lockTTL is how long a lock outlives the process that holds it.
	lockTTL = 5 * time.Second

	// lockPause is the time between two attempts to take a lock.
	lockPause = 100 * time.Millisecond
)

// Storage keeps values in a Redis database. A value is a hash with the fields "value" and "modified". All keys are the
// members of one sorted set, from which Redis can select those that begin with a prefix.
type Storage struct {
	// Address is the host and port of the server. It may have placeholders.
	Address string `json:"address,omitempty"`

	// Password is the password of the server. It may have placeholders.
	Password string `json:"password,omitempty"`

	// KeyPrefix begins the names of all keys in the database.
	KeyPrefix string `json:"key_prefix,omitempty"`

	client *redis.Client

	mu    sync.Mutex
	locks map[string]lock // by name
}

// lock is a lock that is held.
type lock struct {
	token string // the value of the key in Redis
	stop  func() // ends its renewal
}

// CaddyModule returns the Caddy module information.
func (*Storage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.storage.redis", New: func() caddy.Module { return new(Storage) }}
}

// UnmarshalCaddyfile parses the options. They have the names that github.com/pberkel/caddy-storage-redis gives them.
//
//	storage redis {
//		address    <host:port>
//		password   <password>
//		key_prefix <prefix>
//	}
func (s *Storage) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	for d.NextBlock(0) {
		option := map[string]*string{"address": &s.Address, "password": &s.Password, "key_prefix": &s.KeyPrefix}[d.Val()]
		if option == nil {
			return d.Errf("unknown option %q", d.Val())
		}
		if !d.AllArgs(option) {
			return d.ArgErr()
		}
	}
	return nil
}

// Provision makes the client, which connects when it is first used.
func (s *Storage) Provision(caddy.Context) error {
	repl := caddy.NewReplacer()
	s.client = redis.NewClient(&redis.Options{
		Addr:                  repl.ReplaceAll(s.Address, ""),
		Password:              repl.ReplaceAll(s.Password, ""),
		ContextTimeoutEnabled: true,
		// By default, the client connects up to 20 times, for 1.7 s, to a server that refuses. Whoever uses the storage waits.
		DialerRetries: 1,
		MaxRetries:    1,
	})
	s.locks = make(map[string]lock)
	return nil
}

// Cleanup closes the connections. The locks that are still held expire.
func (s *Storage) Cleanup() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, held := range s.locks {
		held.stop()
	}
	return s.client.Close()
}

// CertMagicStorage returns s.
func (s *Storage) CertMagicStorage() (certmagic.Storage, error) { return s, nil }

// The names of keys in Redis.
func (s *Storage) valueKey(key string) string { return s.KeyPrefix + "/" + key }
func (s *Storage) lockKey(name string) string { return s.KeyPrefix + ":lock:" + name }
func (s *Storage) indexKey() string           { return s.KeyPrefix + ":index" }

// Store stores a value. The value and its entry in the index are stored together or not at all.
func (s *Storage) Store(ctx context.Context, key string, value []byte) error {
	keys := []string{s.valueKey(key), s.indexKey()}
	return storeValue.Run(ctx, s.client, keys, key, value, time.Now().UnixNano()).Err()
}

// storeValue is a script because a transaction would not say why it fails.
var storeValue = redis.NewScript(
	`redis.call("HSET", KEYS[1], "value", ARGV[2], "modified", ARGV[3]) return redis.call("ZADD", KEYS[2], 0, ARGV[1])`)

// Load returns the value of a key.
func (s *Storage) Load(ctx context.Context, key string) ([]byte, error) {
	value, err := s.client.HGet(ctx, s.valueKey(key), "value").Bytes()
	if errors.Is(err, redis.Nil) {
		return nil, fs.ErrNotExist
	}
	return value, err
}

// Delete deletes a key and all keys below it.
func (s *Storage) Delete(ctx context.Context, key string) error {
	if err := s.remove(ctx, []string{key}); err != nil {
		return err
	}
	for {
		keys, err := s.below(ctx, key, "")
		if err != nil || len(keys) == 0 {
			return err
		}
		if err := s.remove(ctx, keys); err != nil {
			return err
		}
	}
}

// remove deletes keys together with their entries in the index.
func (s *Storage) remove(ctx context.Context, keys []string) error {
	values, members := make([]string, len(keys)), make([]any, len(keys))
	for i, key := range keys {
		values[i], members[i] = s.valueKey(key), key
	}
	_, err := s.client.TxPipelined(ctx, func(p redis.Pipeliner) error {
		p.Unlink(ctx, values...)
		p.ZRem(ctx, s.indexKey(), members...)
		return nil
	})
	return err
}

// below returns the first keys below a folder, in their order, beginning after a key unless that is empty.
func (s *Storage) below(ctx context.Context, folder, after string) ([]string, error) {
	selected := redis.ZRangeArgs{Key: s.indexKey(), ByLex: true, Start: "-", Stop: "+", Count: batch}
	if folder != "" {
		selected.Start, selected.Stop = "["+folder+"/", "("+folder+"0" // '0' comes after '/'
	}
	if after != "" {
		selected.Start = "(" + after
	}
	return s.client.ZRangeArgs(ctx, selected).Result()
}

// Exists reports whether there is a key, or a key below it.
func (s *Storage) Exists(ctx context.Context, key string) bool {
	_, err := s.Stat(ctx, key)
	return err == nil
}

// List returns the keys below a folder, or if it is not recursive, the keys and folders in it.
func (s *Storage) List(ctx context.Context, folder string, recursive bool) (list []string, err error) {
	folder = strings.Trim(folder, "/")
	prefix := folder + "/"
	if folder == "" {
		prefix = ""
	}
	for after := ""; ; {
		keys, err := s.below(ctx, folder, after)
		if err != nil || len(keys) == 0 {
			slices.Sort(list)
			return slices.Compact(list), err
		}
		after = keys[len(keys)-1]
		for _, key := range keys {
			if !recursive {
				name, _, _ := strings.Cut(strings.TrimPrefix(key, prefix), "/")
				key = prefix + name
			}
			list = append(list, key)
		}
	}
}

// Stat returns the size of a value and when it was stored. A folder has neither.
func (s *Storage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	var modified *redis.StringCmd
	var size *redis.IntCmd
	_, err := s.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		modified = p.HGet(ctx, s.valueKey(key), "modified")
		size = p.HStrLen(ctx, s.valueKey(key), "value")
		return nil
	})
	if errors.Is(err, redis.Nil) {
		return s.statFolder(ctx, key)
	}
	if err != nil {
		return certmagic.KeyInfo{}, err
	}
	nanoseconds, err := strconv.ParseInt(modified.Val(), 10, 64)
	return certmagic.KeyInfo{Key: key, Modified: time.Unix(0, nanoseconds), Size: size.Val(), IsTerminal: true}, err
}

func (s *Storage) statFolder(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	keys, err := s.below(ctx, key, "")
	if err == nil && len(keys) == 0 {
		err = fs.ErrNotExist
	}
	return certmagic.KeyInfo{Key: key}, err
}

// Lock takes a lock. It waits until the lock is free or ctx has ended.
func (s *Storage) Lock(ctx context.Context, name string) error {
	for {
		if locked, err := s.TryLock(ctx, name); locked || err != nil {
			return err
		}
		select {
		case <-time.After(lockPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// TryLock takes a lock if it is free, and renews it until it is unlocked.
func (s *Storage) TryLock(ctx context.Context, name string) (bool, error) {
	token := rand.Text()
	err := s.client.SetArgs(ctx, s.lockKey(name), token, redis.SetArgs{Mode: "NX", TTL: lockTTL}).Err()
	if errors.Is(err, redis.Nil) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	renewal, stop := context.WithCancel(context.Background())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.locks[name] = lock{token, stop}
	go s.renew(renewal, name, token)
	return true, nil
}

// renew keeps a lock from expiring until ctx ends or the lock is lost.
func (s *Storage) renew(ctx context.Context, name, token string) {
	ticker := time.NewTicker(lockTTL / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		held, err := renewLock.Run(ctx, s.client, []string{s.lockKey(name)}, token, lockTTL.Milliseconds()).Bool()
		if err == nil && !held {
			return
		}
	}
}

// Unlock releases a lock. It fails if the lock has expired.
func (s *Storage) Unlock(ctx context.Context, name string) error {
	s.mu.Lock()
	held, ok := s.locks[name]
	delete(s.locks, name)
	s.mu.Unlock()
	if !ok {
		return fmt.Errorf("the lock %s is not held", name)
	}
	held.stop()
	released, err := releaseLock.Run(ctx, s.client, []string{s.lockKey(name)}, held.token).Bool()
	if err == nil && !released {
		err = fmt.Errorf("the lock %s has expired", name)
	}
	return err
}

// The scripts change a lock only if it has the holder's token: after it has expired, another process may hold it.
var (
	renewLock = redis.NewScript(
		`if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("PEXPIRE", KEYS[1], ARGV[2]) end return 0`)
	releaseLock = redis.NewScript(
		`if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) end return 0`)
)

// Interface guards
var (
	_ caddy.Provisioner      = (*Storage)(nil)
	_ caddy.CleanerUpper     = (*Storage)(nil)
	_ caddy.StorageConverter = (*Storage)(nil)
	_ caddyfile.Unmarshaler  = (*Storage)(nil)
	_ certmagic.Storage      = (*Storage)(nil)
	_ certmagic.TryLocker    = (*Storage)(nil)
)
