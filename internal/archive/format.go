package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// value is what is stored under one name.
type value struct {
	kind kind
	at   time.Time // its own time, from which its age is counted
	key  task.Key

	report *task.Report // of a document, finished
	target place        // of a reference: where the document is
	size   int64        // of a reference: of the stored form of the document, in bytes
	raw    []byte       // of a damaged value: what was found; of a note: its content
}

// kind is the kind of a value.
type kind uint8

const (
	kindDocument kind = iota + 1
	kindReference
	kindDamaged // wraps a damaged value that was set aside
	kindNote    // is no report
)

// header begins each stored value. It is big-endian, as is everything in a value, and never encrypted. What follows
// depends on Sealed:
//
//	0: the SHA-256 sum of the whole value with a zero sum, and the body
//	1: the ID of a key, a nonce, and the body encrypted with AES-256-GCM, which also authenticates the header and the name
//
// The body depends on Kind: documentBody and the document in the representation that memory keeps, referenceBody, what was
// found, or the content of a note.
type header struct {
	Magic   [4]byte
	Version uint8
	Kind    kind
	Sealed  uint8
	_       uint8
	At      int64 // Unix nanoseconds
	Key     task.Key
}

// documentBody begins the body of a document.
type documentBody struct {
	Length  int64 // of the inflated document
	Hash    [16]byte
	File    [sha256.Size]byte
	Gzipped uint8
	_       [7]byte
}

// referenceBody is the body of a reference.
type referenceBody struct {
	Target task.Key
	Large  uint8
	_      [7]byte
	Size   int64
}

const (
	magic   = "fsbk"
	version = 3

	headerSize        = 48
	documentBodySize  = 64
	referenceBodySize = 48

	// valueOverhead is how much larger than its body the stored form of a document can be, in bytes.
	valueOverhead = headerSize + max(sha256.Size, sealOverhead) + documentBodySize
)

var (
	// errUnknownVersion means that a later version of this package has stored the value.
	errUnknownVersion = errors.New("its format is not known to this version")

	// errLostKey means that the value is sealed with a key that is not in the keyring.
	errLostKey = errors.New("it is encrypted with a key that is not configured")

	// errUnsealed means that the value is not sealed, although there is a keyring. Without a key, anyone can make such a value.
	errUnsealed = errors.New("it is not encrypted, and accept_unencrypted is not configured")

	errCutShort  = errors.New("it is cut short")
	errMalformed = errors.New("its content is malformed")
)

// isLocked reports whether an error means that another keyring may read the value.
func isLocked(err error) bool { return errors.Is(err, errLostKey) || errors.Is(err, errUnsealed) }

// isForeign reports whether an error means that another version or another keyring may read the value, so it is left alone.
func isForeign(err error) bool { return errors.Is(err, errUnknownVersion) || isLocked(err) }

// encode returns the stored form of a value under a name. It is sealed if there is a keyring.
func encode(v value, name string, ring *Keyring) ([]byte, error) {
	begin, rest, err := v.body()
	if err != nil {
		return nil, err
	}
	if !time.Unix(0, v.at.UnixNano()).Equal(v.at) {
		return nil, errors.New("its time is out of range")
	}
	h := header{Version: version, Kind: v.kind, At: v.at.UnixNano(), Key: v.key}
	return wrap(h, name, ring, begin, rest)
}

// body returns the body of a value in two parts.
func (v value) body() (begin, rest []byte, err error) {
	switch v.kind {
	case kindDocument:
		return v.documentBody()
	case kindReference:
		if v.target.kind != inPartition && v.target.kind != large || v.size < 0 {
			return nil, nil, errors.New("it does not refer to a document")
		}
		b := referenceBody{Target: v.target.key, Size: v.size}
		if v.target.kind == large {
			b.Large = 1
		}
		begin, err = binary.Append(nil, binary.BigEndian, b)
		return begin, nil, err
	case kindDamaged, kindNote:
		return nil, v.raw, nil
	}
	return nil, nil, errors.New("its kind is not known")
}

func (v value) documentBody() (begin, rest []byte, err error) {
	d := v.report.Document()
	b := documentBody{Length: int64(d.Length), File: d.File}
	if !v.report.Finished() || len(d.Hash) != hex.EncodedLen(len(b.Hash)) {
		return nil, nil, errors.New("it is not a finished report")
	}
	if _, err := hex.Decode(b.Hash[:], []byte(d.Hash)); err != nil {
		return nil, nil, fmt.Errorf("its hash: %w", err)
	}
	if d.Gzipped {
		b.Gzipped = 1
	}
	begin, err = binary.Append(nil, binary.BigEndian, b)
	return begin, d.Body, err
}

// wrap returns the stored form of a body.
func wrap(h header, name string, ring *Keyring, body ...[]byte) ([]byte, error) {
	copy(h.Magic[:], magic)
	if ring != nil {
		h.Sealed = 1
	}
	size := headerSize + max(sha256.Size, sealOverhead)
	for _, part := range body {
		size += len(part)
	}
	stored, err := binary.Append(make([]byte, 0, size), binary.BigEndian, h)
	if err != nil {
		return nil, err
	}
	if ring != nil {
		return ring.seal(stored, additionalData(stored, name), body...), nil
	}
	stored = append(stored, make([]byte, sha256.Size)...)
	for _, part := range body {
		stored = append(stored, part...)
	}
	sum := sha256.Sum256(stored)
	copy(stored[headerSize:], sum[:])
	return stored, nil
}

// additionalData returns what a seal authenticates beside the body, so a value can be opened only under its name.
func additionalData(header []byte, name string) []byte { return append(slices.Clip(header), name...) }

// decode reads the value that is stored under a name and must be that of a key. The checksum or the seal shows that it is
// what was stored, so a document is not inflated here. The error says why the value cannot be used and shows nothing of it:
// it is foreign (isForeign), or else damaged.
func decode(stored []byte, name string, key task.Key, ring *Keyring) (*value, error) {
	h, body, err := unwrap(stored, name, key, ring)
	if err != nil {
		return nil, err
	}
	if h.Sealed == 0 {
		body = bytes.Clone(body) // the storage may use stored again
	}
	return parseBody(h, body)
}

// timeOf returns the value's own time. It also knows that of a value that is locked, as far as it can be trusted. Its other
// errors are those of decode.
func timeOf(stored []byte, name string, key task.Key, ring *Keyring) (time.Time, error) {
	h, body, err := unwrap(stored, name, key, ring)
	if err == nil {
		_, err = parseBody(h, body)
	}
	if err != nil && !isLocked(err) {
		return time.Time{}, err
	}
	return time.Unix(0, h.At), nil
}

// unwrap returns the header and the body of a stored value. If the value is locked, it returns the header with the error.
func unwrap(stored []byte, name string, key task.Key, ring *Keyring) (h header, body []byte, err error) {
	if err := readHeader(stored, &h); err != nil {
		return header{}, nil, err
	}
	rest := stored[headerSize:]
	switch {
	case h.Key != key:
		return header{}, nil, errors.New("it belongs to another key")
	case h.Sealed == 0:
		if body, err = checkSum(stored[:headerSize], rest); err == nil && ring != nil && !ring.AcceptUnsealed {
			err = errUnsealed
		}
	case h.Sealed == 1:
		body, err = ring.open(rest, additionalData(stored[:headerSize], name))
	default:
		err = errMalformed
	}
	if err != nil && !isLocked(err) {
		return header{}, nil, err
	}
	return h, body, err
}

// readHeader reads the header of a value. That of another version may have another size.
func readHeader(stored []byte, h *header) error {
	if known, ok := bytes.CutPrefix(stored, []byte(magic)); !ok {
		return errors.New("it does not begin like a stored value")
	} else if len(known) > 0 && known[0] != version {
		return errUnknownVersion
	}
	if len(stored) < headerSize {
		return errCutShort
	}
	// Decoded by hand, as in parseDocument, because encoding/binary is slow (BenchmarkStored). The offsets are those of header.
	*h = header{
		Version: stored[4], Kind: kind(stored[5]), Sealed: stored[6],
		At: int64At(stored[8:]), Key: task.Key(stored[16:headerSize]),
	}
	if h.Kind < kindDocument || h.Kind > kindNote {
		return errUnknownVersion
	}
	return nil
}

// int64At returns the number that text begins with, as encoding/binary has written it.
func int64At(text []byte) int64 {
	return int64(binary.BigEndian.Uint64(text)) //nolint:gosec // a negative number is written as a large one
}

// checkSum returns the body that follows a sum.
func checkSum(header, rest []byte) (body []byte, err error) {
	if len(rest) < sha256.Size {
		return nil, errCutShort
	}
	sum, body := rest[:sha256.Size], rest[sha256.Size:]
	hash := sha256.New()
	for _, part := range [][]byte{header, make([]byte, sha256.Size), body} {
		_, _ = hash.Write(part) // never fails
	}
	if !bytes.Equal(hash.Sum(nil), sum) {
		return nil, errors.New("its checksum does not match")
	}
	return body, nil
}

// parseBody reads a body, which the value keeps.
func parseBody(h header, body []byte) (*value, error) {
	v := &value{kind: h.Kind, at: time.Unix(0, h.At), key: h.Key}
	var err error
	switch h.Kind {
	case kindDocument:
		v.report, err = parseDocument(h, body)
	case kindReference:
		v.target, v.size, err = parseReference(body)
	case kindDamaged, kindNote:
		v.raw = body
	}
	if err != nil {
		return nil, err
	}
	return v, nil
}

// maxGzipRatio is the highest compression ratio that DEFLATE can reach.
const maxGzipRatio = 1032

func parseDocument(h header, body []byte) (*task.Report, error) {
	if len(body) < documentBodySize {
		return nil, errCutShort
	}
	// The offsets are those of documentBody.
	b := documentBody{
		Length: int64At(body), Hash: [16]byte(body[8:24]), File: [sha256.Size]byte(body[24:56]), Gzipped: body[56],
	}
	if b.Gzipped > 1 {
		return nil, errMalformed
	}
	document, gzipped := body[documentBodySize:], b.Gzipped == 1
	longest := int64(len(document))
	if gzipped {
		longest *= maxGzipRatio
	}
	if b.Length < 0 || b.Length > longest || !gzipped && b.Length < longest || int64(int(b.Length)) != b.Length {
		return nil, task.ErrLength
	}
	return task.NewReport(task.Document{
		At: time.Unix(0, h.At), Hash: hex.EncodeToString(b.Hash[:]), File: b.File,
		Length: int(b.Length), Body: document, Gzipped: gzipped,
	}), nil
}

func parseReference(body []byte) (target place, size int64, err error) {
	var b referenceBody
	if _, err := binary.Decode(body, binary.BigEndian, &b); err != nil {
		return place{}, 0, errCutShort
	}
	if len(body) != referenceBodySize || b.Large > 1 || b.Size < 0 {
		return place{}, 0, errMalformed
	}
	target = place{kind: inPartition, key: b.Target}
	if b.Large == 1 {
		target.kind = large
	}
	return target, b.Size, nil
}

// CheckValue returns the time of the value that is stored under a name, which can be of any namespace. The error says why
// it cannot be used.
func CheckValue(name string, stored []byte, ring *Keyring) (time.Time, error) {
	namespace, _, _ := strings.Cut(strings.TrimPrefix(name, root), "/")
	l := newLayout(namespace)
	p, ok := l.parse(name)
	if folder, note, isNote := l.parseNoteName(name); isNote {
		p, ok = place{key: noteKey(folder, note)}, true
	}
	if !ok {
		return time.Time{}, errors.New("it is not stored where a value can be")
	}
	v, err := decode(stored, name, p.key, ring)
	if err != nil {
		return time.Time{}, err
	}
	return v.at, nil
}

// layout is the folder of a namespace in a storage. Namespaces share no folder, so none is swept or purged with another.
//
// The values are spread over partitions, so that no folder grows without bound and each can be listed. A partition has a
// folder for each source, one for references from files, and one for damaged values.
type layout string

// newLayout returns the layout of a namespace, whose name can be the name of a folder.
func newLayout(namespace string) layout { return layout(root + namespace + "/") }

const (
	root       = "fsbroker_task/"
	partitions = 1 << 12

	filesDir    = "files"
	damagedDir  = "damaged"
	largeSuffix = ".large"
)

// place is where a value is stored.
type place struct {
	kind placeKind
	key  task.Key
	at   int64 // of a reference from a file: its time in Unix nanoseconds, so that the newest can be found by its name
}

// placeKind is where the value of a key is stored. The index stores it.
type placeKind uint8

const (
	inPartition placeKind = iota // a document that is not large, or a reference
	large                        // a large document, beside the reference to it
	ofFile                       // a reference from a file
	damaged                      // a value that was set aside
)

// name returns the name of a place in the storage.
func (l layout) name(p place) string {
	switch p.kind {
	case large:
		return l.name(place{kind: inPartition, key: p.key}) + largeSuffix
	case ofFile:
		return fmt.Sprintf("%s/%x-%019d", l.fileFolder(p.key.Source()), p.key, max(0, p.at))
	case damaged:
		return fmt.Sprintf("%s/%x", l.damagedFolder(partitionOf(p.key)), p.key)
	}
	return l.sourceFolder(partitionOf(p.key), p.key.Source()) + "/" + hex.EncodeToString(p.key[:])
}

// parse returns the place of a name. It reports whether the name is that of a place.
func (l layout) parse(name string) (place, bool) {
	folder, base, found := cutLast(strings.TrimPrefix(name, string(l)))
	_, folder, _ = cutLast(folder)
	digits, isLarge := strings.CutSuffix(base, largeSuffix)
	p := place{kind: inPartition}
	switch {
	case isLarge:
		p.kind = large
	case folder == filesDir:
		var at string
		p.kind = ofFile
		digits, at, _ = strings.Cut(digits, "-")
		p.at, _ = strconv.ParseInt(at, 10, 64) // what is no number is another name
	case folder == damagedDir:
		p.kind = damaged
	}
	if !found || len(digits) != hex.EncodedLen(len(p.key)) {
		return place{}, false
	}
	if _, err := hex.Decode(p.key[:], []byte(digits)); err != nil || l.name(p) != name {
		return place{}, false
	}
	return p, true
}

// cutLast cuts a name at its last slash.
func cutLast(name string) (folder, base string, found bool) {
	i := strings.LastIndexByte(name, '/')
	if i < 0 {
		return "", name, false
	}
	return name[:i], name[i+1:], true
}

// partitionOf returns the partition of a key. Its source does not matter: the values of a source are spread, too.
func partitionOf(k task.Key) int { return partitionBy(k[len(task.Source{}):]) }

func partitionBy(b []byte) int { return int(b[0])<<4 | int(b[1])>>4 }

// partition returns the folder of a partition, whose name has three digits.
func (l layout) partition(n int) string {
	return string(l) + strconv.FormatInt(int64(partitions+n), 16)[1:]
}

// sourceFolder returns the folder of what a partition has of a source.
func (l layout) sourceFolder(n int, s task.Source) string {
	return l.partition(n) + "/" + hex.EncodeToString(s[:])
}

// fileFolder returns the folder that has all references from a file, and those from a few others.
func (l layout) fileFolder(file task.Source) string {
	return l.partition(partitionBy(file[:])) + "/" + filesDir
}

// damagedFolder returns the folder of the damaged values of a partition.
func (l layout) damagedFolder(n int) string { return l.partition(n) + "/" + damagedDir }

// recordName returns where a writer keeps its record.
func (l layout) recordName(writer string) string { return string(l) + "instances/" + writer }

// trialName returns where a writer tries a value.
func (l layout) trialName(writer string) string { return string(l) + "trials/" + writer }

func (l layout) sweepLock() string { return string(l) + "sweep.lock" }

func (l layout) sweepCursor() string { return string(l) + "sweep" }

// isNoteName reports whether a name can be that of a note or a folder of notes.
func isNoteName(name string) bool {
	return name != "" && len(name) <= maxNoteName && name[0] != '.' &&
		!strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune(noteNameCharacters, r) })
}

// maxNoteName is the maximum length of the name of a note or a folder of notes, in bytes.
const maxNoteName = 128

const noteNameCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."

// noteKey returns what stands in the header of a note for its key.
func noteKey(folder, name string) task.Key { return task.NewKey("note", folder, name) }

const notesDir = "notes"

func (l layout) noteFolder(folder string) string { return string(l) + notesDir + "/" + folder }

func (l layout) noteName(folder, name string) string { return l.noteFolder(folder) + "/" + name }

func (l layout) noteLock(folder string) string { return string(l) + notesDir + "-" + folder + ".lock" }

// parseNoteName returns the folder and the name of a note by its name in the storage.
func (l layout) parseNoteName(stored string) (folder, name string, ok bool) {
	rest, ok := strings.CutPrefix(stored, string(l)+notesDir+"/")
	if !ok {
		return "", "", false
	}
	folder, name, _ = strings.Cut(rest, "/")
	return folder, name, isNoteName(folder) && isNoteName(name)
}
