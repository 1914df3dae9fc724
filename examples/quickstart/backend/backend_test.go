package backend

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAnalyse(t *testing.T) {
	wide := "M\x00o\x00z\x00i\x00l\x00l\x00a\x00"
	a := Analyse([]byte("see http://example.com/a?b=c and HTTPS://example.org:8443/x\x00\x01" + wide + "\xff\xfeshort\x00"))
	if a.Digests["MD5"] == "" || len(a.Digests["SHA-1"]) != 40 || len(a.Digests["SHA-256"]) != 64 || len(a.Digests["SHA-512"]) != 128 {
		t.Errorf("digests: %v", a.Digests)
	}
	if want := []string{"see http://example.com/a?b=c and HTTPS://example.org:8443/x", "Mozilla"}; !slices.Equal(a.Strings, want) {
		t.Errorf("strings: %q, want %q", a.Strings, want)
	}
	if want := []string{"http://example.com/a?b=c", "HTTPS://example.org:8443/x"}; !slices.Equal(a.URLs, want) {
		t.Errorf("URLs: %q, want %q", a.URLs, want)
	}
	if want := []string{"example.com", "example.org"}; !slices.Equal(a.Domains, want) {
		t.Errorf("domains: %q, want %q", a.Domains, want)
	}

	if empty := Analyse(nil); empty.Entropy != 0 || empty.Executable != nil || empty.Digests["MD5"] != "d41d8cd98f00b204e9800998ecf8427e" {
		t.Errorf("an empty file: %+v", empty)
	}
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	if got := Analyse(bytes.Repeat(every, 10)).Entropy; got != 8 {
		t.Errorf("every byte as often as any other has an entropy of %v", got)
	}
	if got := len(Analyse(bytes.Repeat([]byte("abcdefgh\x00"), 1)).Strings); got != 1 {
		t.Errorf("%d strings", got)
	}
}

func TestAnalyseOwnProgram(t *testing.T) {
	name, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"linux": "ELF", "freebsd": "ELF", "darwin": "Mach-O", "windows": "PE"}[runtime.GOOS]
	exe := Analyse(file).Executable
	if exe == nil || exe.Format != want || len(exe.Sections) < 3 || exe.Machine == "" {
		t.Fatalf("a program of %s is %+v", runtime.GOOS, exe)
	}
	var code bool
	for _, s := range exe.Sections {
		code = code || (strings.Contains(s.Name, "text") && s.Entropy > 4)
	}
	if !code {
		t.Errorf("no code in %+v", exe.Sections)
	}
	if got := Analyse(file); len(got.Strings) != maxStrings {
		t.Errorf("%d strings, want as many as there may be", len(got.Strings))
	}
}

func TestExecutableHeaders(t *testing.T) {
	for want, file := range map[string][]byte{"PE": smallPE(), "Mach-O": smallMachO()} {
		if exe := readExecutable(file); exe == nil || exe.Format != want {
			t.Errorf("%s: %+v", want, exe)
		}
		for n := range file {
			readExecutable(file[:n]) // whatever it is, it does not do harm
		}
	}
}

// smallPE is a header for a library without sections.
func smallPE() []byte {
	file := make([]byte, 64, 512)
	copy(file, "MZ")
	binary.LittleEndian.PutUint32(file[60:], 64)
	file = append(file, "PE\x00\x00"...)
	coff := make([]byte, 20)
	binary.LittleEndian.PutUint16(coff, 0x8664)
	binary.LittleEndian.PutUint16(coff[18:], 0x2000)
	return append(file, append(coff, make([]byte, 64)...)...)
}

// smallMachO is a header for a program without load commands.
func smallMachO() []byte {
	file := make([]byte, 32)
	binary.LittleEndian.PutUint32(file, 0xfeedfacf)
	binary.LittleEndian.PutUint32(file[4:], 0x01000007)
	binary.LittleEndian.PutUint32(file[12:], 2)
	return file
}

func FuzzAnalyse(f *testing.F) {
	f.Add([]byte("plain text with http://example.com/ in it"))
	f.Add(smallPE())
	f.Add(smallMachO())
	f.Add([]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00\x01\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, file []byte) {
		a := Analyse(file)
		if a.FileSize != len(file) || a.Entropy < 0 || a.Entropy > 8 || len(a.Strings) > maxStrings || len(a.URLs) > maxURLs {
			t.Errorf("%+v", a)
		}
		if _, err := json.Marshal(a); err != nil {
			t.Error(err)
		}
	})
}

// upload is a file as form data.
func upload(t *testing.T, field string, content []byte) (body io.Reader, contentType string) {
	t.Helper()
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	part, err := w.CreateFormFile(field, "sample.txt")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := part.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &form, w.FormDataContentType()
}

func call(t *testing.T, handler http.Handler, method, target string, body io.Reader, contentType string) (status int, answer map[string]any) {
	t.Helper()
	r := httptest.NewRequest(method, target, body)
	r.Header.Set("Content-Type", contentType)
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	if w.Header().Get("Content-Type") == "application/json" {
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
	}
	return w.Code, answer
}

func TestNode(t *testing.T) {
	node := NewNode("hush", 50*time.Millisecond, 50*time.Millisecond)
	for target, want := range map[string]int{
		"/task?taskID=x":               401,
		"/task?taskID=x&secret=wrong":  401,
		"/task?taskID=x&secret=hush":   404,
		"/task?taskID=x&serect=hush":   404,
		"/system-info?serect=hush":     200,
		"/scan?secret=hush":            405,
		"/nothing?secret=hush":         404,
		"/system-info?secret=&serect=": 401,
	} {
		if status, _ := call(t, node, "GET", target, nil, ""); status != want {
			t.Errorf("%s: status %d, want %d", target, status, want)
		}
	}
	if status, _ := call(t, node, "POST", "/scan?secret=hush", strings.NewReader("x"), "text/plain"); status != 400 {
		t.Errorf("no form: status %d", status)
	}
	body, contentType := upload(t, "other", nil)
	if status, _ := call(t, node, "POST", "/scan?secret=hush", body, contentType); status != 400 {
		t.Errorf("no file: status %d", status)
	}
	body, contentType = upload(t, "file", make([]byte, maxFile+1))
	if status, _ := call(t, node, "POST", "/scan?secret=hush", body, contentType); status != 413 {
		t.Errorf("a large file: status %d", status)
	}

	body, contentType = upload(t, "file", []byte("a small text"))
	status, answer := call(t, node, "POST", "/scan?secret=hush", body, contentType)
	if status != 200 {
		t.Fatalf("status %d", status)
	}
	reference := answer["scanTasks"].([]any)[0].(map[string]any)["taskReference"].(map[string]any)
	target := "/task?secret=hush&taskID=" + reference["ID"].(string)
	_, answer = call(t, node, "GET", target, nil, "")
	if got := answer["result"].(map[string]any)["overallState"]; got != "in_progress" {
		t.Errorf("at first it is %v", got)
	}
	eventually(t, func() bool {
		_, answer = call(t, node, "GET", target+"&all=true", nil, "")
		result, ok := answer["result"].(map[string]any)
		return ok && result["overallState"] == "success" && result["resources"] != nil
	})
	eventually(t, func() bool {
		status, _ := call(t, node, "GET", target, nil, "")
		return status == 404
	})
	_, answer = call(t, node, "GET", "/system-info?secret=hush", nil, "")
	if queue := answer["queueInfo"].(map[string]any); queue["activeCount"] != 0.0 || queue["completedCount"] != 1.0 {
		t.Errorf("the queue is %v", queue)
	}
}

func eventually(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited too long")
		}
	}
}

func TestBroker(t *testing.T) {
	node := httptest.NewServer(NewNode("hush", time.Millisecond, time.Minute))
	defer node.Close()
	for name, test := range map[string]struct {
		ref   NodeRef
		state string
	}{
		"a node":             {NodeRef{"node-1", node.URL, "hush"}, "SUCCESS"},
		"one that refuses":   {NodeRef{"node-1", node.URL, "wrong"}, "FAILED"},
		"one that is absent": {NodeRef{"node-1", "http://127.0.0.1:1", "hush"}, "FAILED"},
	} {
		t.Run(name, func(t *testing.T) {
			broker := NewBroker("own", test.ref)
			body, contentType := upload(t, "file", []byte("a small text"))
			status, answer := call(t, broker, "POST", "/submit?secret=own", body, contentType)
			if status != 200 {
				t.Fatalf("status %d", status)
			}
			id := answer["acceptedFiles"].([]any)[0].(map[string]any)["ID"].(string)
			eventually(t, func() bool {
				_, answer = call(t, broker, "GET", "/submit-result?secret=own&submitID="+url.QueryEscape(id), nil, "")
				return answer["state"] != "QUEUED"
			})
			if answer["state"] != test.state {
				t.Errorf("the submission is %v, want %s", answer, test.state)
			}
		})
	}
	if status, _ := call(t, NewBroker("own"), "GET", "/submit-result?secret=own&submitID=x", nil, ""); status != 404 {
		t.Errorf("an unknown submission: status %d", status)
	}
}
