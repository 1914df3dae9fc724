package task

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// unbounded lets a document take the memory that it needs.
func unbounded(int64) error { return nil }

// Damage in memory is not served as a report.
func TestDamageInMemory(t *testing.T) {
	document := `{"result":{"text":"` + strings.Repeat("it is as it was ", 100) + `"}}`
	sound, err := ReadReport(strings.NewReader(document), unbounded)
	if err != nil {
		t.Fatal(err)
	}
	stored := sound.Document()
	const header = 10 // a gzip reader ignores a part of it
	for i := header; i < len(stored.Body); i++ {
		changed := stored
		changed.Body = bytes.Clone(stored.Body)
		changed.Body[i] ^= 4
		damaged := NewReport(changed)
		if inflated, err := damaged.Inflate(); err == nil && string(inflated.Body) != document {
			t.Errorf("byte %d of %d: a change went unnoticed", i, len(stored.Body))
		} else if err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("byte %d: %v", i, err)
		}
		var written bytes.Buffer
		if err := damaged.WriteInflated(&written); err == nil && written.String() != document {
			t.Errorf("byte %d of %d: a change was written", i, len(stored.Body))
		}
	}
}

func TestRepresentations(t *testing.T) {
	document := []byte(`{"result":{"text":"` + strings.Repeat("again and ", 20_000) + `"}}`)
	r, err := ReadReport(bytes.NewReader(document), unbounded)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Gzipped() || r.Size() >= len(document)/10 || r.Length() != len(document) {
		t.Errorf("the report takes %d bytes", r.Size())
	}
	inflated, err := r.Inflate()
	if err != nil || !bytes.Equal(inflated.Body, document) {
		t.Errorf("error %v, %.50q", err, inflated.Body)
	}
	if described := r.Inflated(); described.ETag != inflated.ETag || described.Length != inflated.Length || described.ETag == r.Representation().ETag {
		t.Errorf("described as %+v", described)
	}
	var pieces bytes.Buffer
	if err := r.WriteInflated(&pieces); err != nil || !bytes.Equal(pieces.Bytes(), document) {
		t.Errorf("in pieces: error %v, %d bytes", err, pieces.Len())
	}

	short, err := ReadReport(strings.NewReader(`{"result":{}}`), unbounded)
	if err != nil {
		t.Fatal(err)
	}
	if short.Gzipped() || short.Size() > 16 {
		t.Errorf("a report that compression does not shrink takes %d bytes", short.Size())
	}
}

func TestRenew(t *testing.T) {
	read := func(document string) *Report {
		r, err := ReadReport(strings.NewReader(document), unbounded)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	first, again, other := read(`{"result":{}}`), read(`{"result":{}}`), read(`{"result":{} }`)
	later := time.Now().Add(time.Hour)
	again.at.Store(later.UnixNano())
	if !first.Renew(again) || !first.At().Equal(time.Unix(0, later.UnixNano())) {
		t.Errorf("the same document does not renew the report, which is of %s", first.At())
	}
	if first.Renew(other) || NothingYet(later).Renew(NothingYet(later)) {
		t.Error("another document renews the report")
	}
	if at := NothingYet(later).At(); !at.Equal(later) {
		t.Errorf("nothing yet is of %s, want %s", at, later)
	}
}

// A document that is not as long as it says is damaged.
func TestLengthOfAReport(t *testing.T) {
	sound, err := ReadReport(strings.NewReader(`{"result":{"text":"`+strings.Repeat("it is as it was ", 10_000)+`"}}`), unbounded)
	if err != nil {
		t.Fatal(err)
	}
	for _, length := range []int{sound.Length() - 1, sound.Length() + 1, 1} {
		d := sound.Document()
		d.Length = length
		r := NewReport(d)
		if _, err := r.Inflate(); !errors.Is(err, ErrDamaged) || errors.Is(err, ErrLength) != (length < sound.Length()) {
			t.Errorf("%d of %d bytes: error %v", length, sound.Length(), err)
		}
		if err := r.WriteInflated(io.Discard); !errors.Is(err, ErrDamaged) {
			t.Errorf("%d of %d bytes, in pieces: error %v", length, sound.Length(), err)
		}
	}
}

// A document that is large takes the memory of its compressed form and of the compressor, and can be refused any of it.
func TestReadReportIsBounded(t *testing.T) {
	errFull := errors.New("full")
	digits := make([]byte, 3<<20)
	for i := range digits {
		digits[i] = "0123456789abcdef"[(i*i/7+i)%16]
	}
	document := `{"result":{"text":"` + string(digits) + `"}}`
	for _, limit := range []int64{0, SmallDocument, SmallDocument + EncoderMemory, SmallDocument + EncoderMemory + 8<<10} {
		_, err := ReadReport(strings.NewReader(document), func(held int64) error {
			if held > limit {
				return errFull
			}
			return nil
		})
		if !errors.Is(err, errFull) {
			t.Errorf("%d bytes: %v", limit, err)
		}
	}
	if _, err := ReadReport(strings.NewReader(`{"result":{"text":"`+string(digits[:60<<10])+`"}}`), func(held int64) error {
		if held > SmallDocument {
			return errFull
		}
		return nil
	}); err != nil {
		t.Errorf("a small document: %v", err)
	}
}

func FuzzReport(f *testing.F) {
	f.Add([]byte(`{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"IN_PROGRESS"}]}}`))
	f.Add([]byte(`{"result":{}}`))
	f.Add([]byte(`{"result":{"taskReference":{"state":"\u0053UCCESS"}},"result":null}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		r, err := ReadReport(bytes.NewReader(document), unbounded)
		valid := json.Valid(document)
		if (err == nil && !valid) || (err != nil && valid && strings.HasPrefix(err.Error(), "it is not JSON,")) {
			t.Fatalf("error %v for %q", err, document)
		}
		if err != nil {
			return
		}
		body := r.Representation().Body
		if r.Gzipped() {
			inflated, err := r.Inflate()
			if err != nil {
				t.Fatal(err)
			}
			body = inflated.Body
		}
		if !bytes.Equal(body, document) {
			t.Errorf("%q became %q", document, body)
		}
	})
}
