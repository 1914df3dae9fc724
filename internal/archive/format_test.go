package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// formatLayout is a layout that the tests of the format use.
var formatLayout = newLayout("format")

// planted is in what the tests of the format store, and must be in no error.
const planted = "planted-content"

var formatTime = time.Unix(1_700_000_000, 123_456_789)

// formatKey returns a key whose bytes all differ, so that each part of it can be recognized.
func formatKey(first byte) (k task.Key) {
	for i := range k {
		k[i] = first + byte(i)
	}
	return k
}

// readFormat returns the report of a document.
func readFormat(t testing.TB, document string) *task.Report {
	t.Helper()
	r, err := task.ReadReport(strings.NewReader(document), func(int64) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// sampleValues returns a value of each form, by their names.
func sampleValues(t testing.TB) map[string]value {
	t.Helper()
	k := formatKey(1)
	file := `{"result":{"taskReference":{"state":"SUCCESS","additionalInfo":{"digests":{"SHA-256":"` + strings.Repeat("0a", 32) + `"}}},"text":"`
	compressed := readFormat(t, file+strings.Repeat(planted, 100)+`"}}`)
	short := readFormat(t, `{"result":{"text":"`+planted+`"}}`)
	if !compressed.Gzipped() || short.Gzipped() || compressed.File() == [32]byte{} {
		t.Fatal("the reports do not have the forms that they should have")
	}
	return map[string]value{
		"compressed document":          {kind: kindDocument, at: formatTime, key: k, report: compressed},
		"document":                     {kind: kindDocument, at: formatTime.Add(time.Hour), key: k, report: short},
		"reference":                    {kind: kindReference, at: formatTime, key: k, target: place{kind: inPartition, key: formatKey(100)}, size: 1 << 40},
		"reference to a large value":   {kind: kindReference, at: formatTime, key: k, target: place{kind: large, key: k}},
		"damaged value":                {kind: kindDamaged, at: formatTime, key: k, raw: []byte(planted + "\x00\xff")},
		"damaged value that was empty": {kind: kindDamaged, at: time.Unix(0, math.MinInt64), key: k, raw: []byte{}},
	}
}

// sameValue reports whether two values are the same. Reports are the same if what is stored of them is.
func sameValue(a, b *value) bool {
	if (a.report == nil) != (b.report == nil) || !a.at.Equal(b.at) {
		return false
	}
	if a.report != nil {
		d, e := a.report.Document(), b.report.Document()
		if d.At, e.At = a.at, b.at; !reflect.DeepEqual(d, e) || !b.report.At().Equal(b.at) || !b.report.Finished() {
			return false
		}
	}
	return a.kind == b.kind && a.key == b.key && a.target == b.target && a.size == b.size && bytes.Equal(a.raw, b.raw)
}

func mustEncode(t testing.TB, v value, name string, ring *Keyring) []byte {
	t.Helper()
	stored, err := encode(v, name, ring)
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

func TestValueRoundTrip(t *testing.T) {
	name := formatLayout.name(place{key: formatKey(1)})
	for form, v := range sampleValues(t) {
		for sealed, ring := range map[string]*Keyring{"unsealed": nil, "sealed": newTestRing(t, 1)} {
			t.Run(form+", "+sealed, func(t *testing.T) {
				stored := mustEncode(t, v, name, ring)
				if len(stored) != cap(stored) && ring != nil {
					t.Errorf("%d bytes were made in %d", len(stored), cap(stored))
				}
				if v.report != nil && len(stored) > len(v.report.Document().Body)+valueOverhead {
					t.Errorf("%d bytes became %d", len(v.report.Document().Body), len(stored))
				}
				if ring != nil && bytes.Contains(stored, []byte(planted)) {
					t.Error("the value is not encrypted")
				}
				got, err := decode(stored, name, v.key, ring)
				if err != nil || !sameValue(&v, got) {
					t.Fatalf("%+v, error %v, want %+v", got, err, v)
				}
				if at, err := timeOf(stored, name, v.key, ring); err != nil || !at.Equal(v.at) {
					t.Errorf("the time is %s, error %v, want %s", at, err, v.at)
				}
				if at, err := CheckValue(name, stored, ring); err != nil || !at.Equal(v.at) {
					t.Errorf("checked, the time is %s, error %v, want %s", at, err, v.at)
				}
				// The storage may use its memory again.
				clear(stored)
				if !sameValue(&v, got) {
					t.Error("the value changes with the memory that it was read from")
				}
			})
		}
	}
}

// The format is the same in all instances and all times, so the tests know it as well.
func TestValueFormat(t *testing.T) {
	k, target := formatKey(1), formatKey(100)
	v := value{kind: kindReference, at: time.Unix(0, 5), key: k, target: place{kind: large, key: target}, size: 7}
	body := slices.Concat(target[:], []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7})
	begin := slices.Concat([]byte("fsbk\x03\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x05"), k[:])
	sum := sha256.Sum256(slices.Concat(begin, make([]byte, 32), body))
	if stored, want := mustEncode(t, v, "name", nil), slices.Concat(begin, sum[:], body); !bytes.Equal(stored, want) {
		t.Errorf("%x, want %x", stored, want)
	}
	for v, size := range map[any]int{header{}: headerSize, documentBody{}: documentBodySize, referenceBody{}: referenceBodySize, indexHeader{}: indexHeaderSize} {
		if binary.Size(v) != size {
			t.Errorf("%T has %d bytes, want %d", v, binary.Size(v), size)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	document := sampleValues(t)["document"].report
	for name, v := range map[string]value{
		"no kind":                         {at: formatTime},
		"nothing yet":                     {kind: kindDocument, at: formatTime, report: task.NothingYet(formatTime)},
		"an unfinished report":            {kind: kindDocument, at: formatTime, report: readFormat(t, `{"result":{"taskReference":{"state":"QUEUED"}}}`)},
		"a hash that is none":             {kind: kindDocument, at: formatTime, report: task.NewReport(task.Document{Hash: strings.Repeat("x", 32)})},
		"a long hash":                     {kind: kindDocument, at: formatTime, report: task.NewReport(task.Document{Hash: strings.Repeat("0", 34)})},
		"no time":                         {kind: kindDocument, report: document},
		"a reference to a reference":      {kind: kindReference, at: formatTime, target: place{kind: ofFile}},
		"a reference to a damaged value":  {kind: kindReference, at: formatTime, target: place{kind: damaged}},
		"a reference to a negative size":  {kind: kindReference, at: formatTime, size: -1},
		"a time that is too far away yet": {kind: kindDocument, at: formatTime.AddDate(1000, 0, 0), report: document},
	} {
		if stored, err := encode(v, "name", nil); err == nil {
			t.Errorf("%s became %x", name, stored)
		}
	}
}

// forge returns the stored form of any header and body, with the right sum or seal.
func forge(t testing.TB, h header, name string, ring *Keyring, body []byte) []byte {
	t.Helper()
	stored, err := wrap(h, name, ring, body)
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

func TestDecodeRefuses(t *testing.T) {
	k := formatKey(1)
	name := formatLayout.name(place{key: k})
	ring := newTestRing(t, 1)
	document := func(length int64, gzipped byte, text string) []byte {
		b, err := binary.Append(nil, binary.BigEndian, documentBody{Length: length, Gzipped: gzipped})
		if err != nil {
			t.Fatal(err)
		}
		return append(b, text...)
	}
	reference := func(large byte, size int64) []byte {
		b, err := binary.Append(nil, binary.BigEndian, referenceBody{Large: large, Size: size})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for what, test := range map[string]struct {
		h    header
		body []byte
		want error // nil: any that means damage
	}{
		"another version":           {header{Version: version + 1, Kind: kindDocument, Key: k}, document(1, 0, "x"), errUnknownVersion},
		"the version before":        {header{Version: version - 1, Kind: kindDocument, Key: k}, document(1, 0, "x"), errUnknownVersion},
		"another kind":              {header{Version: version, Kind: kindNote + 1, Key: k}, nil, errUnknownVersion},
		"no kind":                   {header{Version: version, Key: k}, nil, errUnknownVersion},
		"another key":               {header{Version: version, Kind: kindDocument, Key: formatKey(2)}, document(1, 0, "x"), nil},
		"an empty document":         {header{Version: version, Kind: kindDocument, Key: k}, nil, nil},
		"half a document":           {header{Version: version, Kind: kindDocument, Key: k}, document(1, 0, "")[:documentBodySize-1], nil},
		"too long":                  {header{Version: version, Kind: kindDocument, Key: k}, document(2, 0, "x"), task.ErrLength},
		"too short":                 {header{Version: version, Kind: kindDocument, Key: k}, document(0, 0, "x"), task.ErrLength},
		"a negative length":         {header{Version: version, Kind: kindDocument, Key: k}, document(-1, 1, "x"), task.ErrLength},
		"too long to be compressed": {header{Version: version, Kind: kindDocument, Key: k}, document(maxGzipRatio*4+1, 1, "xxxx"), task.ErrLength},
		"the greatest length":       {header{Version: version, Kind: kindDocument, Key: k}, document(math.MaxInt64, 1, "x"), task.ErrLength},
		"another representation":    {header{Version: version, Kind: kindDocument, Key: k}, document(1, 2, "x"), nil},
		"half a reference":          {header{Version: version, Kind: kindReference, Key: k}, reference(0, 1)[1:], nil},
		"more than a reference":     {header{Version: version, Kind: kindReference, Key: k}, append(reference(0, 1), 0), nil},
		"a negative size":           {header{Version: version, Kind: kindReference, Key: k}, reference(0, -1), nil},
		"another target":            {header{Version: version, Kind: kindReference, Key: k}, reference(2, 1), nil},
	} {
		for _, ring := range []*Keyring{nil, ring} {
			stored := forge(t, test.h, name, ring, test.body)
			_, err := decode(stored, name, k, ring)
			_, timeErr := timeOf(stored, name, k, ring)
			for _, err := range []error{err, timeErr} {
				switch {
				case err == nil:
					t.Errorf("%s, sealed %v: no error", what, ring != nil)
				case test.want == nil && isDamage(err), errors.Is(err, test.want):
				default:
					t.Errorf("%s, sealed %v: error %v, want %v", what, ring != nil, err, test.want)
				}
			}
		}
	}
}

// isDamage reports whether an error of decode means that the value is damaged.
func isDamage(err error) bool {
	return err != nil && !isForeign(err)
}

// Any change is noticed, wherever it is, and no error shows what the value is.
func TestDamageIsFound(t *testing.T) {
	k := formatKey(1)
	name := formatLayout.name(place{key: k})
	messages := make(map[string]bool)
	for form, v := range sampleValues(t) {
		for _, ring := range []*Keyring{nil, newTestRing(t, 1)} {
			stored := mustEncode(t, v, name, ring)
			for n := range stored {
				_, err := decode(stored[:n], name, k, ring)
				if !isDamage(err) {
					t.Errorf("%s, %d of %d bytes: error %v", form, n, len(stored), err)
					continue
				}
				messages[err.Error()] = true
			}
			for i := range stored {
				for bit := range 8 {
					changed := bytes.Clone(stored)
					changed[i] ^= 1 << bit
					_, err := decode(changed, name, k, ring)
					unknown := i == 4 || i == 5 && !isKind(changed[5])
					lost := ring != nil && i >= headerSize && i < headerSize+8 // the ID of the key
					if ring == nil && i == 6 && bit == 0 {                     // it seems to be sealed
						lost = len(stored) >= headerSize+sealOverhead
					}
					if err == nil || unknown != errors.Is(err, errUnknownVersion) || lost != errors.Is(err, errLostKey) {
						t.Errorf("%s, sealed %v, bit %d of byte %d: error %v", form, ring != nil, bit, i, err)
						continue
					}
					messages[err.Error()] = true
				}
			}
			if _, err := decode(append(stored, 0), name, k, ring); !isDamage(err) {
				t.Errorf("%s and another byte: error %v", form, err)
			}
		}
	}
	for message := range messages {
		if strings.Contains(message, planted) || strings.Contains(message, fmt.Sprintf("%x", k[:4])) || strings.ContainsAny(message, "0123456789") {
			t.Errorf("an error shows what it should not: %s", message)
		}
	}
	if len(messages) > 8 {
		t.Errorf("there are %d messages, which may tell values apart: %v", len(messages), messages)
	}
}

func isKind(b byte) bool { return kind(b) >= kindDocument && kind(b) <= kindDamaged }

// What is read takes its size once more, whatever it says of itself.
func TestDecodeTakesLittleMemory(t *testing.T) {
	const size = 8 << 20
	k := formatKey(1)
	for _, ring := range []*Keyring{nil, newTestRing(t, 1)} {
		body, err := binary.Append(nil, binary.BigEndian, documentBody{Length: maxGzipRatio * size, Gzipped: 1})
		if err != nil {
			t.Fatal(err)
		}
		stored := forge(t, header{Version: version, Kind: kindDocument, Key: k}, "name", ring, append(body, make([]byte, size)...))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := decode(stored, "name", k, ring); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		if taken := after.TotalAlloc - before.TotalAlloc; taken > size+1<<20 {
			t.Errorf("sealed %v: a value of %d MiB took %d MiB", ring != nil, size>>20, taken>>20)
		}
	}
}

// placesByName are where values of two keys are.
var placesByName = map[string]place{
	"fsbroker_task/format/090/0102030405060708/0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20":          {kind: inPartition, key: formatKey(1)},
	"fsbroker_task/format/090/0102030405060708/0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20.large":    {kind: large, key: formatKey(1)},
	"fsbroker_task/format/010/files/0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20-1700000000123456789": {kind: ofFile, key: formatKey(1), at: 1700000000123456789},
	"fsbroker_task/format/090/damaged/0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20":                   {kind: damaged, key: formatKey(1)},
	"fsbroker_task/format/e8e/e0e1e2e3e4e5e6e7/e0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff":          {kind: inPartition, key: formatKey(0xe0)},
	"fsbroker_task/format/e0e/files/e0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff-0000000000000000000": {kind: ofFile, key: formatKey(0xe0), at: 0},
}

func TestPlaceNames(t *testing.T) {
	for name, p := range placesByName {
		if got := formatLayout.name(p); got != name {
			t.Errorf("%+v is at %s, want %s", p, got, name)
		}
		if got, ok := formatLayout.parse(name); !ok || got != p {
			t.Errorf("%s is %+v, %v, want %+v", name, got, ok, p)
		}
		if _, ok := newLayout("other").parse(name); ok {
			t.Errorf("%s is in another namespace as well", name)
		}
	}
}

func TestNamesOfNoPlace(t *testing.T) {
	const digits = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20"
	for _, name := range []string{
		"", "/", "fsbroker_task/format", "fsbroker_task/format/", digits, "files/" + digits,
		"fsbroker_task/format/" + digits,
		"fsbroker_task/format/0102030405060708/" + digits,
		"fsbroker_task/format/091/0102030405060708/" + digits,
		"fsbroker_task/format/090/0102030405060709/" + digits,
		"fsbroker_task/format/090/0102030405060708/" + digits[2:],
		"fsbroker_task/format/090/0102030405060708/" + digits + "00",
		"fsbroker_task/format/090/0102030405060708/" + strings.ToUpper(digits),
		"fsbroker_task/format/090/0102030405060708/" + digits + ".large.large",
		"fsbroker_task/format/090/0102030405060708/" + digits + ".tmp",
		"fsbroker_task/format/090/0102030405060708//" + digits,
		"fsbroker_task/format/090/0102030405060708/x/" + digits,
		"fsbroker_task/format//090/0102030405060708/" + digits,
		"/fsbroker_task/format/090/0102030405060708/" + digits,
		"fsbroker_task/format/090/0102030405060708/" + digits + "/",
		"fsbroker_task/format/090/files/" + digits,
		"fsbroker_task/format/010/files/" + digits + ".large",
		"fsbroker_task/format/010/damaged/" + digits,
		"fsbroker_task/format/090/other/" + digits,
		"090/0102030405060708/" + digits,
		formatLayout.sweepLock(), formatLayout.sweepCursor(), formatLayout.recordName(digits),
		formatLayout.indexName(formatTime, digits, 1),
	} {
		if p, ok := formatLayout.parse(name); ok {
			t.Errorf("%q is %+v", name, p)
		}
		if _, err := CheckValue(name, nil, nil); err == nil {
			t.Errorf("%q is sound", name)
		}
	}
}

func TestFolders(t *testing.T) {
	k := formatKey(1)
	for folder, p := range map[string]place{
		formatLayout.sourceFolder(0x090, k.Source()): {kind: inPartition, key: k},
		formatLayout.fileFolder(k.Source()):          {kind: ofFile, key: k},
		formatLayout.damagedFolder(0x090):            {kind: damaged, key: k},
		formatLayout.partition(0x090) + "/damaged":   {kind: damaged, key: k},
	} {
		if name := formatLayout.name(p); !strings.HasPrefix(name, folder+fmt.Sprintf("/%x", k)) {
			t.Errorf("%s is not in %s", name, folder)
		}
	}
	if got := formatLayout.partition(partitions - 1); got != "fsbroker_task/format/fff" {
		t.Errorf("the last partition is %s", got)
	}
}

func FuzzParse(f *testing.F) {
	for name := range placesByName {
		f.Add(name)
	}
	f.Add(formatLayout.indexName(formatTime, "writer", 1))
	f.Add(formatLayout.sweepLock())
	f.Fuzz(func(t *testing.T, name string) {
		p, ok := formatLayout.parse(name)
		if ok && formatLayout.name(p) != name {
			t.Errorf("%q is parsed as %+v, which is at %s", name, p, formatLayout.name(p))
		}
		if _, isIndex := formatLayout.parseIndexName(name); ok && isIndex {
			t.Errorf("%q is a place and an object of the index", name)
		}
	})
}

// FuzzDecode reads any bytes, and any content with the right sum or seal.
func FuzzDecode(f *testing.F) {
	k := formatKey(1)
	name := formatLayout.name(place{key: k})
	rings := []*Keyring{nil, newTestRing(f, 1)}
	for _, v := range sampleValues(f) {
		for _, ring := range rings {
			f.Add(mustEncode(f, v, name, ring), uint8(v.kind), v.at.UnixNano())
		}
		begin, rest, err := v.body()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(begin, rest...), uint8(v.kind), v.at.UnixNano())
	}
	check := func(t *testing.T, stored []byte, ring *Keyring) error {
		v, err := decode(stored, name, k, ring)
		at, timeErr := timeOf(stored, name, k, ring)
		if locked := isLocked(err); !locked && (err == nil) != (timeErr == nil) || locked && timeErr != nil {
			t.Errorf("%x: error %v, and %v of the time", stored, err, timeErr)
		}
		if err != nil {
			return err
		}
		again, err := decode(mustEncode(t, *v, name, ring), name, k, ring)
		if err != nil || !sameValue(v, again) || !at.Equal(v.at) {
			t.Errorf("%x is %+v, which becomes %+v, error %v, time %s", stored, v, again, err, at)
		}
		return nil
	}
	f.Fuzz(func(t *testing.T, text []byte, kindByte uint8, at int64) {
		for _, ring := range rings {
			_ = check(t, text, ring)
			h := header{Version: version, Kind: kind(kindByte), At: at, Key: k}
			if err := check(t, forge(t, h, name, ring, text), ring); isLocked(err) {
				t.Errorf("%x: %v", text, err)
			}
		}
	})
}
