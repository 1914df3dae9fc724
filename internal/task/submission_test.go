package task

import (
	"bytes"
	"testing"
)

func FuzzSubmission(f *testing.F) {
	f.Add([]byte(`{"state":"SUCCESS","appServerID":"n1","result":{"scanTasks":[{"taskReference":{"ID":"t1"}}]}}`))
	f.Add([]byte(`{"state":"QUEUED","result":{"taskID":"t1","x":{"scanTasks":[]}}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		sub, err := ReadSubmission(bytes.NewReader(body))
		if err == nil && !sub.Queued() && (!ValidID(sub.AppServerID()) || !ValidID(sub.TaskID())) {
			t.Errorf("%q became %+v", body, sub)
		}
	})
}
