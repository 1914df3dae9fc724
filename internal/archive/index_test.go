package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"testing"
	"time"
)

// indexedPlaces returns places of every kind.
func indexedPlaces(n int) []place {
	places := make([]place, n)
	for i := range places {
		places[i] = place{kind: placeKind(i % 4), key: formatKey(byte(i)), at: int64(i)}
	}
	return places
}

func TestIndexRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 5, maxIndexed} {
		for _, newest := range []time.Time{formatTime, time.Unix(0, 0), time.Unix(0, math.MaxInt64), time.Unix(0, math.MinInt64)} {
			want := indexedPlaces(n)
			stored := encodeIndex(newest, want)
			if len(stored) > 512<<10 {
				t.Errorf("%d places take %d bytes", n, len(stored))
			}
			places, at, err := decodeIndex(stored)
			if err != nil || !at.Equal(newest) || !slices.Equal(places, want) {
				t.Errorf("%d places became %d, %s became %s, error %v", n, len(places), newest, at, err)
			}
		}
	}
}

func TestIndexFormat(t *testing.T) {
	stored := encodeIndex(time.Unix(0, 5), []place{{kind: ofFile, key: formatKey(1), at: 9}})
	begin, end := []byte("fsbi\x01\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x05"), append(append([]byte{2}, keySlice(1)...), 0, 0, 0, 0, 0, 0, 0, 9)
	if !bytes.HasPrefix(stored, begin) || !bytes.HasSuffix(stored, end) || len(stored) != len(begin)+32+len(end) {
		t.Errorf("%x", stored)
	}
}

func keySlice(first byte) []byte {
	k := formatKey(first)
	return k[:]
}

// resumIndex returns an object of the index with the right sum.
func resumIndex(stored []byte) []byte {
	if len(stored) < indexHeaderSize {
		return stored
	}
	stored = bytes.Clone(stored)
	clear(stored[indexSumAt:indexHeaderSize])
	sum := sha256.Sum256(stored)
	copy(stored[indexSumAt:], sum[:])
	return stored
}

func TestDecodeIndexRefuses(t *testing.T) {
	sound := encodeIndex(formatTime, indexedPlaces(3))
	changed := func(at int, b ...byte) []byte {
		stored := bytes.Clone(sound)
		copy(stored[at:], b)
		return resumIndex(stored)
	}
	tooMany := encodeIndex(formatTime, indexedPlaces(maxIndexed+1))
	hostile := binary.BigEndian.AppendUint32(nil, math.MaxUint32)
	for what, test := range map[string]struct {
		stored  []byte
		unknown bool
	}{
		"another version":         {changed(4, indexVersion+1), true},
		"another version, short":  {[]byte(indexMagic + "\x02"), true},
		"nothing":                 {nil, false},
		"the beginning":           {[]byte(indexMagic), false},
		"a value":                 {changed(0, []byte(magic)...), false},
		"more than it has":        {changed(8, 0, 0, 0, 4), false},
		"fewer than it has":       {changed(8, 0, 0, 0, 2), false},
		"as many as can be":       {changed(8, hostile...), false},
		"too many":                {tooMany, false},
		"another kind of place":   {changed(indexHeaderSize, byte(damaged)+1), false},
		"another byte at the end": {resumIndex(append(bytes.Clone(sound), 0)), false},
	} {
		places, _, err := decodeIndex(test.stored)
		if err == nil || places != nil || test.unknown != errors.Is(err, errUnknownVersion) {
			t.Errorf("%s: %d places, error %v", what, len(places), err)
		}
	}
	for i := range sound {
		flipped := bytes.Clone(sound)
		flipped[i] ^= 1
		if _, _, err := decodeIndex(flipped); err == nil || (i == 4) != errors.Is(err, errUnknownVersion) {
			t.Errorf("a change of byte %d: error %v", i, err)
		}
		if _, _, err := decodeIndex(sound[:i]); !isDamage(err) {
			t.Errorf("%d bytes: error %v", i, err)
		}
	}
}

func TestIndexNames(t *testing.T) {
	for _, test := range []struct {
		newest time.Time
		writer string
		number int
		want   string
	}{
		{formatTime, "0123456789abcdef", 7, "fsbroker_task/format/index/20231114/1700000000123456789-0123456789abcdef-7"},
		{formatTime.In(time.FixedZone("", 14*3600)), "a", 0, "fsbroker_task/format/index/20231114/1700000000123456789-a-0"},
		{time.Unix(0, 1), "two-parts", 12, "fsbroker_task/format/index/19700101/0000000000000000001-two-parts-12"},
		{time.Unix(0, math.MaxInt64), "a", 1, "fsbroker_task/format/index/22620411/9223372036854775807-a-1"},
		{time.Unix(-1, 0), "before 1970", 1, "fsbroker_task/format/index/19700101/0000000000000000000-before 1970-1"},
	} {
		name := formatLayout.indexName(test.newest, test.writer, test.number)
		if name != test.want {
			t.Errorf("%s, want %s", name, test.want)
		}
		newest, ok := formatLayout.parseIndexName(name)
		if !ok || newest.UnixNano() != max(0, test.newest.UnixNano()) {
			t.Errorf("%s is of %s, %v, want %s", name, newest, ok, test.newest)
		}
	}
	for _, name := range []string{
		"", "fsbroker_task/format/index", "fsbroker_task/format/index/20231114",
		"fsbroker_task/other/index/20231114/1700000000123456789-a-7",
		"fsbroker_task/format/index/20231115/1700000000123456789-a-7",
		"fsbroker_task/format/index/20231114/1700000000123456789-a-07",
		"fsbroker_task/format/index/20231114/1700000000123456789-a-+7",
		"fsbroker_task/format/index/20231114/1700000000123456789-a--7-",
		"fsbroker_task/format/index/20231114/1700000000123456789--7",
		"fsbroker_task/format/index/20231114/1700000000123456789-a",
		"fsbroker_task/format/index/20231114/1700000000123456789",
		"fsbroker_task/format/index/20231114/01700000000123456789-a-7",
		"fsbroker_task/format/index/20231114/17000000001234567890-a-7",
		"fsbroker_task/format/index/20231114/x/1700000000123456789-a-7",
		"index/20231114/1700000000123456789-a-7",
	} {
		if newest, ok := formatLayout.parseIndexName(name); ok {
			t.Errorf("%q is of %s", name, newest)
		}
	}
}

// FuzzDecodeIndex reads any bytes, and any content with the right sum.
func FuzzDecodeIndex(f *testing.F) {
	for _, n := range []int{0, 1, 5} {
		f.Add(encodeIndex(formatTime, indexedPlaces(n)))
	}
	f.Add([]byte(indexMagic))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, stored := range [][]byte{text, resumIndex(text)} {
			places, newest, err := decodeIndex(stored)
			if err != nil {
				continue
			}
			again, at, err := decodeIndex(encodeIndex(newest, places))
			if err != nil || !at.Equal(newest) || !slices.Equal(again, places) {
				t.Errorf("%x is %v, %s, which becomes %v, %s, error %v", stored, places, newest, again, at, err)
			}
		}
	})
}
