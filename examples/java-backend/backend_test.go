// Package javabackend_test checks the stand-in for the product's Java servers, with HTTPS from a keystore.
package javabackend_test

import (
	"bufio"
	"bytes"
	"context"
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
	"testing"
	"time"
)

const secret = "of the broker and the node"

// server is a running Backend.java.
type server struct {
	broker, node string // URLs
	appServerID  string
	client       *http.Client // trusts its certificate alone
	certificate  string       // the file of the certificate, for a Caddyfile
}

// needJDK skips the test where there is no JDK.
func needJDK(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"java", "keytool"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs a JDK of version 11 or later: %v", err)
		}
	}
	modules, err := exec.CommandContext(t.Context(), "java", "--list-modules").CombinedOutput()
	if err != nil || !bytes.Contains(modules, []byte("jdk.compiler")) || !bytes.Contains(modules, []byte("jdk.httpserver")) {
		t.Skipf("needs a JDK of version 11 or later: java has no compiler or no HTTP server (%v)", err)
	}
}

// start makes a keystore and runs Backend.java with it until the test ends.
func start(t *testing.T, analysis, forget time.Duration) *server {
	t.Helper()
	needJDK(t)
	dir := t.TempDir()
	keystore, certificate := filepath.Join(dir, "backend.p12"), filepath.Join(dir, "backend.crt")
	keytool(t, "-genkeypair", "-alias", "backend", "-keyalg", "RSA", "-keysize", "2048", "-validity", "2", "-dname", "CN=localhost",
		"-ext", "san=dns:localhost,ip:127.0.0.1", "-storetype", "PKCS12", "-keystore", keystore, "-storepass", "changeit")
	keytool(t, "-exportcert", "-rfc", "-alias", "backend", "-keystore", keystore, "-storepass", "changeit", "-file", certificate)
	pem, err := os.ReadFile(certificate)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		t.Fatalf("no certificate in %s", pem)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(transport.CloseIdleConnections)

	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "java", "Backend.java", "--keystore", keystore, "--password", "changeit", "--secret", secret,
		"--broker-port", "0", "--node-port", "0",
		"--analysis", fmt.Sprint(analysis.Milliseconds()), "--forget", fmt.Sprint(forget.Milliseconds()))
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
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
	return &server{
		broker:      fmt.Sprintf("https://127.0.0.1:%d", ready.BrokerPort),
		node:        fmt.Sprintf("https://localhost:%d", ready.NodePort),
		appServerID: ready.AppServerID,
		client:      &http.Client{Transport: transport, Timeout: 30 * time.Second},
		certificate: certificate,
	}
}

func keytool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "keytool", args...).CombinedOutput(); err != nil {
		t.Fatalf("keytool: %v: %s", err, out)
	}
}

// do sends a request and returns the status and the answer.
func (s *server) do(t *testing.T, method, target string, header http.Header, body io.Reader) (status int, answer string, contentType string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, target, body)
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

func eventually(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited too long")
		}
	}
}

// TestRequests checks answers that do not depend on a submission's state.
func TestRequests(t *testing.T) {
	s := start(t, time.Minute, time.Minute)
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

// TestSubmission follows a submission from the queue until it is deleted.
func TestSubmission(t *testing.T) {
	s := start(t, 3*time.Second, 3*time.Second)
	name, content := `the "sämple".bin`, []byte("\x00\xff\r\n--not the boundary\r\n\r\n\x80")
	accepted := s.submit(t, name, content)
	sum := sha256.Sum256(content)
	if accepted["sha256"] != hex.EncodeToString(sum[:]) || accepted["submitName"] != name || part(accepted, "mediaType.string") == nil {
		t.Errorf("%v", accepted)
	}
	target := fmt.Sprint(s.broker, "/task?submitID=", accepted["ID"])

	status, document := s.get(t, target)
	if status != http.StatusNoContent || document != nil {
		t.Errorf("queued: status %d, %v", status, document)
	}
	status, document = s.get(t, fmt.Sprint(s.broker, "/submit-result?submitID=", accepted["ID"]))
	if status != http.StatusOK || document["fileSize"] != float64(len(content)) || part(document, "digests.SHA-256") != accepted["sha256"] || len(document) != 4 {
		t.Errorf("/submit-result: status %d, %v", status, document)
	}

	eventually(t, func() bool { status, document = s.get(t, target); return status == http.StatusOK })
	if part(document, "result.taskReference.state") != "IN_PROGRESS" || part(document, "result.finalVerdict") != nil {
		t.Errorf("in progress: %v", document)
	}
	eventually(t, func() bool {
		status, document = s.get(t, target)
		return part(document, "result.taskReference.state") == "SUCCESS"
	})
	if part(document, "result.file.hash") != accepted["sha256"] || part(document, "result.finalVerdict.verdict") != "UNKNOWN" || part(document, "result.resources") != nil {
		t.Errorf("finished: %v", document)
	}
	taskID := part(document, "result.taskReference.ID")
	pair := fmt.Sprintf("%s/task?appServerID=%s&taskID=%s", s.broker, s.appServerID, taskID)
	if status, document = s.get(t, pair+"&all=true"); status != http.StatusOK || part(document, "result.resources") == nil {
		t.Errorf("the complete report: status %d, %v", status, document)
	}
	ofNode := fmt.Sprint(s.node, "/task?taskID=", taskID)
	if status, document = s.get(t, ofNode); status != http.StatusOK || part(document, "result.file.hash") != accepted["sha256"] || part(document, "result.finalVerdict") != nil {
		t.Errorf("of the node: status %d, %v", status, document)
	}

	eventually(t, func() bool { status, _ = s.get(t, target); return status == http.StatusNotFound })
	for _, target := range []string{pair, ofNode} {
		if status, _ = s.get(t, target); status != http.StatusNotFound {
			t.Errorf("%s: status %d after the deletion", target, status)
		}
	}
}

// TestArguments checks that a wrong argument ends the program with an error that names it.
func TestArguments(t *testing.T) {
	needJDK(t)
	for want, args := range map[string][]string{
		"unexpected argument --port":              {"--port", "1"},
		"--password is missing\nusage: java":      {"--keystore", "README.md", "--secret", "x"},
		"the keystore README.md cannot be read: ": {"--keystore", "README.md", "--secret", "x", "--password", "x"},
		`--forget "1s" is no number`:              {"--keystore", "README.md", "--secret", "x", "--password", "x", "--forget", "1s"},
	} {
		out, err := exec.CommandContext(t.Context(), "java", append([]string{"Backend.java"}, args...)...).CombinedOutput()
		text := strings.ReplaceAll(string(out), "\r\n", "\n")
		if err == nil || !strings.HasPrefix(text, want) {
			t.Errorf("%v: %v, want %s: %s", args, err, want, text)
		}
	}
}
