package fsbroker

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
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

// report is what a node had to say about a task, at the time it said it.
type report struct {
	at       time.Time
	finished bool   // it will never change
	hash     string // of the document; empty while there is nothing to report yet

	// The document in up to two forms, each made at most once: it is compressed while it comes, and inflated again
	// for the first caller that does not take gzip.
	plain     atomic.Pointer[form]
	gzipped   atomic.Pointer[form]
	plainSize int
	inflating sync.Mutex
}

// form is a document as it is sent, with what its header fields say of it, so that they are worded once.
type form struct {
	body   []byte
	etag   string
	length string
}

func newForm(body []byte, etag string) *form {
	return &form{body: body, etag: etag, length: strconv.Itoa(len(body))}
}

// readReport reads a node's document to its end, once: while it comes, it is judged, hashed and compressed, so that it is
// never in memory as it came. The error says what is wrong with it, and shows none of it.
func readReport(document io.Reader) (*report, error) {
	p := press{sum: sha256.New(), zw: gzipWriters.Get().(*gzip.Writer)}
	defer func() {
		p.zw.Reset(io.Discard) // lest it hold on to what it has written
		gzipWriters.Put(p.zw)
	}()
	p.zw.Reset(&p.gzipped)
	finished, err := judge(io.TeeReader(document, &p))
	if err != nil {
		return nil, err
	}
	if err := p.zw.Close(); err != nil {
		return nil, fmt.Errorf("compressing it: %w", err)
	}
	r := &report{
		at:        time.Now(),
		finished:  finished,
		hash:      hex.EncodeToString(p.sum.Sum(nil)[:16]),
		plainSize: p.size,
	}
	gzipped := slices.Concat(p.gzipped...)
	r.gzipped.Store(r.gzippedForm(gzipped))
	if len(gzipped) < p.size {
		return r, nil
	}
	_, _, err = r.inflated() // it does not shrink, and stays as it is
	r.gzipped.Store(nil)
	return r, err
}

// press is a document that is hashed and compressed as it is written.
type press struct {
	sum     hash.Hash
	zw      *gzip.Writer
	gzipped pieces
	size    int
}

func (p *press) Write(b []byte) (int, error) {
	p.size += len(b)
	_, _ = p.sum.Write(b) // never fails
	return p.zw.Write(b)
}

// pieces is what has been written, in pieces that stay where they are. A bytes.Buffer moves into one of twice the size
// whenever it is full, and what it leaves behind doubles what a miss takes (BenchmarkMiss).
type pieces [][]byte

const minPiece, maxPiece = 4 << 10, 1 << 20

func (p *pieces) Write(b []byte) (int, error) {
	size := minPiece
	for rest := b; len(rest) > 0; {
		last := len(*p) - 1
		if last >= 0 {
			piece := (*p)[last]
			n := copy(piece[len(piece):cap(piece)], rest)
			(*p)[last], rest = piece[:len(piece)+n], rest[n:]
			size = min(2*cap(piece), maxPiece)
		}
		if len(rest) > 0 {
			*p = append(*p, make([]byte, 0, size))
		}
	}
	return len(b), nil
}

func (r *report) plainForm(document []byte) *form { return newForm(document, `"`+r.hash+`"`) }

func (r *report) gzippedForm(gzipped []byte) *form { return newForm(gzipped, `"`+r.hash+`-gz"`) }

// nothingYet is the report of a task that is known and has none.
func nothingYet(at time.Time) *report { return &report{at: at} }

// isEmpty tells whether there is nothing to report yet.
func (r *report) isEmpty() bool { return r.hash == "" }

// answers implements keepable.
func (r *report) answers(nocache bool) bool { return !nocache }

// isReport implements keepable.
func (r *report) isReport() bool { return !r.isEmpty() }

// since implements keepable.
func (r *report) since() time.Time { return r.at }

// size implements keepable: it is what the report's document takes as it is kept first, in bytes: those of its
// capacity, which is what Go's allocator rounds a length up to.
func (r *report) size() int {
	for _, f := range [...]*form{r.gzipped.Load(), r.plain.Load()} {
		if f != nil {
			return cap(f.body)
		}
	}
	return 0
}

// gzipLevel makes real reports as small as the highest level does, and zstd at its best, within 5 %, at several hundred MB/s
// (examples/bench).
const gzipLevel = 6

// gzipWriters saves the large tables of a writer for the next report.
var gzipWriters = sync.Pool{New: func() any {
	zw, err := gzip.NewWriterLevel(nil, gzipLevel)
	if err != nil {
		panic(err) // for another level only
	}
	return zw
}}

// inflated is the plain form, made from the gzip form where it is missing. It tells whether it was made by this call.
func (r *report) inflated() (plain *form, made bool, err error) {
	if plain = r.plain.Load(); plain != nil {
		return plain, false, nil
	}
	r.inflating.Lock()
	defer r.inflating.Unlock()
	if plain = r.plain.Load(); plain != nil {
		return plain, false, nil
	}
	zr, err := gzip.NewReader(bytes.NewReader(r.gzipped.Load().body))
	if err != nil {
		return nil, false, fmt.Errorf("inflating a kept report: %w", err)
	}
	document := slices.Grow([]byte(nil), r.plainSize)[:r.plainSize]
	_, err = io.ReadFull(zr, document)
	if err == nil {
		err = wantEnd(zr)
	}
	if err != nil {
		return nil, false, fmt.Errorf("inflating a kept report: %w", err)
	}
	plain = r.plainForm(document)
	r.plain.Store(plain)
	return plain, true, nil
}

// wantEnd reads on to the end, which is where a gzip.Reader compares the checksum, and wants nothing before it.
func wantEnd(r io.Reader) error {
	n, err := io.Copy(io.Discard, r)
	if err == nil && n > 0 {
		err = errSize
	}
	return err
}
