package task

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Value is what is kept under a key: a *Report or a *Submission.
type Value interface {
	// At returns when the upstream answered.
	At() time.Time
	// Size returns the memory that the value takes, in bytes, without fixed overhead.
	Size() int
}

// MaxIDLength is the maximum length of a submission, node or task ID, in bytes. Real IDs are UUIDs.
const MaxIDLength = 256

// ValidID reports whether id can be the ID of a submission, a node or a task: it must be short and printable.
func ValidID(id string) bool {
	return id != "" && len(id) <= MaxIDLength && utf8.ValidString(id) && !strings.ContainsFunc(id, unicode.IsControl)
}

// Key identifies a value. It is a hash, so every key has the same size however long the IDs in it are.
type Key [sha256.Size]byte

// NewKey returns the key of a list of parts. Different lists have different keys.
func NewKey(parts ...string) Key {
	buf := make([]byte, 0, 512)
	for _, part := range parts {
		buf = binary.AppendUvarint(buf, uint64(len(part)))
		buf = append(buf, part...)
	}
	return sha256.Sum256(buf)
}

// ReportKey returns the key of a report. The high-level report and the complete report of a task are two reports. The
// node is identified by its address, because two sites may give different nodes the same name.
func ReportKey(nodeAddress, taskID string, all bool) Key {
	if all {
		return NewKey("complete report", nodeAddress, taskID)
	}
	return NewKey("report", nodeAddress, taskID)
}

// SubmissionKey returns the key of a submission.
func SubmissionKey(brokerAddress, submitID string) Key {
	return NewKey("submission", brokerAddress, submitID)
}
