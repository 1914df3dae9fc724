package storagetest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
)

// Op is an operation of a storage.
type Op uint8

// The operations.
const (
	Store Op = iota
	Load
	Delete
	Exists
	List
	Stat
	Lock
	TryLock
	Unlock
	ops
)

// String returns the name of the method.
func (o Op) String() string {
	return [...]string{"Store", "Load", "Delete", "Exists", "List", "Stat", "Lock", "TryLock", "Unlock"}[o]
}

// Call is a call of a storage.
type Call struct {
	Op    Op
	Name  string // of the value or the lock, or the prefix that is listed
	Size  int    // of the value that is stored
	Begun time.Time
	ID    uint64 // the number of the call, in the order in which they begin
}

// Effect is how much of an operation is done.
type Effect uint8

const (
	// Whole is all of it.
	Whole Effect = iota

	// None is nothing.
	None

	// Half is what a kind of storage does if it breaks off. Most do nothing then.
	Half
)

// Fault is what happens to a call. The zero value is that all goes well at once.
type Fault struct {
	Before time.Duration // passes before the effect
	After  time.Duration // passes between the effect and the return
	Effect Effect
	Err    error // is returned, even if the effect was whole

	// Hang is that the call does not return until its context ends or it is released.
	Hang bool

	// Deaf is that the call does not return when its context ends.
	Deaf bool

	// Linger is how long the call takes to return when its context has ended.
	Linger time.Duration

	// Late is that the effect comes although the context has ended before.
	Late bool
}

// ErrInjected is what a storage returns that is made to fail.
var ErrInjected = errors.New("injected failure")

// errDead is what a storage returns whose instance has crashed.
var errDead = errors.New("the instance has crashed")

// leakedLock is how long a lock is held that its holder does not know of.
const leakedLock = 2 * time.Minute

// Faulty is a storage with faults, as one instance sees it. Several may share a Memory.
type Faulty struct {
	memory *Memory

	mu      sync.Mutex
	decide  func(Call) Fault
	observe func(Event)
	calls   [ops]int
	pending [ops]int
	id      uint64

	release chan struct{} // closed when what hangs is to go on
	dead    chan struct{} // closed when the instance crashes
	crashed func(Call) Effect
}

// Phase is a phase of a call.
type Phase uint8

// The phases.
const (
	Began Phase = iota
	TookEffect
	Ended
)

// Event is what an observer is told of a call. The mutex of the Memory is held when an effect is told, so the order of
// effects is that of the events.
type Event struct {
	Phase Phase
	Call  Call
	Fault Fault
	Err   error         // if it has ended
	Value []byte        // that was stored, or that has been loaded
	Old   []byte        // what was stored before, or nil
	Took  time.Duration // if it has ended
}

// NewFaulty returns a storage without faults.
func NewFaulty(m *Memory) *Faulty {
	return &Faulty{
		memory: m,
		decide: func(Call) Fault { return Fault{} }, observe: func(Event) {},
		release: make(chan struct{}), dead: make(chan struct{}),
	}
}

// Storage returns the storage as a certmagic.Storage, with TryLock if the kind has it.
func (f *Faulty) Storage() certmagic.Storage {
	if f.memory.kind.hasTryLock() {
		return tryStorage{storage{f}}
	}
	return storage{f}
}

// Set decides what happens to calls from now on.
func (f *Faulty) Set(decide func(Call) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decide = decide
}

// Mend ends all faults. What hangs goes on.
func (f *Faulty) Mend() {
	f.Set(func(Call) Fault { return Fault{} })
	f.Release()
}

// Release lets all calls go on that hang.
func (f *Faulty) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.release)
	f.release = make(chan struct{})
}

// Observe lets observe be told of all calls from now on. It must not use the Memory.
func (f *Faulty) Observe(observe func(Event)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.observe = observe
}

// Calls returns the number of calls of an operation so far.
func (f *Faulty) Calls(o Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[o]
}

// Pending returns the number of calls of an operation that are under way.
func (f *Faulty) Pending(o Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pending[o]
}

// Crash ends the instance: its calls under way take effect or not, as effect decides, and return an error, as all later
// calls do. Its locks are free.
func (f *Faulty) Crash(effect func(Call) Effect) {
	f.mu.Lock()
	f.crashed = effect
	close(f.dead)
	f.mu.Unlock()
	f.memory.release(f)
}

// Delayed returns a decision that delays calls.
func Delayed(d time.Duration) func(Call) Fault {
	return func(Call) Fault { return Fault{Before: d} }
}

// Failing returns a decision that lets calls fail.
func Failing(err error) func(Call) Fault {
	return func(Call) Fault { return Fault{Effect: None, Err: err} }
}

// Hanging returns a decision that lets calls hang until they are released, or until their context ends unless they are deaf.
func Hanging(deaf bool) func(Call) Fault {
	return func(Call) Fault { return Fault{Hang: true, Deaf: deaf} }
}

// On restricts a decision to some operations.
func On(decide func(Call) Fault, affected ...Op) func(Call) Fault {
	return func(c Call) Fault {
		if slices.Contains(affected, c.Op) {
			return decide(c)
		}
		return Fault{}
	}
}

// do does a call. The effect is called with the mutex of the memory held, unless it is that of a lock.
func (f *Faulty) do(ctx context.Context, c Call, effect func(Call, Effect) error) error {
	c.Begun = time.Now()
	f.mu.Lock()
	c.ID = f.id
	f.id++
	f.calls[c.Op]++
	f.pending[c.Op]++
	release, observe, fault := f.release, f.observe, Fault{}
	if !f.isDead() {
		fault = f.decide(c)
	}
	f.mu.Unlock()
	observe(Event{Phase: Began, Call: c, Fault: fault})
	err := f.run(ctx, c, fault, release, effect)
	f.mu.Lock()
	f.pending[c.Op]--
	f.mu.Unlock()
	observe(Event{Phase: Ended, Call: c, Fault: fault, Err: err, Took: time.Since(c.Begun)})
	return err
}

func (f *Faulty) run(ctx context.Context, c Call, fault Fault, release <-chan struct{}, effect func(Call, Effect) error) error {
	if f.isDead() {
		return errDead
	}
	if err := f.wait(ctx, fault.Before, fault, release); err != nil {
		switch {
		case errors.Is(err, errDead):
			if f.crashed(c) == Whole && c.Op != Lock && c.Op != TryLock {
				_ = effect(c, Whole)
			}
		case fault.Late:
			_ = effect(c, fault.Effect)
		}
		return err
	}
	err := effect(c, fault.Effect)
	if errors.Is(err, errDead) {
		return err
	}
	if waited := f.wait(ctx, fault.After, Fault{Deaf: fault.Deaf, Linger: fault.Linger}, nil); waited != nil && err == nil {
		err = waited
	}
	if fault.Err == nil && fault.Effect != Whole {
		fault.Err = ErrInjected
	}
	if fault.Err != nil {
		return fmt.Errorf("%s %s: %w", c.Op, c.Name, fault.Err)
	}
	return err
}

func (f *Faulty) isDead() bool {
	select {
	case <-f.dead:
		return true
	default:
		return false
	}
}

// wait waits for a time, or until a call that hangs is released. It returns an error if the context ends before.
func (f *Faulty) wait(ctx context.Context, d time.Duration, fault Fault, release <-chan struct{}) error {
	if d <= 0 && !fault.Hang {
		return nil
	}
	done := ctx.Done()
	if fault.Deaf {
		done = nil
	}
	var elapsed <-chan time.Time
	if !fault.Hang {
		timer := time.NewTimer(d)
		defer timer.Stop()
		elapsed = timer.C
	}
	select {
	case <-elapsed:
		return nil
	case <-release:
		return nil
	case <-f.dead:
		return errDead
	case <-done:
	}
	if fault.Linger > 0 {
		select {
		case <-time.After(fault.Linger):
		case <-f.dead:
			return errDead
		}
	}
	return ctx.Err()
}

// storage is a Faulty as a certmagic.Storage.
type storage struct{ f *Faulty }

// tryStorage is a storage that has TryLock.
type tryStorage struct{ storage }

var (
	_ certmagic.Storage   = storage{}
	_ certmagic.TryLocker = tryStorage{}
)

// change does a call that changes a value, and tells the observer of its effect.
func (s storage) change(ctx context.Context, c Call, value []byte, whole func() error, half func()) error {
	m := s.f.memory
	return s.f.do(ctx, c, func(c Call, e Effect) error {
		if e == None {
			return nil
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		event := Event{Phase: TookEffect, Call: c, Value: value}
		if n := m.root.find(c.Name); n != nil {
			event.Old = n.value
		}
		if e == Half {
			half()
			return nil
		}
		err := whole()
		if err == nil {
			s.f.observe(event)
		}
		return err
	})
}

func (s storage) Store(ctx context.Context, name string, value []byte) error {
	m := s.f.memory
	return s.change(ctx, Call{Op: Store, Name: name, Size: len(value)}, value, func() error {
		return m.store(name, value)
	}, func() {
		if m.kind == Redis {
			n := m.root.make(name)
			n.ghost = n.value == nil
		}
	})
}

func (s storage) Delete(ctx context.Context, name string) error {
	m := s.f.memory
	return s.change(ctx, Call{Op: Delete, Name: name}, nil, func() error {
		return m.delete(name)
	}, func() {
		if n := m.root.find(name); m.kind == Redis && n != nil {
			n.hidden, n.ghost = n.value != nil, false
		}
	})
}

// look does a call that changes nothing.
func (s storage) look(ctx context.Context, c Call, f func() error) error {
	m := s.f.memory
	return s.f.do(ctx, c, func(_ Call, e Effect) error {
		if e != Whole {
			return nil
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		return f()
	})
}

func (s storage) Load(ctx context.Context, name string) (value []byte, err error) {
	err = s.look(ctx, Call{Op: Load, Name: name}, func() error {
		n := s.f.memory.root.find(name)
		if n == nil || n.value == nil {
			return notExist("load", name)
		}
		value = append([]byte{}, n.value...)
		return nil
	})
	if err != nil && s.f.memory.kind.Lies() {
		return nil, notExist("load", name)
	}
	if err != nil {
		return nil, err
	}
	return value, nil
}

func (s storage) Exists(ctx context.Context, name string) (exists bool) {
	err := s.look(ctx, Call{Op: Exists, Name: name}, func() error {
		n := s.f.memory.root.find(name)
		exists = n != nil && (n.value != nil || s.f.memory.kind == FileSystem)
		return nil
	})
	return exists && err == nil
}

func (s storage) List(ctx context.Context, prefix string, recursive bool) (names []string, err error) {
	err = s.look(ctx, Call{Op: List, Name: prefix}, func() (err error) {
		names, err = s.f.memory.list(prefix, recursive)
		return err
	})
	if err != nil && s.f.memory.kind.Lies() {
		return []string{""}, nil
	}
	if err != nil {
		return nil, err
	}
	return names, nil
}

func (s storage) Stat(ctx context.Context, name string) (info certmagic.KeyInfo, err error) {
	kind := s.f.memory.kind
	err = s.look(ctx, Call{Op: Stat, Name: name}, func() error {
		n := s.f.memory.root.find(name)
		if n == nil || n.value == nil && kind != FileSystem {
			return notExist("stat", name)
		}
		info = certmagic.KeyInfo{Key: name, Modified: n.modified, Size: int64(len(n.value)), IsTerminal: n.value != nil}
		return nil
	})
	switch kind {
	case S3, Consul:
		info = certmagic.KeyInfo{Key: name, IsTerminal: true}
	case S3Delimiter:
		info.IsTerminal = false
		if errors.Is(err, fs.ErrNotExist) {
			return certmagic.KeyInfo{}, nil
		}
	}
	return info, err
}

func (s storage) Lock(ctx context.Context, name string) error {
	return s.lock(ctx, Call{Op: Lock, Name: name}, func() error {
		return s.f.memory.lock(ctx, name, s.f)
	})
}

func (s tryStorage) TryLock(ctx context.Context, name string) (locked bool, err error) {
	err = s.lock(ctx, Call{Op: TryLock, Name: name}, func() error {
		locked = s.f.memory.tryLock(name, s.f)
		return nil
	})
	return locked && err == nil, err
}

// lock does a call that takes a lock. If it fails although the lock was taken, the lock ends by itself after a while.
func (s storage) lock(ctx context.Context, c Call, take func() error) error {
	err := s.f.do(ctx, c, func(_ Call, e Effect) error {
		if e != Whole {
			return nil
		}
		err := take()
		if s.f.isDead() {
			s.f.memory.release(s.f)
			return errDead
		}
		return err
	})
	if err != nil {
		s.f.memory.leak(c.Name, s.f, leakedLock)
	}
	return err
}

func (s storage) Unlock(ctx context.Context, name string) error {
	err := s.f.do(ctx, Call{Op: Unlock, Name: name}, func(_ Call, e Effect) error {
		if e != Whole {
			return nil
		}
		return s.f.memory.unlock(name, s.f)
	})
	if err != nil {
		s.f.memory.leak(name, s.f, leakedLock)
	}
	return err
}
