package task

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

// Damage in memory is not served as a report.
func TestDamageInMemory(t *testing.T) {
	document := `{"result":{"text":"` + strings.Repeat("it is as it was ", 100) + `"}}`
	sound, err := ReadReport(strings.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	stored := sound.Document()
	const header = 10 // a gzip reader ignores a part of it
	for i := header; i < len(stored.Body); i++ {
		changed := stored
		changed.Body = bytes.Clone(stored.Body)
		changed.Body[i] ^= 4
		if inflated, _, err := NewReport(changed).Inflate(); err == nil && string(inflated.Body) != document {
			t.Errorf("byte %d of %d: a change went unnoticed", i, len(stored.Body))
		}
	}
}

func TestRepresentations(t *testing.T) {
	document := []byte(`{"result":{"text":"` + strings.Repeat("again and ", 1000) + `"}}`)
	r, err := ReadReport(bytes.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	if r.inflated.Load() != nil || r.Size() >= len(document)/10 {
		t.Errorf("the report takes %d bytes", r.Size())
	}
	for i, wantMade := range []bool{true, false} {
		inflated, made, err := r.Inflate()
		if err != nil || !bytes.Equal(inflated.Body, document) || made != wantMade {
			t.Errorf("%d: made %v, error %v, %.50q", i, made, err, inflated.Body)
		}
	}
	r.DropInflated()
	if again, made, err := r.Inflate(); err != nil || !made || !bytes.Equal(again.Body, document) {
		t.Errorf("after it was dropped: made %v, error %v", made, err)
	}

	short, err := ReadReport(strings.NewReader(`{"result":{}}`))
	if err != nil {
		t.Fatal(err)
	}
	if short.Gzipped() != nil || short.Size() > 16 {
		t.Errorf("a report that compression does not shrink takes %d bytes", short.Size())
	}
}

func FuzzReport(f *testing.F) {
	f.Add([]byte(`{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"IN_PROGRESS"}]}}`))
	f.Add([]byte(`{"result":{}}`))
	f.Add([]byte(`{"result":{"taskReference":{"state":"\u0053UCCESS"}},"result":null}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		r, err := ReadReport(bytes.NewReader(document))
		valid := json.Valid(document)
		if (err == nil && !valid) || (err != nil && valid && strings.HasPrefix(err.Error(), "it is not JSON,")) {
			t.Fatalf("error %v for %q", err, document)
		}
		if err != nil {
			return
		}
		if inflated, _, err := r.Inflate(); err != nil || !bytes.Equal(inflated.Body, document) {
			t.Errorf("%q became %q, error %v", document, inflated.Body, err)
		}
	})
}
