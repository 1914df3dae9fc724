package archive

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

func TestNotes(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		ctx := t.Context()
		for name, note := range map[string]string{"a": "1", "b": "2", "b2": "3"} {
			if err := f.StoreNote(ctx, "folder", name, []byte(note)); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.StoreNote(ctx, "folder", "a", []byte("4")), f.StoreNote(ctx, "folder2", "c", nil), f.DeleteNote(ctx, "folder", "b")); err != nil {
			t.Fatal(err)
		}
		if names, err := f.ListNotes(ctx, "folder"); err != nil || !slices.Equal(names, []string{"a", "b2"}) {
			t.Errorf("listed %q, error %v", names, err)
		}
		if note, err := f.LoadNote(ctx, "folder", "a"); err != nil || string(note) != "4" {
			t.Errorf("loaded %q, error %v", note, err)
		}
		if _, err := f.LoadNote(ctx, "folder", "b"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a deleted note: error %v", err)
		}
		if err := f.DeleteNote(ctx, "folder", "b"); err != nil {
			t.Errorf("deleting again: %v", err)
		}
	})
}

func TestNoteNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		for name, want := range map[string]bool{
			"a": true, "A-Z_0.9": true, strings.Repeat("a", maxNoteName): true,
			"": false, ".a": false, "a/b": false, "a b": false, "ä": false, strings.Repeat("a", maxNoteName+1): false,
		} {
			for _, at := range [][2]string{{"folder", name}, {name, "note"}} {
				if err := f.StoreNote(t.Context(), at[0], at[1], nil); errors.Is(err, errNoteName) == want {
					t.Errorf("%q: error %v", at, err)
				}
				if _, _, ok := tested.parseNoteName(tested.noteName(at[0], at[1])); ok != want {
					t.Errorf("%q can be parsed: %v", at, ok)
				}
			}
		}
	})
}

// One instance at a time has the lock of a folder of notes.
func TestLockNotes(t *testing.T) {
	eachKind(t, func(t *testing.T, f *fixture) {
		exclusive := f.storage.Kind().Exclusive()
		unlock, locked, err := f.LockNotes(t.Context(), "folder")
		if err != nil || !locked {
			t.Fatalf("locked %v, error %v", locked, err)
		}
		other := newFixtureOver(f.storage.Memory, 0, 2)
		defer other.Close()
		if _, locked, err := other.LockNotes(t.Context(), "folder"); (err != nil) != (f.storage.Kind() == storagetest.SQL) || locked && exclusive {
			t.Errorf("another has it as well: locked %v, error %v", locked, err)
		}
		if err := unlock(); err != nil && exclusive {
			t.Error(err)
		}
		time.Sleep(time.Minute) // some locks end by themselves
		another := newFixtureOver(f.storage.Memory, 0, 3)
		defer another.Close()
		unlock, locked, err = another.LockNotes(t.Context(), "folder")
		if err != nil || !locked {
			t.Fatalf("after it was unlocked: locked %v, error %v", locked, err)
		}
		if err := unlock(); err != nil {
			t.Error(err)
		}
	})
}
