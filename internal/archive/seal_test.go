package archive

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// ringKeyText returns a key as it is configured.
func ringKeyText(n byte) string { return hex.EncodeToString(bytes.Repeat([]byte{n}, keySize)) }

// newTestRing returns a ring of keys, the first of which seals.
func newTestRing(t testing.TB, numbers ...byte) *Keyring {
	t.Helper()
	texts := make([]string, len(numbers))
	for i, n := range numbers {
		texts[i] = ringKeyText(n)
	}
	ring, err := NewKeyring(texts...)
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

// accepting returns a ring that also reads what is not sealed.
func accepting(ring *Keyring) *Keyring {
	ring.AcceptUnsealed = true
	return ring
}

func TestNewKeyring(t *testing.T) {
	key := []byte("\xfb\xff\xbe 29 bytes that are no secret!")[:keySize]
	want, err := NewKeyring(hex.EncodeToString(key))
	if err != nil {
		t.Fatal(err)
	}
	for form, text := range map[string]string{
		"upper case":                strings.ToUpper(hex.EncodeToString(key)),
		"base64":                    base64.StdEncoding.EncodeToString(key),
		"base64, not padded":        base64.RawStdEncoding.EncodeToString(key),
		"base64 of URLs":            base64.URLEncoding.EncodeToString(key),
		"base64 of URLs, no padded": base64.RawURLEncoding.EncodeToString(key),
		"the line of a file":        hex.EncodeToString(key) + "\r\n",
	} {
		ring, err := NewKeyring(text)
		if err != nil || ring.keys[0].id != want.keys[0].id {
			t.Errorf("%s: error %v", form, err)
		}
	}
	if ring, err := NewKeyring(); ring != nil || err != nil {
		t.Errorf("without keys: %v, error %v", ring, err)
	}
}

func TestNewKeyringRefuses(t *testing.T) {
	const secret = "s3cret"
	for form, text := range map[string]string{
		"empty":                   "",
		"space":                   " \n",
		"a word":                  secret,
		"a placeholder":           "{env." + secret + "}",
		"31 bytes, hexadecimal":   ringKeyText(7)[2:],
		"33 bytes, hexadecimal":   ringKeyText(7) + "00",
		"63 digits":               ringKeyText(7)[1:],
		"no digit":                ringKeyText(7)[1:] + "g",
		"31 bytes, base64":        base64.StdEncoding.EncodeToString(make([]byte, 31)),
		"33 bytes, base64":        base64.StdEncoding.EncodeToString(make([]byte, 33)),
		"48 bytes, base64":        base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{255}, 48)),
		"base64 of other bits":    base64.RawStdEncoding.EncodeToString(make([]byte, 32))[:42] + "B",
		"base64 with a new line":  base64.RawStdEncoding.EncodeToString(make([]byte, 32))[:42] + "\nA",
		"base64, padded too much": base64.StdEncoding.EncodeToString(make([]byte, 32)) + "=",
	} {
		_, err := NewKeyring(ringKeyText(1), text)
		const want = "encryption key 2 must be 32 bytes, written as 64 hexadecimal digits or as base64"
		if err == nil || err.Error() != want {
			t.Errorf("%s: error %v, want %s", form, err, want)
		}
	}
}

func TestKeyringIsNotPrinted(t *testing.T) {
	ring := newTestRing(t, 1)
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		if text := fmt.Sprintf(format, ring); text != "keyring" {
			t.Errorf("%s prints %s", format, text)
		}
	}
}

func TestSealIsOfItsName(t *testing.T) {
	ring := newTestRing(t, 1)
	k := formatKey(1)
	name := formatLayout.name(place{kind: inPartition, key: k})
	for form, v := range sampleValues(t) {
		stored := mustEncode(t, v, name, ring)
		for _, other := range []string{
			formatLayout.name(place{kind: large, key: k}),
			formatLayout.name(place{kind: ofFile, key: k}),
			newLayout("other").name(place{kind: inPartition, key: k}),
			"",
		} {
			if _, err := decode(stored, other, k, ring); !isDamage(err) {
				t.Errorf("%s, moved to %s: error %v", form, other, err)
			}
			if _, err := timeOf(stored, other, k, ring); !isDamage(err) {
				t.Errorf("%s, moved to %s: error %v of the time", form, other, err)
			}
		}
		if _, err := decode(stored, formatLayout.name(place{key: formatKey(2)}), formatKey(2), ring); !isDamage(err) {
			t.Errorf("%s, moved to another key: error %v", form, err)
		}
	}
}

func TestKeysAreRotated(t *testing.T) {
	k := formatKey(1)
	name := formatLayout.name(place{key: k})
	for form, v := range sampleValues(t) {
		for _, test := range []struct {
			sealed, opened *Keyring
			want           error
		}{
			{newTestRing(t, 1), newTestRing(t, 1), nil},
			{newTestRing(t, 1, 2), newTestRing(t, 1), nil},
			{newTestRing(t, 1), newTestRing(t, 2, 1), nil},
			{newTestRing(t, 1), newTestRing(t, 3, 2, 1), nil},
			{nil, newTestRing(t, 1), errUnsealed},
			{nil, accepting(newTestRing(t, 1)), nil},
			{newTestRing(t, 1), accepting(newTestRing(t, 1)), nil},
			{newTestRing(t, 2), accepting(newTestRing(t, 1)), errLostKey},
			{newTestRing(t, 2, 1), newTestRing(t, 1), errLostKey},
			{newTestRing(t, 1), newTestRing(t, 2), errLostKey},
			{newTestRing(t, 1), nil, errLostKey},
		} {
			stored := mustEncode(t, v, name, test.sealed)
			got, err := decode(stored, name, k, test.opened)
			if !errors.Is(err, test.want) || err == nil && !sameValue(&v, got) {
				t.Errorf("%s: %+v, error %v, want %v", form, got, err, test.want)
			}
			if at, err := timeOf(stored, name, k, test.opened); err != nil || !at.Equal(v.at) {
				t.Errorf("%s: the time is %s, error %v, want %s", form, at, err, v.at)
			}
			if test.want == nil {
				continue
			}
			// Without the key, damage can only be found outside of the seal.
			if _, err := decode(stored[:headerSize+sealOverhead-1], name, k, test.opened); !isDamage(err) {
				t.Errorf("%s, cut short: error %v", form, err)
			}
			if _, err := timeOf(stored, name, formatKey(2), test.opened); !isDamage(err) {
				t.Errorf("%s, of another key: error %v", form, err)
			}
		}
	}
}

// What is not sealed is left alone with a keyring, whatever it is, until its retention is over.
func TestUnsealedIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := [32]byte{7}
		large, target := Item{Key: numbered(1), Report: reportOf(inlineLimit+1, file)}, numbered(1)
		first := newFixture()
		for _, i := range []Item{item(0, 100), large, {Key: numbered(2), Report: large.Report, Target: &target}} {
			first.Save(i)
		}
		if err := first.StoreNote(t.Context(), "folder", "note", []byte("text")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * indexDelay)
		first.Close()
		before := make(map[string][]byte)
		for _, p := range first.storage.stored() {
			before[tested.name(p)] = first.storage.Get(tested.name(p))
		}
		open := func(ring *Keyring) *fixture {
			return newFixtureWith(func(f *fixture, c *Config) {
				f.storage, f.backend.Keyring, c.Seed = first.storage, ring, c.Seed+1
			})
		}
		found := func(f *fixture) (n int) {
			for i := range 3 {
				got, err := f.find(t, numbered(i))
				if err != nil {
					t.Error(err)
				}
				if got.Report != nil {
					n++
				}
			}
			newest, err := f.Newest(t.Context(), file, task.Summary, time.Time{}, func(int64) error { return nil })
			if err != nil {
				t.Error(err)
			}
			if newest.Report != nil {
				n++
			}
			return n
		}

		migrating := open(accepting(newTestRing(t, 1)))
		if note, err := migrating.LoadNote(t.Context(), "folder", "note"); found(migrating) != 4 || string(note) != "text" || err != nil {
			t.Errorf("what is accepted is not read: the note is %q, error %v", note, err)
		}
		migrating.Close()

		f := open(newTestRing(t, 1))
		defer f.Close()
		if n := found(f) + found(f); n != 0 {
			t.Errorf("%d reports are read", n)
		}
		if note, err := f.LoadNote(t.Context(), "folder", "note"); note != nil || !errors.Is(err, ErrLockedNote) {
			t.Errorf("the note is %q, error %v", note, err)
		}
		f.Save(item(0, 100))
		time.Sleep(time.Minute)
		for name, content := range before {
			if !bytes.Equal(f.storage.Get(name), content) {
				t.Errorf("%s is not left alone", name)
			}
		}
		if n := f.logged("left alone"); n != 4 { // the file has a reference of its own
			t.Errorf("logged %d times", n)
		}
		time.Sleep(3 * 24 * time.Hour)
		if left := f.storage.stored(); len(left) != 0 {
			t.Errorf("after their retention, %v are left", left)
		}
	})
}

func TestSealsDiffer(t *testing.T) {
	ring := newTestRing(t, 1)
	v := sampleValues(t)["document"]
	if bytes.Equal(mustEncode(t, v, "name", ring), mustEncode(t, v, "name", ring)) {
		t.Error("a value was sealed twice with one nonce")
	}
}

func BenchmarkValue(b *testing.B) {
	r := readFormat(b, `{"result":{"text":"`+strings.Repeat(planted, 1000)+`"}}`).Document()
	r.Body = make([]byte, 100<<10)
	r.Length, r.Gzipped = len(r.Body), false
	v := sampleValues(b)["document"]
	v.report = task.NewReport(r)
	for name, ring := range map[string]*Keyring{"unsealed": nil, "sealed": newTestRing(b, 1)} {
		stored := mustEncode(b, v, "name", ring)
		b.Run("encode/"+name, func(b *testing.B) {
			b.SetBytes(int64(len(stored)))
			b.ReportAllocs()
			for b.Loop() {
				mustEncode(b, v, "name", ring)
			}
		})
		b.Run("decode/"+name, func(b *testing.B) {
			b.SetBytes(int64(len(stored)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := decode(stored, "name", v.key, ring); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
