package backend

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"debug/elf"
	"debug/macho"
	"debug/pe"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
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

	text := Analyse([]byte("ask who@example.net, or 192.0.2.7, not 1.2.3.999 or http://192.0.2.8/"))
	if want := []string{"192.0.2.7", "192.0.2.8"}; !slices.Equal(text.IPs, want) {
		t.Errorf("IPs: %q, want %q", text.IPs, want)
	}
	if want := []string{"who@example.net"}; !slices.Equal(text.Emails, want) {
		t.Errorf("email addresses: %q, want %q", text.Emails, want)
	}
	if want := []string{"example.net"}; !slices.Equal(text.Domains, want) {
		t.Errorf("domains: %q, want %q", text.Domains, want)
	}
	if want := (MediaType{"text/plain; charset=utf-8", 4, 10}); text.MediaType != want {
		t.Errorf("media type %+v, want %+v", text.MediaType, want)
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
	for name, test := range map[string]struct {
		file []byte
		want Executable
	}{
		"PE": {smallPE(), Executable{Format: "PE", Machine: "amd64", Type: "library", EntryPoint: "0x0"}},
		"PE with an import": {smallPEWithImport(), Executable{
			Format: "PE", Machine: "amd64", Type: "library", EntryPoint: "0x1234",
			Sections: []Section{{".idata.long", 64, 0.957}}, Libraries: []string{"lib.dll"},
		}},
		"Mach-O":     {smallMachO(), Executable{Format: "Mach-O", Machine: "CpuAmd64", Type: "Exec", Libraries: []string{"/lib/one"}}},
		"fat Mach-O": {fatMachO(), Executable{Format: "Mach-O", Machine: "CpuAmd64, CpuArm64", Type: "Exec", Libraries: []string{"/lib/one"}}},
		"ELF of 32 bits": {smallELF32(), Executable{
			Format: "ELF", Machine: "EM_PPC", Type: "ET_EXEC", EntryPoint: "0x5678",
			Sections: []Section{{"", 24, 0.9}, {"", 10, 2.846}}, Libraries: []string{"lib.so"},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			got := readExecutable(test.file)
			if got == nil {
				t.Fatal("it is none")
			}
			got.mediaType, got.unmeasured = "", 0
			if !reflect.DeepEqual(*got, test.want) {
				t.Errorf("%+v, want %+v", *got, test.want)
			}
			for n := range test.file {
				readExecutable(test.file[:n]) // whatever it is, it does not do harm
			}
		})
	}
}

func TestNoExecutable(t *testing.T) {
	for name, file := range map[string][]byte{
		"zeros":      make([]byte, 512),
		"an icon":    append([]byte{0, 0, 1, 0, 1, 0, 16, 16}, make([]byte, 512)...),
		"DOS":        append([]byte("MZ"), make([]byte, 512)...),
		"Java class": append([]byte{0xca, 0xfe, 0xba, 0xbe, 0, 0, 0, 52}, make([]byte, 512)...),
		"magic only": []byte("\x7fELF"),
	} {
		if exe := readExecutable(file); exe != nil {
			t.Errorf("%s: %+v", name, exe)
		}
	}
}

// TestHostileNames has a megabyte without a zero as the name of each of many sections.
func TestHostileNames(t *testing.T) {
	file := elfWithNames(1000, 1<<20)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	exe := readExecutable(file)
	runtime.ReadMemStats(&after)
	if exe == nil || len(exe.Sections) == 0 || len(exe.Sections) > maxSections {
		t.Fatalf("sections of %+v", exe)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 1<<20 {
		t.Errorf("a file of %d bytes took %d bytes to read", len(file), took)
	}
}

// elfWithNames is a header and sections that all have one long name, and claim all of the names as their content.
func elfWithNames(sections, length int) []byte {
	header := elf.Header64{Type: 2, Machine: 62, Shoff: 64, Shentsize: 64, Shnum: uint16(sections), Shstrndx: 1}
	copy(header.Ident[:], "\x7fELF\x02\x01\x01")
	names := elf.Section64{Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + 64*sections), Size: uint64(length)}
	parts := []any{header}
	for range sections {
		parts = append(parts, names)
	}
	return binaryFile(binary.LittleEndian, append(parts, bytes.Repeat([]byte("a"), length))...)
}

// smallELF32 is a header, two sections, and in them a needed library.
func smallELF32() []byte {
	header := elf.Header32{Type: 2, Machine: uint16(elf.EM_PPC), Entry: 0x5678, Shoff: 52, Shentsize: 40, Shnum: 2}
	copy(header.Ident[:], "\x7fELF\x01\x02\x01")
	return binaryFile(binary.BigEndian, header,
		elf.Section32{Name: 500, Type: uint32(elf.SHT_DYNAMIC), Off: 132, Size: 24, Link: 1},
		elf.Section32{Name: 500, Type: uint32(elf.SHT_STRTAB), Off: 156, Size: 10},
		elf.Dyn32{Tag: int32(elf.DT_SONAME), Val: 1}, elf.Dyn32{Tag: int32(elf.DT_NEEDED), Val: 2}, elf.Dyn32{},
		[]byte("\x00xlib.so\x00\x00"))
}

// binaryFile joins structures and bytes.
func binaryFile(order binary.AppendByteOrder, parts ...any) (file []byte) {
	for _, part := range parts {
		var err error
		if file, err = binary.Append(file, order.(binary.ByteOrder), part); err != nil {
			panic(err)
		}
	}
	return file
}

// smallPEWithImport is a header for a library with one section, which names another library.
func smallPEWithImport() []byte {
	dos := make([]byte, 64)
	copy(dos, "MZ")
	dos[60] = 64
	optional := pe.OptionalHeader64{Magic: 0x20b, AddressOfEntryPoint: 0x1234, NumberOfRvaAndSizes: 16}
	optional.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_IMPORT].VirtualAddress = 0x1000
	section := pe.SectionHeader32{VirtualAddress: 0x1000, SizeOfRawData: 64, PointerToRawData: 368}
	copy(section.Name[:], "/4")
	content := make([]byte, 64)
	binary.LittleEndian.PutUint32(content[12:], 0x1000+40)
	copy(content[40:], "lib.dll")
	return binaryFile(binary.LittleEndian, dos, []byte("PE\x00\x00"),
		pe.FileHeader{Machine: pe.IMAGE_FILE_MACHINE_AMD64, NumberOfSections: 1, SizeOfOptionalHeader: 240, PointerToSymbolTable: 432, Characteristics: pe.IMAGE_FILE_DLL},
		optional, section, content, []byte("\x10\x00\x00\x00.idata.long\x00"))
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

// smallMachO is a header for a program with one load command, for a library.
func smallMachO() []byte {
	return binaryFile(binary.LittleEndian,
		macho.FileHeader{Magic: macho.Magic64, Cpu: macho.CpuAmd64, Type: macho.TypeExec, Ncmd: 1, Cmdsz: 40}, uint32(0),
		macho.DylibCmd{Cmd: macho.LoadCmdDylib, Len: 40, Name: 24}, []byte("/lib/one\x00\x00\x00\x00\x00\x00\x00\x00"))
}

// fatMachO is smallMachO for one machine, and nothing for another.
func fatMachO() []byte {
	thin := smallMachO()
	return binaryFile(binary.BigEndian, macho.MagicFat, uint32(2),
		macho.FatArchHeader{Cpu: macho.CpuAmd64, Offset: 48, Size: uint32(len(thin))},
		macho.FatArchHeader{Cpu: macho.CpuArm64}, thin)
}

func FuzzAnalyse(f *testing.F) {
	f.Add([]byte("plain text with http://example.com/ in it"))
	f.Add(smallPE())
	f.Add(smallMachO())
	f.Add(smallPEWithImport())
	f.Add(fatMachO())
	f.Add(elfWithNames(10, 1000))
	f.Add([]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00\x01\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, file []byte) {
		a := Analyse(file)
		if a.FileSize != len(file) || a.Entropy < 0 || a.Entropy > 8 || len(a.Strings) > maxStrings || len(a.URLs) > maxFound {
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

// call sends a request and returns the status and, if the answer is JSON, its document.
func call(t *testing.T, method, target string, body io.Reader, contentType string) (status int, answer map[string]any) {
	t.Helper()
	return callWith(t, http.DefaultClient, method, target, body, contentType)
}

// callWith is like call, with a client.
func callWith(t *testing.T, client *http.Client, method, target string, body io.Reader, contentType string) (status int, answer map[string]any) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, target, body)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", contentType)
	return do(t, client, request)
}

func do(t *testing.T, client *http.Client, request *http.Request) (status int, answer map[string]any) {
	t.Helper()
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.Header.Get("Content-Type") == "application/json" {
		if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
			t.Fatal(err)
		}
	}
	return response.StatusCode, answer
}

// serve runs a broker or a node until the test ends.
func serve(t *testing.T, handler http.Handler) (address string) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

// handlers is a transport that calls the handler of the host. It needs no connections, so time can be virtual.
type handlers map[string]http.Handler

func (h handlers) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	if r.Body == nil {
		r.Body = http.NoBody // as a server has it
	}
	recorder := httptest.NewRecorder()
	h[r.URL.Host].ServeHTTP(recorder, r)
	return recorder.Result(), nil
}

func TestNode(t *testing.T) { synctest.Test(t, testNode) }

func testNode(t *testing.T) {
	const node = "http://node"
	client := &http.Client{Transport: handlers{"node": NewNode("hush", 100*time.Millisecond, 300*time.Millisecond)}}
	call := func(t *testing.T, method, target string, body io.Reader, contentType string) (status int, answer map[string]any) {
		t.Helper()
		return callWith(t, client, method, target, body, contentType)
	}
	for target, want := range map[string]int{
		"/task?taskID=x":                       400,
		"/task?taskID=x&secret=wrong":          400,
		"/task?taskID=x&secret=hush":           404,
		"/task?taskID=x&serect=hush":           404,
		"/task?secret=hush":                    400,
		"/task?taskID=x&all=maybe&serect=hush": 400,
		"/system-info?serect=hush":             200,
		"/scan?secret=hush":                    405,
		"/nothing?secret=hush":                 404,
		"/system-info?secret=&serect=":         400,
	} {
		if status, _ := call(t, "GET", node+target, nil, ""); status != want {
			t.Errorf("%s: status %d, want %d", target, status, want)
		}
	}
	if status, _ := call(t, "POST", node+"/scan?secret=hush", strings.NewReader("x"), "text/plain"); status != 400 {
		t.Errorf("no form: status %d", status)
	}
	body, contentType := upload(t, "other", nil)
	if status, _ := call(t, "POST", node+"/scan?secret=hush", body, contentType); status != 400 {
		t.Errorf("no file: status %d", status)
	}
	body, contentType = upload(t, "file", make([]byte, maxFile+1))
	if status, _ := call(t, "POST", node+"/scan?secret=hush", body, contentType); status != 413 {
		t.Errorf("a large file: status %d", status)
	}

	body, contentType = upload(t, "file", []byte("a small text"))
	status, answer := call(t, "POST", node+"/scan?secret=hush", body, contentType)
	if status != 200 {
		t.Fatalf("status %d", status)
	}
	reference := answer["scanTasks"].([]any)[0].(map[string]any)["taskReference"].(map[string]any)
	target := node + "/task?secret=hush&taskID=" + reference["ID"].(string)
	_, answer = call(t, "GET", target, nil, "")
	if states := statesOf(answer); !slices.Contains(states, "IN_PROGRESS") || !strings.Contains(fmt.Sprint(answer), sha256OfText) {
		t.Errorf("at first it is %v, in %v", states, answer)
	}
	time.Sleep(100 * time.Millisecond)
	_, answer = call(t, "GET", target+"&all=true", nil, "")
	if result := answer["result"].(map[string]any); result["overallState"] != "success" || result["resources"] == nil {
		t.Errorf("after the analysis it is %v", answer)
	}
	if states := statesOf(answer); len(states) != 3 || slices.Contains(states, "IN_PROGRESS") {
		t.Errorf("in the end it is %v", states)
	}
	time.Sleep(300 * time.Millisecond)
	if status, _ := call(t, "GET", target, nil, ""); status != 404 {
		t.Errorf("after the deletion: status %d", status)
	}
	_, answer = call(t, "GET", node+"/system-info?secret=hush", nil, "")
	if threads, ok := answer["activeThreads"].(float64); !ok || threads < 1 {
		t.Errorf("active threads: %v", answer["activeThreads"])
	}
	if queue := answer["queueInfo"].(map[string]any); queue["activeCount"] != 0.0 || queue["completedCount"] != 1.0 {
		t.Errorf("the queue is %v", queue)
	}
}

const sha256OfText = "78cf1fcd450e1ea3cd2c78dadb76568a1c6500db32c4c860b53ebb752e2a2165" // of "a small text"

// statesOf lists the states of a task and its subtasks.
func statesOf(answer map[string]any) (states []string) {
	result := answer["result"].(map[string]any)
	states = append(states, result["taskReference"].(map[string]any)["state"].(string))
	for _, subtask := range result["subtaskReferences"].([]any) {
		states = append(states, subtask.(map[string]any)["state"].(string))
	}
	return states
}

// submit submits a file to a broker.
func submit(t *testing.T, broker string) (status int, accepted map[string]any) {
	t.Helper()
	return submitWith(t, http.DefaultClient, broker)
}

// submitWith is like submit, with a client.
func submitWith(t *testing.T, client *http.Client, broker string) (status int, accepted map[string]any) {
	t.Helper()
	body, contentType := upload(t, "file", []byte("a small text"))
	status, answer := callWith(t, client, "POST", broker+"/submit?secret=own", body, contentType)
	if status == 200 {
		accepted = answer["acceptedFiles"].([]any)[0].(map[string]any)
	}
	return status, accepted
}

func TestBroker(t *testing.T) {
	node := serve(t, NewNode("hush", time.Millisecond, time.Minute))
	for name, test := range map[string]struct {
		ref   NodeRef
		state string
	}{
		"a node":             {NodeRef{"node-1", node, "hush"}, "SUCCESS"},
		"one that refuses":   {NodeRef{"node-1", node, "wrong"}, "FAILED"},
		"one that is absent": {NodeRef{"node-1", "http://127.0.0.1:1", "hush"}, "FAILED"},
	} {
		t.Run(name, func(t *testing.T) {
			b := NewBroker("own", test.ref)
			go b.Run(t.Context())
			broker := serve(t, b)
			status, accepted := submit(t, broker)
			if status != 200 || accepted["sha256"] != sha256OfText {
				t.Fatalf("status %d, %v", status, accepted)
			}
			var answer map[string]any
			testenv.Eventually(t, "the node's answer", func() bool {
				_, answer = call(t, "GET", broker+"/submit-result?serect=own&submitID="+accepted["ID"].(string), nil, "")
				return answer["state"] != "QUEUED"
			})
			if answer["state"] != test.state || answer["positionInQueue"] != nil {
				t.Errorf("the submission is %v, want %s", answer, test.state)
			}
		})
	}
	broker := serve(t, NewBroker("own"))
	for target, want := range map[string]int{
		"/submit-result?secret=own&submitID=x":  404,
		"/submit-result?secret=own":             400,
		"/submit-result?secret=hush&submitID=x": 400,
		"/submit?secret=own":                    405,
	} {
		if status, _ := call(t, "GET", broker+target, nil, ""); status != want {
			t.Errorf("%s: status %d, want %d", target, status, want)
		}
	}
}

// TestQueue fills the queue of a broker that does not run yet, and sees it reach both nodes once it does.
func TestQueue(t *testing.T) {
	node := serve(t, NewNode("hush", 0, time.Minute))
	b := NewBroker("own", NodeRef{"node-1", node, "hush"}, NodeRef{"node-2", node, "hush"})
	broker := serve(t, b)
	ids := make([]string, maxQueue)
	for i := range ids {
		_, accepted := submit(t, broker)
		if accepted["positionInQueue"] != float64(i) {
			t.Fatalf("submission %d is accepted as %v", i, accepted)
		}
		ids[i] = accepted["ID"].(string)
	}
	if status, _ := submit(t, broker); status != 503 {
		t.Errorf("one too many: status %d", status)
	}
	result := func(id string) map[string]any {
		_, answer := call(t, "GET", broker+"/submit-result?secret=own&submitID="+id, nil, "")
		return answer
	}
	if got := result(ids[3]); got["state"] != "QUEUED" || got["positionInQueue"] != 3.0 {
		t.Errorf("the fourth is %v", got)
	}

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { b.Run(ctx); close(ended) }()
	for i, id := range ids {
		testenv.Eventually(t, "the submission to be at a node", func() bool { return result(id)["state"] == "SUCCESS" })
		if got, want := result(id)["appServerID"], []string{"node-1", "node-2"}[i%2]; got != want {
			t.Errorf("submission %d is at %v, want %s", i, got, want)
		}
	}
	stop()
	<-ended
}

func TestSecretPlaces(t *testing.T) {
	requests := map[SecretPlace]func(r *http.Request, secret string){
		SecretInHeader: func(r *http.Request, secret string) { r.Header.Set("secret", secret) },
		SecretInQuery:  func(r *http.Request, secret string) { r.URL.RawQuery = "secret=" + secret },
		SecretInSerect: func(r *http.Request, secret string) { r.URL.RawQuery = "serect=" + secret },
		"nowhere":      func(*http.Request, string) {},
	}
	for _, test := range []struct {
		accepted []SecretPlace
		refuse   int
		want     map[SecretPlace]int
	}{
		{nil, 0, map[SecretPlace]int{SecretInHeader: 200, SecretInQuery: 200, SecretInSerect: 200, "nowhere": 400}},
		{[]SecretPlace{SecretInHeader}, 401, map[SecretPlace]int{SecretInHeader: 200, SecretInQuery: 401, SecretInSerect: 401, "nowhere": 401}},
		{[]SecretPlace{SecretInQuery}, 403, map[SecretPlace]int{SecretInHeader: 403, SecretInQuery: 200, SecretInSerect: 403, "nowhere": 403}},
		{[]SecretPlace{SecretInSerect}, 0, map[SecretPlace]int{SecretInHeader: 400, SecretInQuery: 400, SecretInSerect: 200, "nowhere": 400}},
		{[]SecretPlace{SecretInHeader, SecretInSerect}, 0, map[SecretPlace]int{SecretInHeader: 200, SecretInQuery: 400, SecretInSerect: 200, "nowhere": 400}},
	} {
		broker, node := NewBroker("hush"), NewNode("hush", 0, 0)
		for role, access := range map[string]*Access{"broker": &broker.Access, "node": &node.Access} {
			access.SecretIn, access.Refuse = test.accepted, test.refuse
			address := serve(t, map[string]http.Handler{"broker": broker, "node": node}[role])
			for place, want := range test.want {
				for secret, want := range map[string]int{"hush": want, "wrong": test.want["nowhere"]} {
					request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address+"/system-info", nil)
					if err != nil {
						t.Fatal(err)
					}
					requests[place](request, secret)
					if status, _ := do(t, http.DefaultClient, request); status != want {
						t.Errorf("%s with the secret in %v: %s in %s: status %d, want %d", role, test.accepted, secret, place, status, want)
					}
				}
			}
		}
	}
}

func TestParse(t *testing.T) {
	if places, err := ParseSecretPlaces("header, query,serect"); err != nil || !slices.Equal(places, secretPlaces) {
		t.Errorf("%v, %v", places, err)
	}
	if _, err := ParseSecretPlaces("header,cookie"); err == nil || !strings.Contains(err.Error(), `"cookie"`) {
		t.Errorf("%v", err)
	}
	if mode, err := ParseSubmitResultMode("manual"); err != nil || mode != SubmitResultManual {
		t.Errorf("%v, %v", mode, err)
	}
	if _, err := ParseSubmitResultMode("none"); err == nil || !strings.Contains(err.Error(), `"none"`) {
		t.Errorf("%v", err)
	}
}

// TestSubmitResult checks the form of the answers for a submission that is queued, and for the same one at a node.
func TestSubmitResult(t *testing.T) {
	for mode, test := range map[SubmitResultMode]struct {
		queued, done int      // status
		fields       []string // while queued
		more         []string // at the node
		isNumber     bool     // whether IDs are numbers
	}{
		"":                  {200, 200, []string{"digests", "fileSize", "mediaType", "positionInQueue", "state"}, []string{"appServerID", "httpStatus", "result"}, false},
		SubmitResultIDs:     {200, 200, []string{"digests", "fileSize", "mediaType", "positionInQueue", "state"}, []string{"appServerID", "httpStatus", "result"}, false},
		SubmitResultNumbers: {200, 200, []string{"digests", "fileSize", "mediaType", "positionInQueue", "state"}, []string{"appServerID", "httpStatus", "result"}, true},
		SubmitResultManual:  {200, 200, []string{"digests", "fileSize", "mediaType", "processTime"}, nil, false},
		SubmitResultAbsent:  {404, 404, nil, nil, false},
	} {
		t.Run(cmp.Or(string(mode), "default"), func(t *testing.T) {
			node := NewNode("hush", 0, time.Minute)
			node.NumericIDs = true
			b := NewBroker("own", NodeRef{"1", serve(t, node), "hush"})
			b.SubmitResult = mode
			broker := serve(t, b)
			_, accepted := submit(t, broker)
			target := broker + "/submit-result?secret=own&submitID=" + accepted["ID"].(string)
			status, answer := call(t, "GET", target, nil, "")
			if fields := slices.Sorted(maps.Keys(answer)); status != test.queued || !slices.Equal(fields, test.fields) {
				t.Errorf("queued: status %d, %v", status, answer)
			}
			go b.Run(t.Context())
			testenv.Eventually(t, "the node's answer", func() bool { return b.dispatchedNow() == 1 })
			status, answer = call(t, "GET", target, nil, "")
			want := slices.DeleteFunc(slices.Concat(test.fields, test.more), func(name string) bool { return name == "positionInQueue" })
			slices.Sort(want)
			if fields := slices.Sorted(maps.Keys(answer)); status != test.done || !slices.Equal(fields, want) {
				t.Errorf("done: status %d, %v, want %v", status, answer, want)
			}
			if test.more == nil {
				return
			}
			reference := answer["result"].(map[string]any)["scanTasks"].([]any)[0].(map[string]any)["taskReference"].(map[string]any)
			for name, id := range map[string]any{"appServerID": answer["appServerID"], "the task's ID": reference["ID"]} {
				if _, isNumber := id.(float64); isNumber != test.isNumber {
					t.Errorf("%s is %#v", name, id)
				}
			}
			if name := reference["resourceReference"].(map[string]any)["ID"]; reflect.TypeOf(name).Kind() != reflect.String {
				t.Errorf("an ID that is no number is %#v", name)
			}
		})
	}
}

func (b *Broker) dispatchedNow() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.dispatched
}

func TestNumericIDs(t *testing.T) {
	got, err := withNumericIDs(map[string]any{
		"ID": "12", "taskID": "1790000000001", "octalID": "012", "hugeID": "99999999999999999999", "state": "7",
		"list": []any{map[string]any{"appServerID": "3", "size": 1 << 60}},
	})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(got)
	want := `{"ID":12,"hugeID":"99999999999999999999","list":[{"appServerID":3,"size":1152921504606846976}],"octalID":"012","state":"7","taskID":1790000000001}`
	if string(text) != want || err != nil {
		t.Errorf("%s, %v", text, err)
	}
}

// counter counts the requests for reports.
type counter struct {
	http.Handler
	tasks atomic.Int64
}

func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/task" {
		c.tasks.Add(1)
	}
	c.Handler.ServeHTTP(w, r)
}

// TestBrokerTask follows a submission from the queue until it is deleted.
func TestBrokerTask(t *testing.T) { synctest.Test(t, testBrokerTask) }

func testBrokerTask(t *testing.T) {
	const analysis = time.Second
	node := NewNode("hush", analysis, time.Minute)
	node.SecretIn = []SecretPlace{SecretInHeader}
	counted := &counter{Handler: node}
	b := NewBroker("own", NodeRef{"node-1", "http://node", "hush"})
	b.Forget = time.Hour
	client := &http.Client{Transport: handlers{"broker": b, "node": counted}}
	b.NodeClient = client
	_, accepted := submitWith(t, client, "http://broker")
	target := "http://broker/task?secret=own&submitID=" + accepted["ID"].(string)
	get := func(target string) (int, map[string]any) { return callWith(t, client, "GET", target, nil, "") }

	if status, _ := get(target); status != 204 {
		t.Errorf("queued: status %d", status)
	}
	go b.Run(t.Context())
	synctest.Wait()
	status, answer := get(target)
	if states := statesOf(answer); status != 200 || states[0] != "IN_PROGRESS" || answer["result"].(map[string]any)["finalVerdict"] != nil {
		t.Errorf("in progress: status %d, %v", status, answer)
	}
	time.Sleep(analysis)
	_, answer = get(target)
	result := answer["result"].(map[string]any)
	if verdict := result["finalVerdict"].(map[string]any)["verdict"]; statesOf(answer)[0] != "SUCCESS" || verdict != "UNKNOWN" || answer["processTime"] == nil || result["resources"] != nil {
		t.Errorf("finished: %v", answer)
	}

	asked := counted.tasks.Load()
	pair := "http://broker/task?secret=own&appServerID=node-1&taskID=" + result["taskReference"].(map[string]any)["ID"].(string)
	for _, target := range []string{target, pair} {
		if _, again := get(target); !reflect.DeepEqual(again, answer) {
			t.Errorf("%s: %v, want %v", target, again, answer)
		}
	}
	if got := counted.tasks.Load(); got != asked {
		t.Errorf("the node is asked %d times for a report that the broker keeps", got-asked)
	}
	if _, again := get(target + "&nocache=true"); statesOf(again)[0] != "SUCCESS" || counted.tasks.Load() != asked+1 {
		t.Errorf("with nocache the node is asked %d times: %v", counted.tasks.Load()-asked, again)
	}
	if _, complete := get(pair + "&all=true"); complete["result"].(map[string]any)["resources"] == nil || counted.tasks.Load() != asked+2 {
		t.Errorf("the complete report: %v", complete)
	}

	time.Sleep(time.Minute)
	for target, want := range map[string]int{target: 200, target + "&nocache=true": 404} {
		if status, _ := get(target); status != want {
			t.Errorf("%s: status %d after the node has deleted the task, want %d", target, status, want)
		}
	}
	time.Sleep(time.Hour - time.Minute)
	for _, target := range []string{target, pair, pair + "&all=true", "http://broker/submit-result?secret=own&submitID=" + accepted["ID"].(string)} {
		if status, _ := get(target); status != 404 {
			t.Errorf("%s: status %d after the deletion", target, status)
		}
	}
}

func TestBrokerTaskErrors(t *testing.T) {
	node := serve(t, NewNode("hush", 0, time.Minute))
	nonsense := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"result":{}}`) }))
	b := NewBroker("own", NodeRef{"refuses", node, "wrong"}, NodeRef{"node-1", node, "hush"},
		NodeRef{"absent", "http://127.0.0.1:1", "hush"}, NodeRef{"nonsense", nonsense, "hush"})
	go b.Run(t.Context())
	broker := serve(t, b)
	_, failed := submit(t, broker)
	testenv.Eventually(t, "the node's answer", func() bool { return b.dispatchedNow() == 1 })
	for query, want := range map[string]int{
		"":                                   400,
		"&taskID=x":                          400,
		"&appServerID=node-1":                400,
		"&submitID=x&all=maybe":              400,
		"&submitID=x&nocache=maybe":          400,
		"&submitID=x":                        404,
		"&submitID=" + failed["ID"].(string): 404,
		"&appServerID=node-1&taskID=x":       404,
		"&appServerID=node-9&taskID=x":       404,
		"&appServerID=refuses&taskID=x":      500,
		"&appServerID=absent&taskID=x":       500,
		"&appServerID=nonsense&taskID=x":     500,
	} {
		if status, _ := call(t, "GET", broker+"/task?secret=own"+query, nil, ""); status != want {
			t.Errorf("%s: status %d, want %d", query, status, want)
		}
	}
}

func TestBrokerSystemInfo(t *testing.T) {
	broker := serve(t, NewBroker("own"))
	for queued := range 2 {
		_, answer := call(t, "GET", broker+"/system-info?secret=own", nil, "")
		version, _ := answer["versionInfo"].(map[string]any)
		queue, _ := answer["queueInfo"].(map[string]any)
		if version["name"] != "fsBroker" || version["version"] == "" || queue["queueCount"] != float64(queued) || answer["memoryStats"] == nil {
			t.Errorf("%v", answer)
		}
		if free, ok := answer["freeDiscSpaceInMb"].(float64); runtime.GOOS == "linux" && (!ok || free <= 0) {
			t.Errorf("free disc space: %v", answer["freeDiscSpaceInMb"])
		}
		submit(t, broker)
	}
}

// TestTLS has a broker and a node with one certificate, and a broker that does not trust it.
func TestTLS(t *testing.T) {
	certificate, err := NewCertificate()
	if err != nil {
		t.Fatal(err)
	}
	serveTLS := func(handler http.Handler) (address string) {
		server := httptest.NewUnstartedServer(handler)
		server.TLS = certificate.ServerConfig()
		server.Config.ErrorLog = log.New(io.Discard, "", 0) // the broker that does not trust it
		server.StartTLS()
		t.Cleanup(server.Close)
		return server.URL
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(certificate.PEM) {
		t.Fatalf("no certificate in %s", certificate.PEM)
	}
	node := serveTLS(NewNode("hush", 0, time.Minute))
	for name, test := range map[string]struct {
		client *http.Client
		want   int
	}{
		"pinned":   {certificate.Client(), 200},
		"from PEM": {&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}, 200},
		"unknown":  {nil, 404},
	} {
		t.Run(name, func(t *testing.T) {
			b := NewBroker("own", NodeRef{"node-1", node, "hush"})
			b.NodeClient = test.client
			broker := serveTLS(b)
			body, contentType := upload(t, "file", []byte("a small text"))
			request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, broker+"/submit?secret=own", body)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Content-Type", contentType)
			client := certificate.Client()
			_, answer := do(t, client, request)
			submitted := answer["acceptedFiles"].([]any)[0].(map[string]any)["ID"].(string)
			go b.Run(t.Context())
			for _, host := range []string{"127.0.0.1", "localhost"} {
				address := strings.Replace(broker, "127.0.0.1", host, 1)
				testenv.Eventually(t, "the report", func() bool {
					request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address+"/task?secret=own&submitID="+submitted, nil)
					if err != nil {
						t.Fatal(err)
					}
					status, _ := do(t, client, request)
					if status != 204 && status != test.want {
						t.Fatalf("status %d, want %d", status, test.want)
					}
					return status == test.want
				})
			}
		})
	}
}
