// Package javabackend_test checks the stand-in for the product's Java servers, with HTTPS from a keystore.
package javabackend_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

const secret = "of the broker and the node"

// server is a running Backend.java.
type server struct {
	broker, node string // URLs
	appServerID  string
	client       *http.Client // trusts its certificate alone
}

// built is the folder of what build makes. TestMain removes it.
var built string

func TestMain(m *testing.M) {
	var err error
	if built, err = os.MkdirTemp("", "java-backend"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(built)
	os.Exit(code)
}

// build compiles Backend.java, and makes a keystore and its certificate. It does so once for all tests.
var build = sync.OnceValues(func() (output []byte, err error) {
	for _, command := range [][]string{
		{"javac", "-J-XX:TieredStopAtLevel=1", "--release", "11", "-d", built, "Backend.java"},
		{
			"keytool", "-genkeypair", "-alias", "backend", "-keyalg", "RSA", "-keysize", "2048", "-validity", "2", "-dname", "CN=localhost",
			"-ext", "san=dns:localhost,ip:127.0.0.1", "-storetype", "PKCS12", "-keystore", keystore(), "-storepass", "changeit",
		},
		{"keytool", "-exportcert", "-rfc", "-alias", "backend", "-keystore", keystore(), "-storepass", "changeit", "-file", certificate()},
	} {
		build := exec.Command(command[0], command[1:]...)
		build.Env = append(os.Environ(), testenv.Home(built)...)
		if output, err = build.CombinedOutput(); err != nil {
			return output, fmt.Errorf("%s: %w", command[0], err)
		}
	}
	return nil, nil
})

func keystore() string    { return filepath.Join(built, "backend.p12") }
func certificate() string { return filepath.Join(built, "backend.crt") }

// javaCommand returns a command that runs the server. It skips the test with -short, and where there is no JDK.
func javaCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if testing.Short() {
		t.Skip("it starts processes")
	}
	for _, tool := range []string{"java", "javac", "keytool"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs a JDK of version 11 or later: %v", err)
		}
	}
	if output, err := build(); bytes.Contains(output, []byte("invalid flag: --release")) {
		t.Skip("needs a JDK of version 11 or later")
	} else if err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	command := exec.CommandContext(testenv.Context(t), "java", append([]string{"-XX:TieredStopAtLevel=1", "-cp", built, "Backend"}, args...)...)
	command.Env = append(os.Environ(), testenv.Home(t.TempDir())...)
	return command
}

// start runs the server until the test ends, or stop is called.
func start(t *testing.T, analysis, forget time.Duration) *server {
	t.Helper()
	command := javaCommand(t, "--keystore", keystore(), "--password", "changeit", "--secret", secret, "--broker-port", "0", "--node-port", "0",
		"--analysis", fmt.Sprint(analysis.Milliseconds()), "--forget", fmt.Sprint(forget.Milliseconds()))
	command.Stderr = t.Output()
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait() // killed
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		t.Fatalf("it does not start: %v", err)
	}
	var ready struct {
		BrokerPort, NodePort int
		AppServerID          string
	}
	if err := json.Unmarshal(line, &ready); err != nil {
		t.Fatalf("%v: %s", err, line)
	}

	pem, err := os.ReadFile(certificate())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		t.Fatalf("no certificate in %s", pem)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(transport.CloseIdleConnections)
	return &server{
		broker:      fmt.Sprintf("https://127.0.0.1:%d", ready.BrokerPort),
		node:        fmt.Sprintf("https://localhost:%d", ready.NodePort),
		appServerID: ready.AppServerID,
		client:      &http.Client{Transport: transport},
	}
}

// do sends a request and returns the status and the answer.
func (s *server) do(t *testing.T, method, target string, header http.Header, body io.Reader) (status int, answer string, contentType string) {
	t.Helper()
	request, err := http.NewRequestWithContext(testenv.Context(t), method, target, body)
	if err != nil {
		t.Fatal(err)
	}
	request.Header = header
	response, err := s.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text), response.Header.Get("Content-Type")
}

// get sends a request with the secret, and decodes the answer if there is a document.
func (s *server) get(t *testing.T, target string) (status int, document map[string]any) {
	t.Helper()
	status, answer, contentType := s.do(t, http.MethodGet, target, http.Header{"Secret": {secret}}, nil)
	if contentType == "application/json" {
		if err := json.Unmarshal([]byte(answer), &document); err != nil {
			t.Fatalf("%v: %s", err, answer)
		}
	}
	return status, document
}

// submit submits a file in a form, after a field that is none.
func (s *server) submit(t *testing.T, name string, content []byte) (accepted map[string]any) {
	t.Helper()
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	if err := writer.WriteField("priority", "50"); err != nil {
		t.Fatal(err)
	}
	part, err := writer.CreateFormFile("sample", name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := part.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	header := http.Header{"Secret": {secret}, "Content-Type": {writer.FormDataContentType()}}
	status, answer, _ := s.do(t, http.MethodPost, s.broker+"/submit", header, &form)
	var document struct{ AcceptedFiles []map[string]any }
	if err := json.Unmarshal([]byte(answer), &document); err != nil || status != http.StatusOK || len(document.AcceptedFiles) != 1 {
		t.Fatalf("status %d, %v: %s", status, err, answer)
	}
	return document.AcceptedFiles[0]
}

// part returns a part of a document, by the names of the fields that lead there.
func part(document map[string]any, path string) any {
	var value any = document
	for name := range strings.SplitSeq(path, ".") {
		fields, ok := value.(map[string]any)
		if !ok {
			return nil
		}
		value = fields[name]
	}
	return value
}

// TestRequests checks answers that do not depend on a submission's state.
func TestRequests(t *testing.T) {
	t.Parallel()
	s := start(t, time.Hour, time.Hour)
	right := http.Header{"Secret": {secret}}
	for _, test := range []struct {
		method, target string
		header         http.Header
		want           int
	}{
		{"GET", s.broker + "/system-info", right, 200},
		{"GET", s.node + "/system-info", right, 200},
		{"GET", s.broker + "/system-info", nil, 400},
		{"GET", s.broker + "/system-info", http.Header{"Secret": {"wrong"}}, 400},
		{"GET", s.node + "/task?taskID=x", http.Header{"Secret": {"wrong"}}, 400},
		{"GET", s.broker + "/system-info?secret=" + strings.ReplaceAll(secret, " ", "+"), nil, 400},
		{"GET", s.broker + "/system-info", http.Header{"X-Api-Key": {secret}}, 400},
		{"GET", s.broker + "/nothing", right, 404},
		{"GET", s.node + "/submit-result?submitID=x", right, 404},
		{"GET", s.broker + "/submit", right, 405},
		{"POST", s.broker + "/submit", right, 400},
		{"GET", s.broker + "/task", right, 400},
		{"GET", s.broker + "/task?taskID=x", right, 400},
		{"GET", s.broker + "/task?submitID=x", right, 404},
		{"GET", s.broker + "/task?submitID=x&all=maybe", right, 400},
		{"GET", s.broker + "/task?appServerID=other&taskID=x", right, 404},
		{"GET", s.node + "/task", right, 400},
		{"GET", s.node + "/task?taskID=x", right, 404},
		{"GET", s.broker + "/submit-result?submitID=x", right, 404},
	} {
		status, answer, contentType := s.do(t, test.method, test.target, test.header, nil)
		if status != test.want {
			t.Errorf("%s %s: status %d, want %d", test.method, test.target, status, test.want)
		}
		if isPage := strings.HasPrefix(contentType, "text/html") && strings.Contains(answer, "<html>"); isPage != (test.want >= 400) {
			t.Errorf("%s %s: %s: %s", test.method, test.target, contentType, answer)
		}
	}

	s.submit(t, "sample.txt", []byte("a small text"))
	for address, name := range map[string]string{s.broker: "fsBroker", s.node: "fsTransform"} {
		_, info := s.get(t, address+"/system-info")
		if part(info, "versionInfo.name") != name || part(info, "memoryStats") == nil || part(info, "freeDiscSpaceInMb") == nil {
			t.Errorf("%v", info)
		}
		queued := map[string]float64{"fsBroker": 1, "fsTransform": 0}[name]
		if part(info, "queueInfo.queueCount") != queued {
			t.Errorf("%s: %v, want %v queued", name, info, queued)
		}
	}

	if response, err := http.Get(s.broker + "/system-info"); err == nil {
		response.Body.Close()
		t.Error("the certificate is trusted although it is self-signed")
	}
}

// TestSubmission looks at a submission in each of its states. Those that pass are looked for again with another submission if the
// machine was too slow to see them.
func TestSubmission(t *testing.T) {
	t.Parallel()
	t.Run("queued", func(t *testing.T) {
		s := start(t, time.Hour, time.Hour)
		name, content := `the "sämple".bin`, []byte("\x00\xff\r\n--not the boundary\r\n\r\n\x80")
		accepted := s.submit(t, name, content)
		sum := sha256.Sum256(content)
		if accepted["sha256"] != hex.EncodeToString(sum[:]) || accepted["submitName"] != name || part(accepted, "mediaType.string") == nil {
			t.Errorf("%v", accepted)
		}
		if status, document := s.get(t, s.bySubmission(accepted)); status != http.StatusNoContent || document != nil {
			t.Errorf("status %d, %v", status, document)
		}
		status, document := s.get(t, fmt.Sprint(s.broker, "/submit-result?submitID=", accepted["ID"]))
		if status != http.StatusOK || document["fileSize"] != float64(len(content)) || part(document, "digests.SHA-256") != accepted["sha256"] || len(document) != 4 {
			t.Errorf("/submit-result: status %d, %v", status, document)
		}
	})
	t.Run("in progress", func(t *testing.T) {
		s := start(t, 2*time.Second, time.Hour)
		testenv.Eventually(t, "a report in progress", func() bool {
			target := s.bySubmission(s.submit(t, "sample.txt", []byte("a small text")))
			var document map[string]any
			testenv.Eventually(t, "a report", func() bool {
				var status int
				status, document = s.get(t, target)
				return status == http.StatusOK
			})
			if part(document, "result.taskReference.state") != "IN_PROGRESS" {
				return false
			}
			if part(document, "result.finalVerdict") != nil {
				t.Errorf("%v", document)
			}
			return true
		})
	})
	t.Run("finished", func(t *testing.T) {
		s := start(t, 0, time.Hour)
		accepted := s.submit(t, "sample.txt", []byte("a small text"))
		status, document := s.get(t, s.bySubmission(accepted))
		if status != http.StatusOK || part(document, "result.taskReference.state") != "SUCCESS" || part(document, "result.file.hash") != accepted["sha256"] ||
			part(document, "result.finalVerdict.verdict") != "UNKNOWN" || part(document, "result.resources") != nil {
			t.Errorf("status %d, %v", status, document)
		}
		pair, ofNode := s.byTask(document)
		if status, document = s.get(t, pair+"&all=true"); status != http.StatusOK || part(document, "result.resources") == nil {
			t.Errorf("the complete report: status %d, %v", status, document)
		}
		if status, document = s.get(t, ofNode); status != http.StatusOK || part(document, "result.file.hash") != accepted["sha256"] || part(document, "result.finalVerdict") != nil {
			t.Errorf("of the node: status %d, %v", status, document)
		}
	})
	t.Run("deleted", func(t *testing.T) {
		s := start(t, 0, time.Second)
		var target string
		var report map[string]any
		testenv.Eventually(t, "a report that is not deleted", func() bool {
			target = s.bySubmission(s.submit(t, "sample.txt", []byte("a small text")))
			var status int
			status, report = s.get(t, target)
			return status == http.StatusOK
		})
		testenv.Eventually(t, "the deletion", func() bool { status, _ := s.get(t, target); return status == http.StatusNotFound })
		pair, ofNode := s.byTask(report)
		for _, target := range []string{pair, ofNode} {
			if status, _ := s.get(t, target); status != http.StatusNotFound {
				t.Errorf("%s: status %d", target, status)
			}
		}
	})
}

// bySubmission returns the broker's URL of a submission's report.
func (s *server) bySubmission(accepted map[string]any) string {
	return fmt.Sprint(s.broker, "/task?submitID=", accepted["ID"])
}

// byTask returns the URLs of a report by its task, at the broker and at the node.
func (s *server) byTask(report map[string]any) (pair, ofNode string) {
	taskID := part(report, "result.taskReference.ID")
	return fmt.Sprintf("%s/task?appServerID=%s&taskID=%s", s.broker, s.appServerID, taskID), fmt.Sprint(s.node, "/task?taskID=", taskID)
}

// TestArguments checks that a wrong argument ends the program with an error that names it.
func TestArguments(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"unexpected argument --port":              {"--port", "1"},
		"--password is missing\nusage: java":      {"--keystore", "README.md", "--secret", "x"},
		"the keystore README.md cannot be read: ": {"--keystore", "README.md", "--secret", "x", "--password", "x"},
		`--forget "1s" is no number`:              {"--keystore", "README.md", "--secret", "x", "--password", "x", "--forget", "1s"},
	} {
		out, err := javaCommand(t, args...).CombinedOutput()
		text := strings.ReplaceAll(string(out), "\r\n", "\n")
		if err == nil || !strings.HasPrefix(text, want) {
			t.Errorf("%v: %v, want %s: %s", args, err, want, text)
		}
	}
}
