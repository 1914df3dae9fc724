package task

import (
	"bytes"
	"cmp"
	"encoding/json"
	"io"
	"strings"
)

// Submission is what a broker's /submit-result says about a submission. The zero value says nothing.
type Submission struct {
	Queued bool // no node has it yet
	Failed bool // no node will have it

	// The node and the task, if the answer names both.
	AppServerID, TaskID string
}

// ReadSubmission reads what a broker says about a submission. The documentation shows the JSON of another endpoint, so
// each fact is looked for in every place where brokers are known or likely to have it. What cannot be read says nothing.
// An error is an error of body.
func ReadSubmission(body io.Reader) (Submission, error) {
	text, err := io.ReadAll(body)
	if err != nil {
		return Submission{}, err
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var doc object
	if err := decoder.Decode(&doc); err != nil {
		return Submission{}, nil //nolint:nilerr // it says nothing
	}
	result := doc.object("result")
	s := state(cmp.Or(doc.id("state"), result.id("state")))
	if s == "" {
		s = state(cmp.Or(doc.id("status"), result.id("status"))) // in the manual's words: QUEUED, FAILED, SUCCESS
	}
	if s.normal() == "FAILED" {
		return Submission{Failed: true}, nil
	}
	if s != "" && !s.finished() {
		return Submission{Queued: true}, nil
	}
	sub := Submission{
		AppServerID: cmp.Or(doc.id("appServerID"), result.id("appServerID")),
		TaskID:      cmp.Or(doc.id("taskID"), result.id("taskID"), scanTaskID(doc)),
	}
	if !ValidID(sub.AppServerID) || !ValidID(sub.TaskID) {
		return Submission{}, nil
	}
	return sub, nil
}

// object is a JSON object of an undocumented form. A nil object has no members.
type object map[string]any

// member returns the member of that name, in any case.
func (o object) member(name string) any {
	if v, ok := o[name]; ok {
		return v
	}
	for k, v := range o {
		if strings.EqualFold(k, name) {
			return v
		}
	}
	return nil
}

func (o object) object(name string) object {
	child, _ := o.member(name).(map[string]any)
	return child
}

// id returns a member that is a string or a number, or an empty string.
func (o object) id(name string) string {
	switch v := o.member(name).(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	}
	return ""
}

// scanTaskID returns scanTasks[0].taskReference.ID, however deep the scanTasks are.
func scanTaskID(o object) string {
	if tasks, ok := o.member("scanTasks").([]any); ok && len(tasks) > 0 {
		first, _ := tasks[0].(map[string]any)
		return object(first).object("taskReference").id("ID")
	}
	for _, v := range o {
		if child, ok := v.(map[string]any); ok {
			if id := scanTaskID(child); id != "" {
				return id
			}
		}
	}
	return ""
}
