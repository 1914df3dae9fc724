package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// header begins each value in a storage, big-endian. The payload follows: a report's document in the representation that
// memory keeps, or a submission's IDs as JSON.
type header struct {
	Magic   [4]byte
	Version uint8
	Kind    uint8
	Gzipped uint8
	_       uint8
	At      int64 // when the upstream answered, in Unix nanoseconds
	Length  int64 // of a report's inflated document
	Hash    [16]byte
	Key     task.Key
	Sum     [sha256.Size]byte // of the header with a zero Sum, and the payload
}

const (
	version        = 1
	kindReport     = 'r'
	kindSubmission = 's'
)

var (
	magic      = [4]byte{'f', 's', 'b', 'k'}
	headerSize = binary.Size(header{})
)

// submissionIDs is the payload of a submission.
type submissionIDs struct {
	AppServerID string `json:"appServerID"`
	TaskID      string `json:"taskID"`
}

// Encode returns the stored form of v under k.
func Encode(k task.Key, v task.Value) ([]byte, error) {
	h := header{Magic: magic, Version: version, At: v.At().UnixNano(), Key: k}
	var payload []byte
	switch v := v.(type) {
	case *task.Report:
		d := v.Document()
		h.Kind, h.Length = kindReport, int64(d.Length)
		if _, err := hex.Decode(h.Hash[:], []byte(d.Hash)); err != nil {
			return nil, err
		}
		if d.Gzipped {
			h.Gzipped = 1
		}
		payload = d.Body
	case *task.Submission:
		h.Kind = kindSubmission
		var err error
		if payload, err = json.Marshal(submissionIDs{v.AppServerID(), v.TaskID()}); err != nil {
			return nil, err
		}
	}
	value := make([]byte, 0, headerSize+len(payload))
	value, err := binary.Append(value, binary.BigEndian, h)
	if err != nil {
		return nil, err
	}
	value = append(value, payload...)
	sum := sha256.Sum256(value)
	copy(value[headerSize-len(sum):], sum[:])
	return value, nil
}

// Decode reads a stored value. The error says why the value cannot be used and shows nothing of it.
func Decode(k task.Key, value []byte) (task.Value, error) {
	var h header
	if _, err := binary.Decode(value, binary.BigEndian, &h); err != nil {
		return nil, errors.New("it is cut short")
	}
	if h.Magic != magic || h.Version != version {
		return nil, errors.New("its format is unknown")
	}
	sum := h.Sum
	whole := bytes.Clone(value)
	clear(whole[headerSize-len(sum) : headerSize])
	if sha256.Sum256(whole) != sum {
		return nil, errors.New("its checksum does not match")
	}
	if h.Key != k {
		return nil, errors.New("it belongs to another key")
	}
	payload := whole[headerSize:]
	switch h.Kind {
	case kindReport:
		return decodeReport(h, payload)
	case kindSubmission:
		var ids submissionIDs
		if err := json.Unmarshal(payload, &ids); err != nil || !task.ValidID(ids.AppServerID) || !task.ValidID(ids.TaskID) {
			return nil, errors.New("its IDs are invalid")
		}
		return task.NewSubmission(time.Unix(0, h.At), ids.AppServerID, ids.TaskID), nil
	}
	return nil, fmt.Errorf("its kind %d is unknown", h.Kind)
}

// maxGzipRatio is the highest compression ratio that DEFLATE can reach.
const maxGzipRatio = 1032

// decodeReport returns a stored report. The checksum has shown that it is what was stored, so it is not inflated here.
func decodeReport(h header, payload []byte) (*task.Report, error) {
	gzipped := h.Gzipped == 1
	if h.Length < 0 || h.Length > maxGzipRatio*int64(len(payload)) || !gzipped && int(h.Length) != len(payload) {
		return nil, task.ErrLength
	}
	return task.NewReport(task.Document{
		At: time.Unix(0, h.At), Hash: hex.EncodeToString(h.Hash[:]), Length: int(h.Length), Body: payload, Gzipped: gzipped,
	}), nil
}

// prefix is the folder of the module's values in a storage.
const prefix = "fsbroker_task/"

// The values are spread over partitions, so no folder grows without bound: one for each number of three hexadecimal
// digits, and one for damaged values.
const (
	partitions       = 1 << 12
	damagedPartition = partitions
)

func partition(n int) string {
	if n == damagedPartition {
		return prefix + "damaged"
	}
	return fmt.Sprintf("%s%03x", prefix, n)
}

// storageKey returns where k is stored.
func storageKey(k task.Key) string {
	return fmt.Sprintf("%s/%x", partition(int(k[0])<<4|int(k[1])>>4), k)
}

// damagedKey returns where a damaged value of k is set aside.
func damagedKey(k task.Key) string { return fmt.Sprintf("%s/%x", partition(damagedPartition), k) }
