package task

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
)

// Report is what an upstream answered about a task. Its document is held in one or two representations: it is compressed
// while it is read, and inflated for the first caller that does not accept gzip. A Report can be used by several
// goroutines at once.
type Report struct {
	at       time.Time
	finished bool
	hash     string // of the document, hexadecimal; empty if there is nothing to report yet
	length   int    // of the document, in bytes

	inflated  atomic.Pointer[Representation]
	gzipped   atomic.Pointer[Representation]
	inflating sync.Mutex
}

// Representation is a document as it is sent, with the header fields that describe it.
type Representation struct {
	Body   []byte
	ETag   string
	Length string // Content-Length
}

func newRepresentation(body []byte, etag string) *Representation {
	return &Representation{Body: body, ETag: etag, Length: strconv.Itoa(len(body))}
}

// ReadReport reads a document to its end. It judges, hashes and compresses the document in one pass, so the document is
// never held in memory as a whole. The error says why the document is not a report and shows nothing of it.
func ReadReport(document io.Reader) (*Report, error) {
	e := encoder{sum: sha256.New(), zw: gzipWriters.Get().(*gzip.Writer)}
	defer func() {
		e.zw.Reset(io.Discard) // release the output
		gzipWriters.Put(e.zw)
	}()
	e.zw.Reset(&e.gzipped)
	finished, err := judge(io.TeeReader(document, &e))
	if err != nil {
		return nil, err
	}
	if err := e.zw.Close(); err != nil {
		return nil, fmt.Errorf("compressing it: %w", err)
	}
	r := &Report{
		at:       time.Now(),
		finished: finished,
		hash:     hex.EncodeToString(e.sum.Sum(nil)[:16]),
		length:   e.size,
	}
	gzipped := slices.Concat(e.gzipped...)
	r.gzipped.Store(r.gzippedRepresentation(gzipped))
	if len(gzipped) < e.size {
		return r, nil
	}
	_, _, err = r.Inflate() // compression saves nothing: keep the document as it is
	r.gzipped.Store(nil)
	return r, err
}

// NothingYet returns the report of a task that is known but has nothing to report yet.
func NothingYet(at time.Time) *Report { return &Report{at: at} }

// Document is a finished report in the form that a storage keeps.
type Document struct {
	At      time.Time
	Hash    string // hexadecimal, 16 bytes
	Length  int    // of the inflated document, in bytes
	Body    []byte
	Gzipped bool // whether Body is compressed
}

// NewReport returns the finished report of d.
func NewReport(d Document) *Report {
	r := &Report{at: d.At, finished: true, hash: d.Hash, length: d.Length}
	if d.Gzipped {
		r.gzipped.Store(r.gzippedRepresentation(d.Body))
	} else {
		r.inflated.Store(r.inflatedRepresentation(d.Body))
	}
	return r
}

// Document returns the report in the form that a storage keeps.
func (r *Report) Document() Document {
	d := Document{At: r.at, Hash: r.hash, Length: r.length}
	if gzipped := r.gzipped.Load(); gzipped != nil {
		d.Body, d.Gzipped = gzipped.Body, true
	} else {
		d.Body = r.inflated.Load().Body
	}
	return d
}

// At returns when the upstream answered.
func (r *Report) At() time.Time { return r.at }

// Finished reports whether the report is final.
func (r *Report) Finished() bool { return r.finished }

// IsEmpty reports whether there is nothing to report yet.
func (r *Report) IsEmpty() bool { return r.hash == "" }

// Size returns the memory that the report takes, in bytes, without fixed overhead. It counts the representation that is held from the start, by its capacity, because Go's
// allocator rounds lengths up. An inflated copy beside it is not counted.
func (r *Report) Size() int {
	for _, rep := range [...]*Representation{r.gzipped.Load(), r.inflated.Load()} {
		if rep != nil {
			return cap(rep.Body)
		}
	}
	return 0
}

// Gzipped returns the compressed representation, or nil if compression saves nothing.
func (r *Report) Gzipped() *Representation { return r.gzipped.Load() }

// Inflate returns the inflated representation. If it is not held yet, it is made and held, and made is true.
func (r *Report) Inflate() (rep *Representation, made bool, err error) {
	if rep = r.inflated.Load(); rep != nil {
		return rep, false, nil
	}
	r.inflating.Lock()
	defer r.inflating.Unlock()
	if rep = r.inflated.Load(); rep != nil {
		return rep, false, nil
	}
	document, err := inflate(r.gzipped.Load().Body, r.length)
	if err != nil {
		return nil, false, fmt.Errorf("inflating a kept report: %w", err)
	}
	rep = r.inflatedRepresentation(document)
	r.inflated.Store(rep)
	return rep, true, nil
}

// DropInflated releases the inflated representation of a report that also has a compressed one.
func (r *Report) DropInflated() { r.inflated.Store(nil) }

func (r *Report) inflatedRepresentation(document []byte) *Representation {
	return newRepresentation(document, `"`+r.hash+`"`)
}

func (r *Report) gzippedRepresentation(gzipped []byte) *Representation {
	return newRepresentation(gzipped, `"`+r.hash+`-gz"`)
}

// ErrLength means that a document does not have the length that it is said to have.
var ErrLength = errors.New("its length is not what it says")

// inflate returns a document of a known length.
func inflate(gzipped []byte, length int) ([]byte, error) {
	zr, err := gzip.NewReader(bytes.NewReader(gzipped))
	if err != nil {
		return nil, err
	}
	document := slices.Grow([]byte(nil), length)[:length]
	if _, err := io.ReadFull(zr, document); err != nil {
		return nil, err
	}
	// A gzip.Reader compares the checksum at the end, so the end must be read.
	rest, err := io.Copy(io.Discard, zr)
	if err == nil && rest > 0 {
		err = ErrLength
	}
	return document, err
}

// encoder hashes and compresses the document that is written to it.
type encoder struct {
	sum     hash.Hash
	zw      *gzip.Writer
	gzipped chunks
	size    int
}

func (e *encoder) Write(b []byte) (int, error) {
	e.size += len(b)
	_, _ = e.sum.Write(b) // never fails
	return e.zw.Write(b)
}

// chunks collects what is written in chunks that never move. A bytes.Buffer moves into one of twice the size whenever it
// is full, which doubles what a miss allocates (BenchmarkMiss).
type chunks [][]byte

const minChunk, maxChunk = 4 << 10, 1 << 20

func (c *chunks) Write(b []byte) (int, error) {
	size := minChunk
	for rest := b; len(rest) > 0; {
		last := len(*c) - 1
		if last >= 0 {
			chunk := (*c)[last]
			n := copy(chunk[len(chunk):cap(chunk)], rest)
			(*c)[last], rest = chunk[:len(chunk)+n], rest[n:]
			size = min(2*cap(chunk), maxChunk)
		}
		if len(rest) > 0 {
			*c = append(*c, make([]byte, 0, size))
		}
	}
	return len(b), nil
}

// gzipLevel makes real reports as small as the highest level does, within 5 %, and as zstd at its best, at several
// hundred MB/s (examples/bench).
const gzipLevel = 6

// gzipWriters reuses the large tables of the writers.
var gzipWriters = sync.Pool{New: func() any {
	zw, err := gzip.NewWriterLevel(nil, gzipLevel)
	if err != nil {
		panic(err) // only for an invalid level
	}
	return zw
}}
