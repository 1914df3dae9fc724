package task

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"io"
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
			for _, document := range []io.Reader{strings.NewReader(test.document), bytes.NewBufferString(test.document)} {
				j, err := judge(document)
				if j.finished != test.finished {
					t.Errorf("%T: finished: %v, want %v", document, j.finished, test.finished)
				}
				if (err == nil) != (test.err == "") || (err != nil && err.Error() != test.err) {
					t.Errorf("%T: error %v, want %q", document, err, test.err)
				}
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
		if j, err := judge(bytes.NewReader(document)); !j.finished || j.file == ([sha256.Size]byte{}) || err != nil {
			t.Errorf("%s: %+v, error %v", name, j, err)
		}
		if j, err := judge(bytes.NewReader(withSubtaskInProgress(t, document))); j.finished || err != nil {
			t.Errorf("%s with a subtask in progress: %+v, error %v", name, j, err)
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

// The file is known if the task's own reference has its sum, and nothing contradicts it.
func TestJudgeFile(t *testing.T) {
	const sum, other = "02595a43f63a1ed021c2d6ea1fd7086565caa1088ca06f46df3bc2f56308f999", "b280719e9f2dd010260e6a023e0d69c64fbee8b6cbb8669c722a1da8142d3325"
	info := func(text string) string {
		return `{"result":{"taskReference":{"additionalInfo":` + text + `,"state":"SUCCESS"}}}`
	}
	digests := func(text string) string { return info(`{"digests":` + text + `}`) }
	escaped := strings.ReplaceAll(sum, "0", `\u0030`)
	for name, test := range map[string]struct {
		document string
		known    bool
	}{
		"as in reports":         {info(`{"submitName":"a.png","submitTime":1,"digests":{"SHA-256":"` + sum + `"}}`), true},
		"upper case":            {digests(`{"SHA-256":"` + strings.ToUpper(sum) + `"}`), true},
		"beside other digests":  {digests(`{"MD5":"00","SHA-256":"` + sum + `","SHA-512":{"a":[1]}}`), true},
		"escaped":               {digests(`{"\u0053HA-256":"` + escaped + `"}`), true},
		"twice the same":        {digests(`{"SHA-256":"` + sum + `","SHA-256":"` + strings.ToUpper(sum) + `"}`), true},
		"twice":                 {digests(`{"SHA-256":"` + sum + `","SHA-256":"` + other + `"}`), false},
		"one of two is no sum":  {digests(`{"SHA-256":"` + sum + `","SHA-256":null}`), false},
		"no sum, then a sum":    {digests(`{"SHA-256":"","SHA-256":"` + sum + `"}`), false},
		"three, two of them":    {digests(`{"SHA-256":"` + sum + `","SHA-256":"` + other + `","SHA-256":"` + other + `"}`), false},
		"two digests":           {info(`{"digests":{"SHA-256":"` + sum + `"},"digests":{"SHA-256":"` + other + `"}}`), false},
		"two references":        {`{"result":{"taskReference":{"additionalInfo":{"digests":{"SHA-256":"` + sum + `"}}},"taskReference":{"additionalInfo":{"digests":{"SHA-256":"` + other + `"}}}}}`, false},
		"two results, one sum":  {`{"result":{"taskReference":{"additionalInfo":{"digests":{"SHA-256":"` + sum + `"}}}},"result":{}}`, true},
		"short":                 {digests(`{"SHA-256":"` + sum[1:] + `"}`), false},
		"long":                  {digests(`{"SHA-256":"` + sum + `00"}`), false},
		"very long":             {digests(`{"SHA-256":"` + strings.Repeat(sum, 100) + `"}`), false},
		"no digits":             {digests(`{"SHA-256":"` + strings.Repeat("x", 64) + `"}`), false},
		"a number":              {digests(`{"SHA-256":1}`), false},
		"an object":             {digests(`{"SHA-256":{"SHA-256":"` + sum + `"}}`), false},
		"another name":          {digests(`{"sha256":"` + sum + `"}`), false},
		"digests are a list":    {digests(`["` + sum + `"]`), false},
		"information is a text": {info(`"FILE_HASH_SHA256"`), false},
		"information is null":   {info(`null`), false},
		"of a subtask":          {`{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":[{"state":"SUCCESS","additionalInfo":{"digests":{"SHA-256":"` + sum + `"}}}]}}`, false},
		"elsewhere":             {`{"digests":{"SHA-256":"` + sum + `"},"result":{"taskReference":{"state":"SUCCESS","digests":{"SHA-256":"` + sum + `"}}}}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			want := [sha256.Size]byte{}
			if test.known {
				_, _ = hex.Decode(want[:], []byte(sum))
			}
			for _, document := range []io.Reader{strings.NewReader(test.document), &shortener{src: strings.NewReader(test.document)}} {
				if j, err := judge(document); err != nil || j.file != want {
					t.Errorf("%x, error %v, want %x", j.file, err, want)
				}
			}
			r, err := ReadReport(strings.NewReader(test.document), unbounded)
			if err != nil || r.File() != want || NewReport(r.Document()).File() != want {
				t.Errorf("the report has another file, error %v", err)
			}
			large := strings.TrimSuffix(test.document, "}") + `,"text":"` + strings.Repeat("long ", SmallDocument) + `"}`
			if r, err = ReadReport(strings.NewReader(large), unbounded); err != nil || r.File() != want {
				t.Errorf("a large report has another file, error %v", err)
			}
		})
	}
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
				if j, err := judge(strings.NewReader(document)); !j.finished || err != nil {
					b.Fatal(j, err)
				}
			}
		})
	}
}
