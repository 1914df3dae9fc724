package backend

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// SubmitResultMode is a form of the answer to /submit-result. The product's documentation tells in words what it holds,
// but no field names, so each form is a guess or worse.
type SubmitResultMode string

// The modes.
const (
	// SubmitResultIDs has the submission's state, the node, the node's status and the node's answer, which names the
	// task; also what SubmitResultManual has. IDs are strings. It is the default.
	SubmitResultIDs SubmitResultMode = "ids"

	// SubmitResultNumbers is SubmitResultIDs with every ID that is a number written as one. Give the nodes numbers as
	// application server IDs, and set NumericIDs.
	SubmitResultNumbers SubmitResultMode = "numbers"

	// SubmitResultManual is what the manual shows by mistake, the example of /file: processTime, fileSize, mediaType and
	// digests. It holds neither a state nor an ID, and is the same for a submission that is queued or has failed.
	SubmitResultManual SubmitResultMode = "manual"

	// SubmitResultAbsent answers 404, as a broker without the endpoint does.
	SubmitResultAbsent SubmitResultMode = "absent"
)

// ParseSubmitResultMode reads the name of a mode.
func ParseSubmitResultMode(name string) (SubmitResultMode, error) {
	modes := []SubmitResultMode{SubmitResultIDs, SubmitResultNumbers, SubmitResultManual, SubmitResultAbsent}
	mode := SubmitResultMode(name)
	if !slices.Contains(modes, mode) {
		return "", fmt.Errorf("unknown mode of /submit-result %q: expected ids, numbers, manual or absent", name)
	}
	return mode, nil
}

// submitResult answers with the state of a submission, as SubmitResult says.
func (b *Broker) submitResult(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	if b.SubmitResult == SubmitResultAbsent {
		http.NotFound(w, r)
		return
	}
	id := r.URL.Query().Get("submitID")
	if id == "" {
		http.Error(w, "submitID is missing", http.StatusBadRequest)
		return
	}
	sub, ok := b.submission(id)
	if !ok {
		http.Error(w, "there is no such submission", http.StatusNotFound)
		return
	}
	switch b.SubmitResult {
	case SubmitResultManual:
		writeJSON(w, map[string]any{
			"processTime": time.Since(start).Milliseconds(),
			"fileSize":    sub.FileSize,
			"mediaType":   sub.MediaType,
			"digests":     sub.Digests,
		})
	case SubmitResultNumbers:
		document, err := withNumericIDs(sub)
		if err != nil {
			http.Error(w, "the result cannot be written", http.StatusInternalServerError)
			return
		}
		writeJSON(w, document)
	default:
		writeJSON(w, sub)
	}
}

// withNumericIDs returns the document with every ID that is a number written as one. A field is an ID if its name ends
// with "ID".
func withNumericIDs(document any) (any, error) {
	text, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	numericIDs(value)
	return value, nil
}

func numericIDs(value any) {
	switch value := value.(type) {
	case []any:
		for _, element := range value {
			numericIDs(element)
		}
	case map[string]any:
		for name, field := range value {
			id, ok := field.(string)
			if !ok || !strings.HasSuffix(name, "ID") {
				numericIDs(field)
				continue
			}
			if number, err := strconv.ParseUint(id, 10, 64); err == nil && strconv.FormatUint(number, 10) == id {
				value[name] = json.Number(id)
			}
		}
	}
}
