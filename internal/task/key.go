package task

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxIDLength is the maximum length of a submission, node or task ID, in bytes. Real IDs are UUIDs.
const MaxIDLength = 256

// ValidID reports whether id can be the ID of a submission, a node or a task: it must be short and printable.
func ValidID(id string) bool {
	if id == "" || len(id) > MaxIDLength {
		return false
	}
	for i := range len(id) {
		if c := id[i]; c < ' ' || c > '~' {
			return utf8.ValidString(id) && !strings.ContainsFunc(id, unicode.IsControl)
		}
	}
	return true
}

// Kind is which of a task's two reports is meant. Broker and nodes have a parameter for it, all.
type Kind uint8

// The kinds of reports.
const (
	Summary  Kind = iota // the high-level report
	Complete             // all=true
)

// Key identifies a report: its source, followed by a hash. So every key has the same size however long the IDs in it are.
type Key [sha256.Size]byte

// NewKey returns the key of a list of parts. Different lists have different keys.
func NewKey(parts ...string) Key {
	buf := make([]byte, 0, 64) // room for a name and a UUID
	for _, part := range parts {
		buf = appendPart(buf, part)
	}
	return sha256.Sum256(buf)
}

// appendPart appends a part to buf. It is not inlined, because named would take twice the stack then.
//
//go:noinline
func appendPart(buf []byte, part string) []byte {
	return append(binary.AppendUvarint(buf, uint64(len(part))), part...)
}

// Source is whose values a key belongs to. It begins the key, so that the values of a node can be found together.
type Source [8]byte

func newSource(parts ...string) Source {
	k := NewKey(parts...)
	return Source(k[:len(Source{})])
}

// NodeSource returns the source of a node's reports. The node's address does not matter: a node that moves keeps its
// reports.
func NodeSource(namespace, appServerID string) Source {
	return newSource("node", namespace, appServerID)
}

// SubmissionSource returns the source of reports by their submissions.
func SubmissionSource(namespace string) Source { return newSource("submission", namespace) }

// FileSource returns the source of references to the reports of a file, given the SHA-256 sum of the file.
func FileSource(namespace string, sum [sha256.Size]byte, kind Kind) Source {
	return newSource("file", namespace, string(sum[:]), strconv.FormatBool(kind == Complete))
}

// Source returns the source of the key.
func (k Key) Source() Source { return Source(k[:len(Source{})]) }

// in returns the key with another source.
func (k Key) in(s Source) Key {
	copy(k[:], s[:])
	return k
}

// ReportKey returns the key of a report by its node and task. The high-level report and the complete report of a task are
// two reports.
func ReportKey(node Source, taskID string, kind Kind) Key { return named(node, taskID, kind) }

// SubmissionKey returns the key of a report by its submission.
func SubmissionKey(submissions Source, submitID string, kind Kind) Key {
	return named(submissions, submitID, kind)
}

func named(s Source, name string, kind Kind) (k Key) {
	// There is room for a UUID. A hit must take little stack (see docs/ARCHITECTURE.md).
	buf := appendPart(make([]byte, 0, 64), string(s[:]))
	buf = appendPart(buf, name)
	buf = appendPart(buf, strconv.FormatBool(kind == Complete))
	k = sha256.Sum256(buf)
	copy(k[:], s[:])
	return k
}

// FileKey returns the key of the reference from a file to the report under target.
func FileKey(file Source, target Key) Key { return target.in(file) }
