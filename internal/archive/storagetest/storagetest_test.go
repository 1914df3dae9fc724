package storagetest

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
)

// Each kind lists what it is said to list.
func TestLists(t *testing.T) {
	for _, test := range []struct {
		kind      Kind
		prefix    string
		recursive bool
		want      []string
		missing   bool
		refused   bool
	}{
		{kind: FileSystem, prefix: "a", want: []string{"a/b", "a/bc", "a/empty"}},
		{kind: FileSystem, prefix: "a", recursive: true, want: []string{"a/b", "a/b/1", "a/b/2", "a/bc", "a/bc/3", "a/empty"}},
		{kind: FileSystem, prefix: "x", missing: true},
		{kind: Redis, prefix: "a", want: []string{"a/b", "a/bc"}},
		{kind: Redis, prefix: "a", recursive: true, want: []string{"a/b/1", "a/b/2", "a/bc/3"}},
		{kind: Redis, prefix: "x"},
		{kind: S3, prefix: "a/b", want: []string{"a/b/1", "a/b/2", "a/bc/3"}},
		{kind: S3, prefix: "a/b/", want: []string{"a/b/1", "a/b/2"}},
		{kind: S3, want: []string{"a/b/1", "a/b/2", "a/bc/3"}},
		{kind: S3, prefix: "x"},
		{kind: S3, prefix: "x/"},
		{kind: S3Delimiter, prefix: "a", want: []string{"/a/"}},
		{kind: S3Delimiter, prefix: "a/b", want: []string{"/a/b/", "/a/bc/"}},
		{kind: S3Delimiter, prefix: "a/b/", want: []string{"/a/b/1", "/a/b/2"}},
		{kind: S3Delimiter, prefix: "a/b", recursive: true, want: []string{"/a/b/1", "/a/b/2", "/a/bc/3"}},
		{kind: Prefixed, prefix: "a/bc", want: []string{"/bucket/a/bc/3", "/bucket/a/b/2", "/bucket/a/b/1"}},
		{kind: Consul, prefix: "a", want: []string{"a/b", "a/bc"}},
		{kind: Consul, prefix: "a", recursive: true, want: []string{"a/b/1", "a/b/2", "a/bc/3"}},
		{kind: Consul, prefix: "x", missing: true},
		{kind: SQL, prefix: "a", recursive: true, refused: true},
		{kind: SQL, prefix: "a/b", want: []string{"a/b/1", "a/b/2", "a/bc/3"}},
		{kind: SQL, prefix: "x"},
		{kind: Flat, prefix: "a", recursive: true, refused: true},
		{kind: Flat, prefix: "a", want: []string{"a/b", "a/bc"}},
		{kind: Flat, prefix: "a/b", want: []string{"a/b/1", "a/b/2"}},
		{kind: Flat, prefix: "x"},
	} {
		m := New(test.kind)
		s := m.Storage()
		for _, name := range []string{"a/b/1", "a/b/2", "a/bc/3", "a/empty/4"} {
			if err := s.Store(t.Context(), name, []byte(name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Delete(t.Context(), "a/empty/4"); err != nil {
			t.Fatal(err)
		}
		names, err := s.List(t.Context(), test.prefix, test.recursive)
		if !slices.Equal(names, test.want) || errors.Is(err, fs.ErrNotExist) != test.missing || (err != nil) != (test.missing || test.refused) {
			t.Errorf("%s, %s, recursive %v: %q, error %v", test.kind, test.prefix, test.recursive, names, err)
		}
	}
}

// Seeds in a row have all kinds, and in the next row each has another kind.
func TestKindOf(t *testing.T) {
	kinds := uint64(len(Kinds))
	of := make(map[uint64]map[Kind]bool) // by the remainder of the seed
	for row := range kinds {
		in := make(map[Kind]bool)
		for i := range kinds {
			kind := KindOf(row*kinds + i + 1)
			if in[kind] = true; of[i] == nil {
				of[i] = make(map[Kind]bool)
			}
			of[i][kind] = true
		}
		if len(in) != len(Kinds) {
			t.Errorf("row %d has only %d kinds", row, len(in))
		}
	}
	for i, kinds := range of {
		if len(kinds) != len(Kinds) {
			t.Errorf("seeds with the remainder %d have only %d kinds", i, len(kinds))
		}
	}
}

func TestValues(t *testing.T) {
	for _, kind := range Kinds {
		m := New(kind)
		s := m.Storage()
		value := []byte("value")
		if err := s.Store(t.Context(), "a/b/c", value); err != nil {
			t.Fatal(err)
		}
		value[0] = 'V'
		got, err := s.Load(t.Context(), "a/b/c")
		if err != nil || string(got) != "value" || !s.Exists(t.Context(), "a/b/c") {
			t.Errorf("%s: %q, error %v", kind, got, err)
		}
		got[0] = 'V'
		if got := m.Get("a/b/c"); string(got) != "value" {
			t.Errorf("%s: the value was changed to %q", kind, got)
		}
		if _, err := s.Load(t.Context(), "a/b"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a folder: error %v", kind, err)
		}
		if err := s.Delete(t.Context(), "a/b/c"); err != nil {
			t.Errorf("%s: deleting: %v", kind, err)
		}
		if err := s.Delete(t.Context(), "a/b/c"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: deleting again: %v", kind, err)
		}
		if _, err := s.Load(t.Context(), "a/b/c"); !errors.Is(err, fs.ErrNotExist) || s.Exists(t.Context(), "a/b/c") {
			t.Errorf("%s: it is still there: error %v", kind, err)
		}
		if err := s.Store(t.Context(), "large", make([]byte, 600<<10)); (err != nil) != (kind == Consul) {
			t.Errorf("%s: a large value: error %v", kind, err)
		}
	}
}

// A write or a deletion in Redis can break off half-way.
func TestHalf(t *testing.T) {
	f := NewFaulty(New(Redis))
	s := f.Storage()
	half := func(Call) Fault { return Fault{Effect: Half} }
	f.Set(half)
	if err := s.Store(t.Context(), "a/1", nil); !errors.Is(err, ErrInjected) {
		t.Errorf("error %v", err)
	}
	f.Mend()
	if names, _ := s.List(t.Context(), "a", false); len(names) != 1 || s.Exists(t.Context(), "a/1") {
		t.Errorf("after half a write: %q", names)
	}
	if err := s.Store(t.Context(), "a/1", []byte("1")); err != nil {
		t.Fatal(err)
	}
	f.Set(half)
	if err := s.Delete(t.Context(), "a/1"); err == nil {
		t.Error("no error")
	}
	f.Mend()
	if names, _ := s.List(t.Context(), "a", false); len(names) != 0 || !s.Exists(t.Context(), "a/1") {
		t.Errorf("after half a deletion: %q", names)
	}
}

func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New(FileSystem)
		f := NewFaulty(m)
		s := f.Storage()
		store := func() error {
			m.Remove("a")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			return s.Store(ctx, "a", []byte("1"))
		}
		for name, test := range map[string]struct {
			fault  Fault
			stored bool
			err    error
			took   time.Duration
		}{
			"none":                {stored: true},
			"slow":                {fault: Fault{Before: time.Second}, stored: true, took: time.Second},
			"refused":             {fault: Fault{Effect: None, Err: ErrInjected}, err: ErrInjected},
			"done but failed":     {fault: Fault{Err: ErrInjected, After: time.Second}, stored: true, err: ErrInjected, took: time.Second},
			"too slow":            {fault: Fault{Before: time.Hour}, err: context.DeadlineExceeded, took: time.Minute},
			"too slow, done":      {fault: Fault{Before: time.Hour, Late: true}, stored: true, err: context.DeadlineExceeded, took: time.Minute},
			"deaf":                {fault: Fault{Before: time.Hour, Deaf: true}, stored: true, took: time.Hour},
			"hangs":               {fault: Fault{Hang: true}, err: context.DeadlineExceeded, took: time.Minute},
			"hangs till released": {fault: Fault{Hang: true, Deaf: true}, stored: true, took: 2 * time.Hour},
		} {
			f.Set(func(Call) Fault { return test.fault })
			timer := time.AfterFunc(2*time.Hour, f.Release)
			began := time.Now()
			err := store()
			timer.Stop()
			if took := time.Since(began); took != test.took || !errors.Is(err, test.err) || (m.Get("a") != nil) != test.stored {
				t.Errorf("%s: took %s, error %v, stored %q", name, took, err, m.Get("a"))
			}
		}
	})
}

func TestLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, kind := range Kinds {
			m := New(kind)
			first, second := NewFaulty(m), NewFaulty(m)
			if err := first.Storage().Lock(t.Context(), "lock"); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			err := second.Storage().Lock(ctx, "lock")
			cancel()
			if (err != nil) != (kind.Exclusive() || kind == SQL) {
				t.Errorf("%s: two hold the lock: error %v", kind, err)
			}
			if locker, ok := second.Storage().(certmagic.TryLocker); ok {
				if locked, err := locker.TryLock(t.Context(), "lock"); locked || err != nil {
					t.Errorf("%s: locked %v, error %v", kind, locked, err)
				}
			}
			if !kind.Exclusive() {
				continue
			}
			first.Crash(func(Call) Effect { return None })
			if err := second.Storage().Lock(t.Context(), "lock"); err != nil || m.Holder("lock") != second {
				t.Errorf("%s: after a crash: %v", kind, err)
			}
			if err := first.Storage().Store(t.Context(), "a", nil); err == nil {
				t.Errorf("%s: an instance that has crashed goes on", kind)
			}
		}
	})
}

// A gate closes when the operations under way have ended, and lets none begin afterwards.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := NewFaulty(New(FileSystem))
		g := NewGate()
		s := g.Guard(tryStorage{storage{f}})
		if err := s.Lock(t.Context(), "lock"); err != nil {
			t.Fatal(err)
		}
		locked, stored, closed := make(chan error, 1), make(chan error, 1), make(chan error, 1)
		go func() { locked <- s.Lock(t.Context(), "lock") }() // waits for Unlock
		f.Set(On(Hanging(true), Store))
		go func() { stored <- s.Store(t.Context(), "a", []byte("1")) }()
		synctest.Wait()
		go func() {
			g.Close()
			close(closed)
		}()
		synctest.Wait()
		if _, err := s.Load(t.Context(), "a"); !errors.Is(err, ErrClosed) {
			t.Errorf("an operation begins while the gate closes: error %v", err)
		}
		if err := s.Unlock(t.Context(), "lock"); err != nil {
			t.Errorf("what was locked cannot be unlocked: %v", err)
		}
		if err := <-locked; err != nil {
			t.Errorf("what has waited for the lock: %v", err)
		}
		synctest.Wait()
		select {
		case <-closed:
			t.Error("the gate is closed although a write is under way")
		default:
		}
		f.Release()
		<-closed
		if err := <-stored; err != nil || f.memory.Get("a") == nil {
			t.Errorf("the write under way: error %v", err)
		}
		_, list := s.List(t.Context(), "", true)
		_, stat := s.Stat(t.Context(), "a")
		_, try := s.(certmagic.TryLocker).TryLock(t.Context(), "another")
		for name, err := range map[string]error{
			"store":  s.Store(t.Context(), "b", nil),
			"delete": s.Delete(t.Context(), "a"),
			"list":   list,
			"stat":   stat,
			"lock":   s.Lock(t.Context(), "another"),
			"try":    try,
			"unlock": s.Unlock(t.Context(), "lock"),
		} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("%s after the end: error %v", name, err)
			}
		}
		if s.Exists(t.Context(), "a") {
			t.Error("exists after the end")
		}
	})
}
