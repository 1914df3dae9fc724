package harvest

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"time"
)

// ID identifies a target: a submission, or a node and its task.
type ID struct {
	SubmitID    string `json:"submit_id,omitempty"`
	AppServerID string `json:"node,omitempty"`
	TaskID      string `json:"task_id,omitempty"`
}

// String returns the ID as it is shown to people.
func (id ID) String() string {
	if id.SubmitID != "" {
		return id.SubmitID
	}
	return path.Join(id.AppServerID, id.TaskID)
}

// Target is what is followed.
type Target struct {
	ID
	Client string `json:"client,omitempty"` // that has submitted it, or asked for it
	SHA256 string `json:"sha256,omitempty"` // of the file, hexadecimal
	Name   string `json:"name,omitempty"`   // of the file

	// Known reports whether an upstream is known to have it.
	Known bool `json:"known,omitempty"`

	// Told reports whether Source.Finished has returned.
	Told bool `json:"told,omitempty"`

	// Accepted is when it was submitted, or first asked for.
	Accepted time.Time `json:"accepted"`
}

// maxNoteSize is the size of the content of a note from which on another note is begun, in bytes. Some storages allow values
// of 512 KiB only.
const maxNoteSize = 256 << 10

// encodeTargets returns targets as the contents of notes, usually of one.
func encodeTargets(targets []Target) [][]byte {
	var pages [][]byte
	page := []byte("[")
	for _, t := range targets {
		text, err := json.Marshal(t)
		if err != nil {
			continue // a time that JSON cannot express
		}
		if len(page)+len(text) > maxNoteSize && len(page) > 1 {
			pages = append(pages, append(page, ']'))
			page = []byte("[")
		}
		if len(page) > 1 {
			page = append(page, ',')
		}
		page = append(page, text...)
	}
	return append(pages, append(page, ']'))
}

// decodeTargets reads the content of a note.
func decodeTargets(note []byte) ([]Target, error) {
	var targets []Target
	if err := json.Unmarshal(note, &targets); err != nil {
		return nil, fmt.Errorf("reading the note: %w", err)
	}
	for _, t := range targets {
		if (t.SubmitID == "") == (t.AppServerID == "" || t.TaskID == "") {
			return nil, errors.New("reading the note: a target has no ID")
		}
	}
	return targets, nil
}
