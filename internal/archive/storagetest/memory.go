package storagetest

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
)

// Memory is a storage in memory that behaves like a kind of storage. Storage and Faulty give access to it as a
// certmagic.Storage. The methods of Memory itself are for the test: they have no faults and no peculiarities.
type Memory struct {
	kind Kind

	mu    sync.Mutex
	root  node
	locks map[string]lock
}

// lock is a lock that is held.
type lock struct {
	owner any
	until time.Time // when it ends by itself; zero means never
}

// New returns an empty storage.
func New(kind Kind) *Memory {
	m := &Memory{kind: kind, locks: make(map[string]lock)}
	if kind == Prefixed {
		m.root.path = ownPrefix
	}
	return m
}

// Kind returns the kind.
func (m *Memory) Kind() Kind { return m.kind }

// Storage returns the storage without faults.
func (m *Memory) Storage() certmagic.Storage { return NewFaulty(m).Storage() }

// Get returns the value under a name, or nil if there is none.
func (m *Memory) Get(name string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := m.root.find(name); n != nil {
		return n.value
	}
	return nil
}

// Put stores a value of any size. The value must not change afterwards.
func (m *Memory) Put(name string, value []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.root.make(name)
	n.value, n.hidden, n.ghost, n.modified = value, false, false, time.Now()
}

// Remove deletes one value.
func (m *Memory) Remove(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.root.remove(name, false)
}

// Names returns the names of all values that begin with a prefix, in order.
func (m *Memory) Names(prefix string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	m.root.walk(prefix, func(n *node) {
		if n.value != nil {
			names = append(names, n.path[len(m.root.path)+1:])
		}
	})
	return names
}

// Holder returns the *Faulty that holds a lock, or nil if the lock is free.
func (m *Memory) Holder(name string) any {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l, ok := m.locks[name]; ok && !l.ended() {
		return l.owner
	}
	return nil
}

func (l lock) ended() bool { return !l.until.IsZero() && !time.Now().Before(l.until) }

// tryLock takes a lock if it is free.
func (m *Memory) tryLock(name string, owner any) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kind == S3Delimiter {
		return true
	}
	if l, ok := m.locks[name]; ok && !l.ended() {
		return false
	}
	l := lock{owner: owner}
	if ttl := m.kind.lockTTL(); ttl > 0 {
		l.until = time.Now().Add(ttl)
	}
	m.locks[name] = l
	return true
}

// lock waits for a lock, as modules do: by asking again and again. Some do not wait.
func (m *Memory) lock(ctx context.Context, name string, owner any) error {
	for !m.tryLock(name, owner) {
		if m.kind == SQL {
			return errors.New("the lock is held")
		}
		select {
		case <-time.After(defaultPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (m *Memory) unlock(name string, owner any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kind == S3Delimiter {
		return nil
	}
	if l, ok := m.locks[name]; !ok || l.owner != owner {
		return errors.New("the lock is not held")
	}
	delete(m.locks, name)
	return nil
}

// leak makes a lock whose holder does not know that it has it end after a while.
func (m *Memory) leak(name string, owner any, after time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l, ok := m.locks[name]; ok && l.owner == owner && l.until.IsZero() {
		l.until = time.Now().Add(after)
		m.locks[name] = l
	}
}

// release ends all locks of an owner that has crashed.
func (m *Memory) release(owner any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.locks, func(_ string, l lock) bool { return l.owner == owner })
}

// node is a folder, a value, or both.
type node struct {
	path     string // the name, with a slash before it, and before that the prefix of the kind
	children map[string]*node
	order    []*node // the children, in order; nil if it is not known
	value    []byte  // nil if there is none
	modified time.Time
	hidden   bool // there is a value, but no list shows it
	ghost    bool // lists show it, but there is no value
}

// find returns the node of a name, or nil.
func (n *node) find(name string) *node {
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if part == "" {
			continue
		}
		if n = n.children[part]; n == nil {
			return nil
		}
	}
	return n
}

// make returns the node of a name, which it creates if there is none.
func (n *node) make(name string) *node {
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		next := n.children[part]
		if next == nil {
			if n.children == nil {
				n.children = make(map[string]*node)
			}
			next = new(node)
			next.path = n.path + "/" + part
			n.children[part], n.order = next, nil
		}
		n = next
	}
	return n
}

// remove removes a value, and all below it if asked to.
func (n *node) remove(name string, below bool) {
	parent := n.find(folder(name))
	if parent == nil {
		return
	}
	base := name[strings.LastIndexByte(name, '/')+1:]
	child := parent.children[base]
	if child == nil {
		return
	}
	if below || len(child.children) == 0 {
		delete(parent.children, base)
		parent.order = nil
		return
	}
	child.value, child.ghost, child.hidden = nil, false, false
}

// prune removes the folders of a name that are empty.
func (n *node) prune(name string) {
	for dir := folder(name); dir != ""; dir = folder(dir) {
		if f := n.find(dir); f == nil || len(f.children) > 0 || f.value != nil {
			return
		}
		n.remove(dir, false)
	}
}

func folder(name string) string {
	return name[:max(0, strings.LastIndexByte(name, '/'))]
}

func (n *node) sorted() []*node {
	if n.order == nil && len(n.children) > 0 {
		n.order = slices.SortedFunc(maps.Values(n.children), func(p, q *node) int { return strings.Compare(p.path, q.path) })
	}
	return n.order
}

// listed reports whether lists show the value of the node.
func (n *node) listed() bool { return n.value != nil && !n.hidden || n.ghost }

// paths returns the paths in a folder, as a storage with folders lists them. n may be nil.
func (n *node) paths(recursive, folders bool) []string {
	if n == nil {
		return nil
	}
	var paths []string
	for _, child := range n.sorted() {
		folder := child.children != nil || !child.listed() && !child.hidden
		if child.listed() || folder && (!recursive || folders) {
			paths = append(paths, child.path)
		}
		if recursive {
			paths = append(paths, child.paths(true, folders)...)
		}
	}
	return paths
}

// walk calls f for each node whose name begins with a prefix, in order.
func (n *node) walk(prefix string, f func(*node)) {
	dir := n.find(folder(prefix))
	if dir == nil {
		return
	}
	begin := dir.path + "/" + prefix[strings.LastIndexByte(prefix, '/')+1:]
	for _, child := range dir.sorted() {
		if strings.HasPrefix(child.path, begin) {
			child.each(f)
		}
	}
}

// each calls f for the node and all below it, in order.
func (n *node) each(f func(*node)) {
	f(n)
	for _, child := range n.sorted() {
		child.each(f)
	}
}

// withPrefix returns the paths of all values whose names begin with a prefix.
func (n *node) withPrefix(prefix string) []string {
	var paths []string
	n.walk(prefix, func(n *node) {
		if n.listed() {
			paths = append(paths, n.path)
		}
	})
	return paths
}

// upToSlash returns the paths of all values whose names begin with a prefix, each up to the next slash.
func (n *node) upToSlash(prefix string) []string {
	paths := n.withPrefix(prefix)
	begin := len(n.path + "/" + prefix)
	for i, path := range paths {
		if end := strings.IndexByte(path[begin:], '/'); end >= 0 {
			paths[i] = path[:begin+end+1]
		}
	}
	return slices.Compact(paths)
}
