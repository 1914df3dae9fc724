package task

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

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
		"in progress, with a space":    {`{"result":{"taskReference":{"state":"In Progress"}}}`, false, ""},
		"in progress, with a dash":     {`{"result":{"taskReference":{"state":"in-progress"}}}`, false, ""},
		"in progress, amid space":      {`{"result":{"taskReference":{"state":" \tIN_PROGRESS\n"}}}`, false, ""},
		"in queue, with a space":       {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"In queue "}]}}`, false, ""},
		"success, with a dash":         {`{"result":{"taskReference":{"state":"success-partial"}}}`, true, ""},
		"nothing but space":            {`{"result":{"taskReference":{"state":"  "}}}`, false, ""},
		"null for a subtask":           {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[null,{"state":"SUCCESS"}]}}`, true, ""},
		"null beside one in progress":  {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[null,{"state":"IN_PROGRESS"}]}}`, false, ""},
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
		"not JSON":                     {"<html>", false, "it is not JSON, or it is incomplete (byte 0)"},
		"half":                         {`{"result":{"taskRef`, false, "it is not JSON, or it is incomplete (byte 19)"},
		"more than one":                {`{"result":{}}{}`, false, "it is more than one JSON value (byte 14)"},
		"more than one, the next bad":  {`{"result":{}}x`, false, "it is not JSON, or it is incomplete (byte 13)"},
		"a list":                       {`[]`, false, "it is not a JSON object"},
		"a string":                     {`"hush"`, false, "it is not a JSON object"},
		"null":                         {`null`, false, "it is not a JSON object"},
		"no result":                    {`{"processTime":1}`, false, "it has no result"},
		"null for a result":            {`{"result":null}`, false, "it has no result"},
		"a result that is no object":   {`{"result":"hush"}`, false, "its result has an unexpected JSON type"},
		"a task that is no object":     {`{"result":{"taskReference":"hush"}}`, false, "its result.taskReference has an unexpected JSON type"},
		"subtasks that are no objects": {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":["hush"]}}`, false, "its result.subtaskReferences has an unexpected JSON type"},
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

var reportsDir = flag.String("reports", filepath.Join("..", "..", "..", "shared", "reports"), "folder of real, finished reports (*.json) to judge")

func TestJudgeRealReports(t *testing.T) {
	names, err := filepath.Glob(filepath.Join(*reportsDir, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(names) == 0 {
		t.Skip("there are no real reports here: name a folder with -reports")
	}
	for _, name := range names {
		document, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(document, []byte(`"IN_PROGRESS"`)) {
			t.Errorf("%s holds no stale state, so it does not test what it should", name)
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

func BenchmarkJudge(b *testing.B) {
	for _, size := range []int{15 << 10, 2 << 20} {
		var text strings.Builder
		text.WriteString(`{"result":{"taskReference":{"state":"SUCCESS"},"resources":[`)
		for text.Len() < size {
			text.WriteString(`{"resource":"0123456789abcdef","type":"FILE_HASH_SHA256","verdict":"INFORMATIONAL","threatLevel":0.1},`)
		}
		text.WriteString(`{}]}}`)
		document := text.String()
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			b.SetBytes(int64(len(document)))
			b.ReportAllocs()
			for b.Loop() {
				if finished, err := judge(strings.NewReader(document)); !finished || err != nil {
					b.Fatal(finished, err)
				}
			}
		})
	}
}
