// Package storagetest has storages for tests: storages in memory that behave like kinds of real ones, and faults for them.
package storagetest

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

// Kind is a kind of storage. Caddy's storage modules agree on what Store and Load do, and on little else.
type Kind int

const (
	// FileSystem is like Caddy's own storage. Its folders stay when they are empty, are listed beside the files in them, and
	// are deleted with all that is in them. A folder that does not exist cannot be listed.
	FileSystem Kind = iota

	// Redis keeps the names in a folder beside the values. So a write that fails half-way can leave a name without a value,
	// and a deletion that fails half-way can leave a value that no list shows.
	Redis

	// S3 lists all names that begin with a prefix, even if it was not asked to list recursively. It has no TryLock, its
	// locks last 15 seconds whether or not their holder is alive, and Stat does not know a time.
	S3

	// S3Delimiter lists up to the next slash, so a prefix without one yields nothing but the same prefix with one. Its names
	// begin with a slash, its locks do nothing, and Stat succeeds for what does not exist. If it cannot be reached, it says that
	// there is nothing.
	S3Delimiter

	// Prefixed lists all that it has whatever the prefix, and with a prefix of its own before each name.
	Prefixed

	// Consul refuses values of more than 512 KiB. What does not exist can be neither listed nor deleted, and Stat knows
	// neither size nor time.
	Consul

	// SQL cannot list recursively: that is an error. Asked for one folder, it lists all that begins with the prefix. It has no
	// TryLock. Lock does not wait, and its locks last a minute whether or not their holder is alive.
	SQL

	// Flat cannot list recursively either. Asked for one folder, it lists what is in the folder.
	Flat
)

// Kinds are all kinds.
var Kinds = []Kind{FileSystem, Redis, S3, S3Delimiter, Prefixed, Consul, SQL, Flat}

// KindOf returns the kind for the seed of a simulation. Seeds in a row have all kinds. In each row, a seed with the same
// remainder has another kind: what else depends on the seed meets all kinds.
func KindOf(seed uint64) Kind {
	kinds := uint64(len(Kinds))
	return Kinds[(seed+(seed-1)/kinds)%kinds]
}

// String returns the name of the kind.
func (k Kind) String() string {
	return [...]string{"file system", "Redis", "S3", "S3 with a delimiter", "prefixed", "Consul", "SQL", "flat"}[k]
}

const (
	maxConsul   = 512 << 10
	s3LockTTL   = 15 * time.Second
	sqlLockTTL  = time.Minute
	ownPrefix   = "/bucket"
	defaultPoll = time.Second
)

// Exclusive reports whether a lock of the kind is held until it is released.
func (k Kind) Exclusive() bool { return k.lockTTL() == 0 && k != S3Delimiter }

// Lies reports whether Load and List of the kind say that there is nothing if they fail.
func (k Kind) Lies() bool { return k == S3Delimiter }

// MaxSize returns the size of the largest value that the kind takes, in bytes. Zero means that there is no limit.
func (k Kind) MaxSize() int {
	if k == Consul {
		return maxConsul
	}
	return 0
}

func (k Kind) hasTryLock() bool { return k == FileSystem || k == Redis }

// lockTTL returns after how long a lock ends by itself. Zero means never.
func (k Kind) lockTTL() time.Duration {
	switch k {
	case S3:
		return s3LockTTL
	case SQL:
		return sqlLockTTL
	}
	return 0
}

// list lists as the kind does. The caller holds the mutex.
func (m *Memory) list(prefix string, recursive bool) ([]string, error) {
	switch m.kind {
	case FileSystem:
		n := m.root.find(prefix)
		if n == nil {
			return nil, notExist("list", prefix)
		}
		return withoutSlash(n.paths(recursive, true)), nil
	case Redis:
		return withoutSlash(m.root.find(prefix).paths(recursive, false)), nil
	case S3:
		return withoutSlash(m.root.withPrefix(prefix)), nil
	case S3Delimiter:
		if recursive {
			return m.root.withPrefix(prefix), nil
		}
		return m.root.upToSlash(prefix), nil
	case Prefixed:
		paths := m.root.withPrefix("")
		slices.Reverse(paths)
		return paths, nil
	case Consul:
		names := withoutSlash(m.root.withPrefix(prefix))
		if len(names) == 0 {
			return nil, notExist("list", prefix)
		}
		if recursive {
			return names, nil
		}
		for i, name := range names {
			child, _, _ := strings.Cut(strings.TrimPrefix(name, prefix+"/"), "/")
			names[i] = path.Join(prefix, child)
		}
		return slices.Compact(names), nil
	case SQL:
		if recursive {
			return nil, errRecursive
		}
		return withoutSlash(m.root.withPrefix(prefix)), nil
	case Flat:
		if recursive {
			return nil, errRecursive
		}
		return withoutSlash(m.root.find(prefix).paths(false, true)), nil
	}
	panic("unknown kind")
}

var errRecursive = errors.New("recursive listing is not supported")

// withoutSlash removes the slash before each path.
func withoutSlash(paths []string) []string {
	for i, path := range paths {
		paths[i] = path[1:]
	}
	return paths
}

// store stores as the kind does. The caller holds the mutex.
func (m *Memory) store(name string, value []byte) error {
	if limit := m.kind.MaxSize(); limit > 0 && len(value) > limit {
		return fmt.Errorf("a value of %d bytes exceeds the limit of %d", len(value), limit)
	}
	n := m.root.make(name)
	if m.kind == FileSystem && len(n.children) > 0 {
		return fmt.Errorf("%s is a directory", name)
	}
	n.value, n.hidden, n.ghost, n.modified = slices.Clone(value), false, false, time.Now()
	if n.value == nil {
		n.value = []byte{}
	}
	return nil
}

// delete deletes as the kind does. The caller holds the mutex.
func (m *Memory) delete(name string) error {
	n := m.root.find(name)
	missing := n == nil || n.value == nil
	switch {
	case m.kind == FileSystem:
		m.root.remove(name, true)
		return nil
	case missing && (m.kind == Redis || m.kind == Consul):
		m.root.remove(name, false)
		return notExist("delete", name)
	}
	m.root.remove(name, false)
	m.root.prune(name)
	return nil
}

func notExist(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
}
