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
	return id != "" && len(id) <= MaxIDLength && utf8.ValidString(id) && !strings.ContainsFunc(id, unicode.IsControl)
}

// Key identifies a report. It is a hash, so every key has the same size however long the IDs in it are.
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

// ReportKey returns the key of a report by its node and task. The high-level report and the complete report of a task are
// two reports. The node's address does not matter: a node that moves keeps its reports.
func ReportKey(namespace, appServerID, taskID string, all bool) Key {
	return NewKey("task", namespace, appServerID, taskID, strconv.FormatBool(all))
}

// SubmissionKey returns the key of a report by its submission.
func SubmissionKey(namespace, submitID string, all bool) Key {
	return NewKey("submission", namespace, submitID, strconv.FormatBool(all))
}
