package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// header begins each value in a storage, big-endian. The payload follows: the document in the representation that memory
// keeps.
type header struct {
	Magic   [4]byte
	Version uint8
	Gzipped uint8
	_       uint16
	At      int64 // when the upstream answered, in Unix nanoseconds
	Length  int64 // of the inflated document
	Hash    [16]byte
	Key     task.Key
	Sum     [sha256.Size]byte // of the header with a zero Sum, and the payload
}

const version = 2

var (
	magic      = [4]byte{'f', 's', 'b', 'k'}
	headerSize = binary.Size(header{})
)

// Encode returns the stored form of a report under k.
func Encode(k task.Key, r *task.Report) ([]byte, error) {
	d := r.Document()
	h := header{Magic: magic, Version: version, At: d.At.UnixNano(), Length: int64(d.Length), Key: k}
	if _, err := hex.Decode(h.Hash[:], []byte(d.Hash)); err != nil {
		return nil, err
	}
	if d.Gzipped {
		h.Gzipped = 1
	}
	value := make([]byte, 0, headerSize+len(d.Body))
	value, err := binary.Append(value, binary.BigEndian, h)
	if err != nil {
		return nil, err
	}
	value = append(value, d.Body...)
	sum := sha256.Sum256(value)
	copy(value[headerSize-len(sum):], sum[:])
	return value, nil
}

// maxGzipRatio is the highest compression ratio that DEFLATE can reach.
const maxGzipRatio = 1032

// Decode reads a stored value. The checksum shows that it is what was stored, so it is not inflated here. The error says
// why the value cannot be used and shows nothing of it.
func Decode(k task.Key, value []byte) (*task.Report, error) {
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
	payload, gzipped := whole[headerSize:], h.Gzipped == 1
	if h.Length < 0 || h.Length > maxGzipRatio*int64(len(payload)) || !gzipped && int(h.Length) != len(payload) {
		return nil, task.ErrLength
	}
	return task.NewReport(task.Document{
		At: time.Unix(0, h.At), Hash: hex.EncodeToString(h.Hash[:]), Length: int(h.Length), Body: payload, Gzipped: gzipped,
	}), nil
}

// layout is the folder of a namespace in a storage. Namespaces share no folder, so none is swept or purged with another.
//
// The values are spread over partitions, so no folder grows without bound: one for each number of three hexadecimal
// digits, and one for damaged values.
type layout string

// newLayout returns the layout of a namespace, whose name can be the name of a folder.
func newLayout(namespace string) layout { return layout("fsbroker_task/" + namespace + "/") }

const (
	partitions       = 1 << 12
	damagedPartition = partitions
)

func (l layout) partition(n int) string {
	if n == damagedPartition {
		return string(l) + "damaged"
	}
	return fmt.Sprintf("%s%03x", l, n)
}

// key returns where k is stored.
func (l layout) key(k task.Key) string {
	return fmt.Sprintf("%s/%x", l.partition(int(k[0])<<4|int(k[1])>>4), k)
}

// damagedKey returns where a damaged value of k is set aside.
func (l layout) damagedKey(k task.Key) string {
	return fmt.Sprintf("%s/%x", l.partition(damagedPartition), k)
}

func (l layout) sweepLock() string { return string(l) + "sweep.lock" }

func (l layout) sweepCursor() string { return string(l) + "sweep" }
