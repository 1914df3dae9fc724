package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// indexHeader begins each object of the index, which says where values are that were stored at about the same time.
// Entries follow, each the kind, the key and the time of a place.
type indexHeader struct {
	Magic   [4]byte
	Version uint8
	_       [3]byte
	Count   uint32
	Newest  int64             // the time of the newest value, in Unix nanoseconds
	Sum     [sha256.Size]byte // of the whole object with a zero Sum
}

const (
	indexMagic   = "fsbi"
	indexVersion = 1

	indexSumAt      = 20
	indexHeaderSize = indexSumAt + sha256.Size
	indexEntrySize  = 1 + sha256.Size + 8

	// maxIndexed is how many places an object of the index has at most. Some storages allow values of 512 KiB only.
	maxIndexed = 4096

	// indexDayFormat is the format of the names of the days in the folder of the index.
	indexDayFormat = "20060102"
)

// encodeIndex returns an object of the index, given at most maxIndexed places and the time of the newest value.
func encodeIndex(newest time.Time, places []place) []byte {
	size := indexHeaderSize + len(places)*indexEntrySize
	stored := append(make([]byte, 0, size), indexMagic...)
	stored = append(stored, indexVersion, 0, 0, 0)
	stored = binary.BigEndian.AppendUint32(stored, uint32(len(places))) //nolint:gosec // there are not so many
	stored = binary.BigEndian.AppendUint64(stored, uint64(newest.UnixNano()))
	stored = append(stored, make([]byte, sha256.Size)...)
	for _, p := range places {
		stored = append(append(stored, byte(p.kind)), p.key[:]...)
		stored = binary.BigEndian.AppendUint64(stored, uint64(p.at)) //nolint:gosec // as it is read
	}
	sum := sha256.Sum256(stored)
	copy(stored[indexSumAt:], sum[:])
	return stored
}

// decodeIndex reads an object of the index. The error is errUnknownVersion, or else the object is damaged.
func decodeIndex(stored []byte) (places []place, newest time.Time, err error) {
	h, err := readIndexHeader(stored)
	if err != nil {
		return nil, time.Time{}, err
	}
	places = make([]place, h.Count)
	for i := range places {
		entry := stored[indexHeaderSize+i*indexEntrySize:]
		if places[i].kind = placeKind(entry[0]); places[i].kind > damaged {
			return nil, time.Time{}, errMalformed
		}
		at := copy(places[i].key[:], entry[1:]) + 1
		places[i].at = int64(binary.BigEndian.Uint64(entry[at:])) //nolint:gosec // as it was written
	}
	return places, time.Unix(0, h.Newest), nil
}

// readIndexHeader reads the header of an object of the index, and verifies its size and its sum.
func readIndexHeader(stored []byte) (h indexHeader, err error) {
	if known, ok := bytes.CutPrefix(stored, []byte(indexMagic)); !ok {
		return h, errors.New("it does not begin like an object of the index")
	} else if len(known) > 0 && known[0] != indexVersion {
		return h, errUnknownVersion
	}
	if _, err := binary.Decode(stored, binary.BigEndian, &h); err != nil {
		return h, errCutShort
	}
	if h.Count > maxIndexed || len(stored) != indexHeaderSize+int(h.Count)*indexEntrySize {
		return h, errMalformed
	}
	summed := bytes.Clone(stored)
	clear(summed[indexSumAt:indexHeaderSize])
	if sha256.Sum256(summed) != h.Sum {
		return h, errors.New("its checksum does not match")
	}
	return h, nil
}

// indexFolder returns the folder of the index. It has a folder for each day.
func (l layout) indexFolder() string { return string(l) + "index" }

// indexName returns the name of an object of the index, given the time of its newest value, and the number that the writer
// gives it.
func (l layout) indexName(newest time.Time, writer string, number int) string {
	at := max(0, newest.UnixNano())
	day := time.Unix(0, at).UTC().Format(indexDayFormat)
	return fmt.Sprintf("%s/%s/%019d-%s-%d", l.indexFolder(), day, at, writer, number)
}

// parseIndexName returns the time of the newest value of an object of the index. It reports whether the name is that of
// one.
func (l layout) parseIndexName(name string) (newest time.Time, ok bool) {
	_, base, _ := cutLast(name)
	digits, rest, _ := strings.Cut(base, "-")
	i := strings.LastIndexByte(rest, '-')
	if i <= 0 {
		return time.Time{}, false
	}
	at, err := strconv.ParseInt(digits, 10, 64)
	number, numberErr := strconv.Atoi(rest[i+1:])
	if newest = time.Unix(0, at); err != nil || numberErr != nil || number < 0 || l.indexName(newest, rest[:i], number) != name {
		return time.Time{}, false
	}
	return newest, true
}
