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
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
)

const (
	// SmallDocument is the size up to which a document is read without an encoder, in bytes.
	SmallDocument = 64 << 10

	// EncoderMemory is the memory that reading a larger document takes beside its compressed form, in bytes. It is mostly
	// that of the compressor.
	EncoderMemory = 1<<20 + 192<<10
)

// ReadReport reads a document to its end. It judges, hashes and compresses the document in one pass, so a large document
// is never held in memory as a whole. It calls grow with the memory that it needs so far, in bytes, before it takes more;
// an error of grow ends it. Other errors say why the document is not a report and show nothing of it.
func ReadReport(document io.Reader, grow func(held int64) error) (*Report, error) {
	if err := grow(SmallDocument); err != nil {
		return nil, err
	}
	buf := smallBuffers.Get().(*[SmallDocument]byte)
	defer smallBuffers.Put(buf)
	n, err := io.ReadFull(document, buf[:])
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return readSmall(buf[:n])
	case err != nil:
		return nil, err
	}
	if err := grow(SmallDocument + EncoderMemory); err != nil {
		return nil, err
	}
	e := newEncoder(lastingWriters, grow) // whether it is finished is known only at its end
	defer e.release()
	j, err := judge(&shortener{src: io.TeeReader(io.MultiReader(bytes.NewReader(buf[:]), document), e)})
	if e.err != nil { // the parser has wrapped it
		return nil, e.err
	}
	if err != nil {
		return nil, err
	}
	return e.report(j)
}

// smallBuffers reuses the buffers of small documents.
var smallBuffers = sync.Pool{New: func() any { return new([SmallDocument]byte) }}

// readSmall reads a document that is in memory. The compressor is needed for a moment only.
func readSmall(text []byte) (*Report, error) {
	j, err := judge(bytes.NewBuffer(text))
	if err != nil {
		return nil, err
	}
	writers := lastingWriters
	if !j.finished {
		writers = passingWriters
	}
	e := newEncoder(writers, func(int64) error { return nil })
	defer e.release()
	if _, err := e.Write(text); err != nil {
		return nil, err
	}
	return e.report(j)
}

// encoder hashes and compresses the document that is written to it.
type encoder struct {
	sum     hash.Hash
	zw      *gzip.Writer
	writers *sync.Pool // of zw
	gzipped chunks
	size    int
	err     error // of grow
}

func newEncoder(writers *sync.Pool, grow func(held int64) error) *encoder {
	e := &encoder{sum: sha256.New(), zw: writers.Get().(*gzip.Writer), writers: writers}
	e.gzipped.grow = func(size int) error {
		e.err = grow(SmallDocument + EncoderMemory + int64(size))
		return e.err
	}
	e.zw.Reset(&e.gzipped)
	return e
}

// release makes the compressor available to other documents.
func (e *encoder) release() {
	e.zw.Reset(io.Discard) // release the output
	e.writers.Put(e.zw)
}

// Write implements io.Writer.
func (e *encoder) Write(b []byte) (int, error) {
	e.size += len(b)
	_, _ = e.sum.Write(b) // never fails
	return e.zw.Write(b)
}

// report returns the report of the document that was written, which says j.
func (e *encoder) report(j judgement) (*Report, error) {
	if err := e.zw.Close(); err != nil {
		return nil, fmt.Errorf("compressing it: %w", err)
	}
	// The chunks are copied into one piece.
	if err := e.gzipped.grow(2 * e.gzipped.size); err != nil {
		return nil, err
	}
	d := Document{
		At: time.Now(), Hash: hex.EncodeToString(e.sum.Sum(nil)[:16]), File: j.file, Length: e.size,
		Body: slices.Concat(e.gzipped.chunks...), Gzipped: true,
	}
	r := newReport(d, j.finished)
	if len(d.Body) < d.Length {
		return r, nil
	}
	inflated, err := r.Inflate() // compression saves nothing: keep the document as it is
	if err != nil {
		return nil, err
	}
	d.Body, d.Gzipped = inflated.Body, false
	return newReport(d, j.finished), nil
}

// chunks collects what is written in chunks that never move. A bytes.Buffer moves into one of twice the size whenever it
// is full, which doubles what a miss allocates (BenchmarkMiss).
type chunks struct {
	chunks [][]byte
	size   int                  // of all chunks, in bytes
	grow   func(size int) error // is called before there is another chunk
}

const minChunk, maxChunk = 4 << 10, 1 << 20

// Write implements io.Writer.
func (c *chunks) Write(b []byte) (int, error) {
	next := minChunk
	for rest := b; len(rest) > 0; {
		if last := len(c.chunks) - 1; last >= 0 {
			chunk := c.chunks[last]
			n := copy(chunk[len(chunk):cap(chunk)], rest)
			c.chunks[last], rest = chunk[:len(chunk)+n], rest[n:]
			next = min(2*cap(chunk), maxChunk)
		}
		if len(rest) > 0 {
			if err := c.grow(c.size + next); err != nil {
				return 0, err
			}
			c.size += next
			c.chunks = append(c.chunks, make([]byte, 0, next))
		}
	}
	return len(b), nil
}

const (
	// lastingLevel makes real reports as small as the highest level does, within 5 %, and as zstd at its best, at several
	// hundred MB/s (examples/bench).
	lastingLevel = 6

	// passingLevel takes half the time of lastingLevel, for a tenth more bytes. Unfinished reports are kept for a poll interval
	// only.
	passingLevel = 1
)

// lastingWriters and passingWriters reuse the large tables of the compressors.
var (
	lastingWriters = newWriters(lastingLevel)
	passingWriters = newWriters(passingLevel)
)

func newWriters(level int) *sync.Pool {
	return &sync.Pool{New: func() any {
		zw, err := gzip.NewWriterLevel(nil, level)
		if err != nil {
			panic(err) // only for an invalid level
		}
		return zw
	}}
}
