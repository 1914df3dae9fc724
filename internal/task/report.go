package task

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
)

// Report is what an upstream answered about a task. Its document is held in one representation: compressed, or as it is if
// compression saves nothing. But for the time of the answer, a Report does not change. It can be used by several
// goroutines at once.
type Report struct {
	at       atomic.Int64 // Unix nanoseconds
	finished bool
	gzipped  bool
	unknown  bool // see Known
	length   int  // of the document, in bytes
	body     []byte
	// The entity tag of the representation, which has the hash of the document, followed by its Content-Length. Two strings,
	// or three, would take more memory. It is empty if there is nothing to report yet.
	header string
	file   [sha256.Size]byte
}

// Representation is a document as it is sent, with the header fields that describe it.
type Representation struct {
	Body   []byte
	ETag   string
	Length string // Content-Length
}

// NothingYet returns the report of a task that is known but has nothing to report yet.
func NothingYet(at time.Time) *Report {
	r := new(Report)
	r.at.Store(at.UnixNano())
	return r
}

// NotKnownYet returns the report of a submission that was accepted and that no upstream knows yet.
func NotKnownYet(at time.Time) *Report {
	r := NothingYet(at)
	r.unknown = true
	return r
}

// Document is a finished report in the form that a storage keeps.
type Document struct {
	At      time.Time
	Hash    string            // hexadecimal, 16 bytes
	File    [sha256.Size]byte // the SHA-256 sum of the analysed file; zero if it is not known
	Length  int               // of the inflated document, in bytes
	Body    []byte
	Gzipped bool // whether Body is compressed
}

// NewReport returns the finished report of d.
func NewReport(d Document) *Report { return newReport(d, true) }

func newReport(d Document, finished bool) *Report {
	r := &Report{
		finished: finished, gzipped: d.Gzipped, length: d.Length, body: d.Body, file: d.File,
		header: etag(d.Hash, d.Gzipped) + strconv.Itoa(len(d.Body)),
	}
	r.at.Store(d.At.UnixNano())
	return r
}

// Document returns the report in the form that a storage keeps.
func (r *Report) Document() Document {
	return Document{At: r.At(), Hash: r.hash(), File: r.file, Length: r.length, Body: r.body, Gzipped: r.gzipped}
}

// At returns when the upstream answered, last of all if it has answered with the same document several times.
func (r *Report) At() time.Time { return time.Unix(0, r.at.Load()) }

// Same reports whether the upstream answered with the same document.
func (r *Report) Same(other *Report) bool {
	return r.hash() == other.hash() && r.finished == other.finished
}

// Renew reports whether the upstream answered with the same document again, in which case the time of that answer counts.
func (r *Report) Renew(again *Report) bool {
	if !r.Same(again) || r.IsEmpty() {
		return false
	}
	r.at.Store(again.at.Load())
	return true
}

// Finished reports whether the report is final.
func (r *Report) Finished() bool { return r.finished }

// Known reports whether an upstream knows the task.
func (r *Report) Known() bool { return !r.unknown }

// File returns the SHA-256 sum of the analysed file. It is zero if the document does not say it.
func (r *Report) File() [sha256.Size]byte { return r.file }

// IsEmpty reports whether there is nothing to report yet.
func (r *Report) IsEmpty() bool { return r.header == "" }

// Size returns the memory that the document takes, in bytes, without fixed overhead. It is the capacity, because Go's
// allocator rounds lengths up.
func (r *Report) Size() int { return cap(r.body) }

// Length returns the length of the inflated document, in bytes.
func (r *Report) Length() int { return r.length }

// Gzipped reports whether the representation that is held is compressed.
func (r *Report) Gzipped() bool { return r.gzipped }

// Representation returns the representation that is held.
func (r *Report) Representation() Representation {
	length := strings.LastIndexByte(r.header, '"') + 1
	return Representation{Body: r.body, ETag: r.header[:length], Length: r.header[length:]}
}

// Inflated returns the header fields of the inflated representation, without the body.
func (r *Report) Inflated() Representation {
	return Representation{ETag: etag(r.hash(), false), Length: strconv.Itoa(r.length)}
}

// Inflate returns the inflated representation of a report that is compressed.
func (r *Report) Inflate() (*Representation, error) {
	rep := r.Inflated()
	rep.Body = make([]byte, r.length)
	err := r.inflate(rep.Body, func([]byte) error { return nil })
	return &rep, err
}

// WriteInflated writes the inflated document piece by piece, so it is never in memory as a whole. Damage is found at the
// end at the latest, before the last piece is written.
func (r *Report) WriteInflated(w io.Writer) error {
	return r.inflate(nil, func(piece []byte) error {
		_, err := w.Write(piece)
		return err
	})
}

// ErrLength means that a document does not have the length that it is said to have.
var ErrLength = errors.New("its length is not what it says")

// ErrDamaged means that the compressed document is damaged.
var ErrDamaged = errors.New("the kept report is damaged")

// inflate inflates the compressed document into a buffer, piece by piece if the buffer is smaller. Without a buffer, it uses
// one of its own. It calls piece with each piece, but with the last one only after the checksum has been compared.
func (r *Report) inflate(buf []byte, piece func([]byte) error) error {
	d := decoders.Get().(*decoder)
	defer decoders.Put(d)
	d.body.Reset(r.body)
	defer d.body.Reset(nil)
	if err := d.zr.Reset(&d.body); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if buf == nil {
		buf = d.buf[:]
	}
	for left := r.length; left > 0; {
		buf = buf[:min(left, len(buf))]
		if _, err := io.ReadFull(&d.zr, buf); err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if left -= len(buf); left == 0 {
			// The reader compares the checksum at the end, so the end must be read.
			if rest, err := io.Copy(io.Discard, &d.zr); err != nil || rest > 0 {
				return fmt.Errorf("%w: %w", ErrDamaged, cmp.Or(err, ErrLength))
			}
		}
		if err := piece(buf); err != nil {
			return err
		}
	}
	return nil
}

// decoder inflates a document.
type decoder struct {
	zr   gzip.Reader
	body bytes.Reader
	buf  [32 << 10]byte
}

// DecoderMemory is the memory that inflating a document piece by piece takes, in bytes.
const DecoderMemory = 72 << 10

// decoders reuses the buffers of the decoders.
var decoders = sync.Pool{New: func() any { return new(decoder) }}

const gzippedSuffix = "-gz"

// etag returns the entity tag of a representation of the document with a hash.
func etag(hash string, gzipped bool) string {
	if gzipped {
		hash += gzippedSuffix
	}
	return `"` + hash + `"`
}

// hash returns the hash of the document, hexadecimal. It is empty if there is nothing to report yet.
func (r *Report) hash() string {
	return strings.TrimSuffix(strings.Trim(r.Representation().ETag, `"`), gzippedSuffix)
}
