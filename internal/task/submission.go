package task

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"time"
)

// Submission is what became of a submission: it is queued, or it is a task of a node.
type Submission struct {
	at          time.Time
	appServerID string
	taskID      string
}

// NewSubmission returns a submission that became a task of a node.
func NewSubmission(at time.Time, appServerID, taskID string) *Submission {
	return &Submission{at: at, appServerID: appServerID, taskID: taskID}
}

// QueuedSubmission returns a submission that no node has yet.
func QueuedSubmission(at time.Time) *Submission { return &Submission{at: at} }

// At implements Value.
func (s *Submission) At() time.Time { return s.at }

// Size implements Value.
func (s *Submission) Size() int { return len(s.appServerID) + len(s.taskID) }

// Queued reports whether no node has the submission yet.
func (s *Submission) Queued() bool { return s.taskID == "" }

// AppServerID returns the node that has the submission. It is empty while the submission is queued.
func (s *Submission) AppServerID() string { return s.appServerID }

// TaskID returns the submission's task. It is empty while the submission is queued.
func (s *Submission) TaskID() string { return s.taskID }

// ErrSubmissionFailed means that the broker could not give a submission to a node. That is final.
var ErrSubmissionFailed = errors.New("the submission failed")

// ReadSubmission reads the broker's answer about a submission. Its exact form is not documented, so each fact is looked
// for in every place where brokers are known or likely to have it. The error says why the answer cannot be used and shows
// nothing of it.
func ReadSubmission(body io.Reader) (*Submission, error) {
	text, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	var doc object
	if err := json.Unmarshal(text, &doc); err != nil || doc == nil {
		return nil, errors.New("it is not a JSON object")
	}
	result := doc.object("result")
	s := state(cmp.Or(doc.id("state"), result.id("state")))
	if strings.EqualFold(string(s), "FAILED") {
		return nil, ErrSubmissionFailed
	}
	if s != "" && !s.finished() {
		return QueuedSubmission(time.Now()), nil
	}
	appServerID := cmp.Or(doc.id("appServerID"), result.id("appServerID"))
	taskID := cmp.Or(doc.id("taskID"), result.id("taskID"), scanTaskID(doc))
	switch {
	case !ValidID(appServerID):
		return nil, errors.New("it names no node: appServerID is missing or is not an ID")
	case !ValidID(taskID):
		return nil, errors.New("it names no task: there is no ID at taskID, result.taskID or scanTasks[0].taskReference.ID")
	}
	return NewSubmission(time.Now(), appServerID, taskID), nil
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

// id returns a member that is a string, or an empty string.
func (o object) id(name string) string {
	s, _ := o.member(name).(string)
	return s
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
