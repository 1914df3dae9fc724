package fsbroker

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What has changed in memory is not taken for a report.
func TestDamageInMemory(t *testing.T) {
	document := `{"result":{"text":"` + strings.Repeat("it is as it was ", 100) + `"}}`
	sound, err := readReport(strings.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	body := sound.gzipped.Load().body
	const header = 10 // of which a reader ignores some
	for i := header; i < len(body); i++ {
		changed := bytes.Clone(body)
		changed[i] ^= 4
		r := &report{hash: sound.hash, plainSize: sound.plainSize}
		r.gzipped.Store(r.gzippedForm(changed))
		if plain, _, err := r.inflated(); err == nil && string(plain.body) != document {
			t.Errorf("byte %d of %d: a change went unnoticed", i, len(body))
		}
	}
}

func TestJudge(t *testing.T) {
	for name, test := range map[string]struct {
		document string
		finished bool
		err      string
	}{
		"success":                      {`{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"SUCCESS"}]}}`, true, ""},
		"partial success":              {`{"result":{"taskReference":{"state":"SUCCESS_PARTIAL"}}}`, true, ""},
		"failed":                       {`{"result":{"taskReference":{"state":"FAILED"},"subtaskReferences":[{"state":"FAILED"}]}}`, true, ""},
		"any other word":               {`{"result":{"taskReference":{"state":"ABANDONED"}}}`, true, ""},
		"lower case":                   {`{"result":{"taskReference":{"state":"success"},"subtaskReferences":[{"state":"failed"}]}}`, true, ""},
		"queued":                       {`{"result":{"taskReference":{"state":"QUEUED"}}}`, false, ""},
		"in progress":                  {`{"result":{"taskReference":{"state":"IN_PROGRESS"}}}`, false, ""},
		"in progress, lower case":      {`{"result":{"taskReference":{"state":"in_progress"}}}`, false, ""},
		"a subtask in progress":        {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"SUCCESS"},{"state":"IN_PROGRESS"}]}}`, false, ""},
		"a subtask queued":             {`{"result":{"subtaskReferences":[{"state":"queued"}],"taskReference":{"state":"SUCCESS"}}}`, false, ""},
		"a subtask without a state":    {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{}]}}`, false, ""},
		"no state":                     {`{"result":{"taskReference":{"ID":"1"}}}`, false, ""},
		"an empty state":               {`{"result":{"taskReference":{"state":""}}}`, false, ""},
		"a state that is no string":    {`{"result":{"taskReference":{"state":{"a":1}}}}`, false, ""},
		"no task":                      {`{"result":{"verdict":"x"}}`, true, ""},
		"null for a task":              {`{"result":{"taskReference":null}}`, true, ""},
		"no task, a subtask":           {`{"result":{"subtaskReferences":[{"state":"IN_PROGRESS"}]}}`, true, ""},
		"null for subtasks":            {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":null}}`, true, ""},
		"stale states further down":    {`{"result":{"taskReference":{"state":"SUCCESS"},"resources":{"a":{"additionalTasks":[{"state":"IN_PROGRESS"}]}}}}`, true, ""},
		"a state elsewhere":            {`{"state":"IN_PROGRESS","taskReference":{"state":"QUEUED"},"result":{"state":"QUEUED","taskReference":{"state":"SUCCESS","sub":{"state":"QUEUED"}}}}`, true, ""},
		"white space":                  {" \n{ \"result\" : { \"taskReference\" : { \"state\" : \"SUCCESS\" } } } \n", true, ""},
		"empty":                        {"", false, "it is empty"},
		"not JSON":                     {"<html>", false, "it is not JSON, or not all of it came (byte 0)"},
		"half":                         {`{"result":{"taskRef`, false, "it is not JSON, or not all of it came (byte 19)"},
		"more than one":                {`{"result":{}}{}`, false, "more than one JSON value came (byte 14)"},
		"more than one, the next bad":  {`{"result":{}}x`, false, "it is not JSON, or not all of it came (byte 13)"},
		"a list":                       {`[]`, false, "it is not a JSON object"},
		"a string":                     {`"hush"`, false, "it is not a JSON object"},
		"null":                         {`null`, false, "it is not a JSON object"},
		"no result":                    {`{"processTime":1}`, false, "it has no result"},
		"null for a result":            {`{"result":null}`, false, "it has no result"},
		"a result that is no object":   {`{"result":"hush"}`, false, "its result has another JSON type than expected"},
		"a task that is no object":     {`{"result":{"taskReference":"hush"}}`, false, "its result.taskReference has another JSON type than expected"},
		"subtasks that are no objects": {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":["hush"]}}`, false, "its result.subtaskReferences has another JSON type than expected"},
	} {
		t.Run(name, func(t *testing.T) {
			finished, err := judge(strings.NewReader(test.document))
			if finished != test.finished {
				t.Errorf("finished: %v, want %v", finished, test.finished)
			}
			if (err == nil) != (test.err == "") || (err != nil && err.Error() != test.err) {
				t.Errorf("error %v, want %q", err, test.err)
			}
		})
	}
}

var reportsDir = flag.String("reports", filepath.Join("..", "shared", "reports"), "a folder of real, finished reports (*.json) to judge")

func TestJudgeRealReports(t *testing.T) {
	names, err := filepath.Glob(filepath.Join(*reportsDir, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(names) == 0 {
		t.Skip("no real reports here; name a folder with -reports")
	}
	for _, name := range names {
		document, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(document, []byte(`"IN_PROGRESS"`)) {
			t.Errorf("%s holds no stale state, and so proves less than it should", name)
		}
		if finished, err := judge(bytes.NewReader(document)); !finished || err != nil {
			t.Errorf("%s: finished: %v, error %v", name, finished, err)
		}
		if finished, err := judge(bytes.NewReader(withSubtaskInProgress(t, document))); finished || err != nil {
			t.Errorf("%s with a subtask in progress: finished: %v, error %v", name, finished, err)
		}
	}
}

func withSubtaskInProgress(t *testing.T, document []byte) []byte {
	t.Helper()
	var d map[string]any
	if err := json.Unmarshal(document, &d); err != nil {
		t.Fatal(err)
	}
	subtasks := d["result"].(map[string]any)["subtaskReferences"].([]any)
	subtasks[len(subtasks)-1].(map[string]any)["state"] = "IN_PROGRESS"
	changed, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

func TestReportForms(t *testing.T) {
	document := []byte(`{"result":{"text":"` + strings.Repeat("again and ", 1000) + `"}}`)
	r, err := readReport(bytes.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	if r.plain.Load() != nil || r.size() >= len(document)/10 {
		t.Errorf("the report takes %d bytes", r.size())
	}
	for i, wantMade := range []bool{true, false} {
		plain, made, err := r.inflated()
		if err != nil || !bytes.Equal(plain.body, document) || made != wantMade {
			t.Errorf("%d: made %v, error %v, %.50q", i, made, err, plain.body)
		}
	}

	short, err := readReport(strings.NewReader(`{"result":{}}`))
	if err != nil {
		t.Fatal(err)
	}
	if short.gzipped.Load() != nil || short.size() > 16 {
		t.Errorf("a report that does not shrink takes %d bytes", short.size())
	}
}

func FuzzReport(f *testing.F) {
	f.Add([]byte(`{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"IN_PROGRESS"}]}}`))
	f.Add([]byte(`{"result":{}}`))
	f.Add([]byte(`{"result":{"taskReference":{"state":"\u0053UCCESS"}},"result":null}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		r, err := readReport(bytes.NewReader(document))
		valid := json.Valid(document)
		if (err == nil && !valid) || (err != nil && valid && strings.HasPrefix(err.Error(), "it is not JSON")) {
			t.Fatalf("error %v for %q", err, document)
		}
		if err != nil {
			return
		}
		if plain, _, err := r.inflated(); err != nil || !bytes.Equal(plain.body, document) {
			t.Errorf("%q became %q, error %v", document, plain.body, err)
		}
	})
}

func FuzzSubmission(f *testing.F) {
	f.Add([]byte(`{"state":"SUCCESS","appServerID":"n1","result":{"scanTasks":[{"taskReference":{"ID":"t1"}}]}}`))
	f.Add([]byte(`{"state":"QUEUED","result":{"taskID":"t1","x":{"scanTasks":[]}}}`))
	broker := &peer{role: "broker"}
	f.Fuzz(func(t *testing.T, body []byte) {
		sub, err := broker.readSubmission(bytes.NewReader(body))
		if err == nil && !sub.queued && (!validID(sub.appServerID) || !validID(sub.taskID)) {
			t.Errorf("%q became %+v", body, sub)
		}
	})
}
