package fsbroker

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// storedHeader begins each value in storage, big-endian. What follows is the payload: a report's document in the form
// that memory keeps, or a submission's IDs as JSON.
type storedHeader struct {
	Magic     [4]byte
	Version   uint8
	Kind      uint8
	Gzipped   uint8
	_         uint8
	At        int64 // when the node or the broker answered, in Unix nanoseconds
	PlainSize int64 // of a report's document
	Hash      [16]byte
	Key       key
	Sum       [sha256.Size]byte // of all this, with a zero Sum, and the payload
}

const (
	storedVersion    = 1
	storedReport     = 'r'
	storedSubmission = 's'
)

var (
	storedMagic      = [4]byte{'f', 's', 'b', 'k'}
	storedHeaderSize = binary.Size(storedHeader{})
)

// storedIDs is a submission's payload.
type storedIDs struct {
	AppServerID string `json:"appServerID"`
	TaskID      string `json:"taskID"`
}

// encodeStored makes the value that is stored for v under k.
func encodeStored(k key, v keepable) ([]byte, error) {
	h := storedHeader{Magic: storedMagic, Version: storedVersion, Key: k}
	var payload []byte
	switch v := v.(type) {
	case *report:
		h.Kind, h.At, h.PlainSize = storedReport, v.at.UnixNano(), int64(v.plainSize)
		if _, err := hex.Decode(h.Hash[:], []byte(v.hash)); err != nil {
			return nil, err
		}
		if gzipped := v.gzipped.Load(); gzipped != nil {
			h.Gzipped, payload = 1, gzipped.body
		} else {
			payload = v.plain.Load().body
		}
	case *submission:
		h.Kind, h.At = storedSubmission, v.at.UnixNano()
		var err error
		if payload, err = json.Marshal(storedIDs{v.appServerID, v.taskID}); err != nil {
			return nil, err
		}
	}
	value := make([]byte, 0, storedHeaderSize+len(payload))
	value, err := binary.Append(value, binary.BigEndian, h)
	if err != nil {
		return nil, err
	}
	value = append(value, payload...)
	sum := sha256.Sum256(value)
	copy(value[storedHeaderSize-len(sum):], sum[:])
	return value, nil
}

// decodeStored reads a stored value. Its errors say what is wrong with it, and show none of it.
func decodeStored(k key, value []byte) (keepable, error) {
	var h storedHeader
	if _, err := binary.Decode(value, binary.BigEndian, &h); err != nil {
		return nil, errors.New("it is cut short")
	}
	if h.Magic != storedMagic || h.Version != storedVersion {
		return nil, errors.New("it is in no format that is known here")
	}
	sum := h.Sum
	whole := bytes.Clone(value)
	clear(whole[storedHeaderSize-len(sum) : storedHeaderSize])
	if sha256.Sum256(whole) != sum {
		return nil, errors.New("its checksum does not match")
	}
	if h.Key != k {
		return nil, errors.New("it belongs under another key")
	}
	payload := whole[storedHeaderSize:]
	switch h.Kind {
	case storedReport:
		return decodeReport(h, payload)
	case storedSubmission:
		var ids storedIDs
		if err := json.Unmarshal(payload, &ids); err != nil || !validID(ids.AppServerID) || !validID(ids.TaskID) {
			return nil, errors.New("its IDs are none")
		}
		return &submission{at: time.Unix(0, h.At), appServerID: ids.AppServerID, taskID: ids.TaskID}, nil
	}
	return nil, fmt.Errorf("it is of an unknown kind, %d", h.Kind)
}

// maxGzipRatio is how much DEFLATE can shrink anything, at the very most.
const maxGzipRatio = 1032

var errSize = errors.New("its size is not what it says")

// decodeReport makes a report of a stored one. The checksum has shown that it is what was stored, so nothing is
// inflated to look into it.
func decodeReport(h storedHeader, payload []byte) (*report, error) {
	if h.PlainSize < 0 || h.PlainSize > maxGzipRatio*int64(len(payload)) {
		return nil, errSize
	}
	r := &report{at: time.Unix(0, h.At), finished: true, hash: hex.EncodeToString(h.Hash[:]), plainSize: int(h.PlainSize)}
	if h.Gzipped == 1 {
		r.gzipped.Store(r.gzippedForm(payload))
		return r, nil
	}
	if len(payload) != r.plainSize {
		return nil, errSize
	}
	r.plain.Store(r.plainForm(payload))
	return r, nil
}
