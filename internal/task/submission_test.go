package task

import (
	"bytes"
	"strings"
	"testing"
)

func TestReadSubmission(t *testing.T) {
	found := Submission{AppServerID: "n1", TaskID: "t1"}
	for name, test := range map[string]struct {
		body string
		want Submission
	}{
		"flat":                 {`{"state":"SUCCESS","appServerID":"n1","taskID":"t1"}`, found},
		"in the result":        {`{"state":"SUCCESS","appServerID":"n1","result":{"taskID":"t1"}}`, found},
		"a scan's answer":      {`{"state":"success","appServerID":"n1","result":{"scanTasks":[{"taskReference":{"ID":"t1","state":"IN_PROGRESS"}},{"taskReference":{"ID":"t2"}}]}}`, found},
		"deeper":               {`{"appServerID":"n1","result":{"response":{"scanTasks":[{"taskReference":{"ID":"t1"}}]}}}`, found},
		"in another case":      {`{"State":"SUCCESS","appServerId":"n1","taskId":"t1"}`, found},
		"without a state":      {`{"appServerID":"n1","taskID":"t1"}`, found},
		"numbers":              {`{"appServerID":7,"taskID":12345678901234567890}`, Submission{AppServerID: "7", TaskID: "12345678901234567890"}},
		"queued":               {`{"state":"QUEUED","positionInQueue":3}`, Submission{Queued: true}},
		"queued, as a status":  {`{"status":"Queued"}`, Submission{Queued: true}},
		"in progress":          {`{"state":"in_progress"}`, Submission{Queued: true}},
		"queued in the result": {`{"result":{"state":"QUEUED"}}`, Submission{Queued: true}},
		"failed":               {`{"state":"FAILED","appServerID":"n1"}`, Submission{Failed: true}},
		"failed, as a status":  {`{"status":"FAILED"}`, Submission{Failed: true}},
		"as in the manual":     {`{"processTime":1,"fileSize":2,"mediaType":{"string":"text/plain"},"digests":{"SHA-256":"00"},"base64":""}`, Submission{}},
		"an HTTP status":       {`{"status":200}`, Submission{}},
		"no scan":              {`{"appServerID":"n1","scanTasks":[]}`, Submission{}},
		"no node":              {`{"state":"SUCCESS","taskID":"t1"}`, Submission{}},
		"no task":              {`{"state":"SUCCESS","appServerID":"n1"}`, Submission{}},
		"IDs of other types":   {`{"state":1,"appServerID":{},"taskID":[],"scanTasks":[1]}`, Submission{}},
		"an ID that is none":   {`{"appServerID":"n1","taskID":"` + strings.Repeat("a", MaxIDLength+1) + `"}`, Submission{}},
		"nothing":              {`{}`, Submission{}},
		"null":                 {`null`, Submission{}},
		"a list":               {`[]`, Submission{}},
		"HTML":                 {`<html>`, Submission{}},
		"empty":                {``, Submission{}},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := ReadSubmission(strings.NewReader(test.body)); got != test.want || err != nil {
				t.Errorf("got %+v, error %v, want %+v", got, err, test.want)
			}
		})
	}
}

func FuzzSubmission(f *testing.F) {
	f.Add([]byte(`{"state":"SUCCESS","appServerID":"n1","result":{"scanTasks":[{"taskReference":{"ID":"t1"}}]}}`))
	f.Add([]byte(`{"state":"QUEUED","result":{"taskID":"t1","x":{"scanTasks":[]}}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		sub, err := ReadSubmission(bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		named := sub.AppServerID != "" || sub.TaskID != ""
		if named && (!ValidID(sub.AppServerID) || !ValidID(sub.TaskID) || sub.Queued || sub.Failed) {
			t.Errorf("%q became %+v", body, sub)
		}
	})
}
