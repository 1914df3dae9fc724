package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestPrintedLines runs the command, runs the printed commands in a shell, and sends Ctrl-C.
func TestPrintedLines(t *testing.T) {
	for _, tool := range []string{"sh", "curl", "sed", "grep"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the printed commands need a shell with curl: %v", err)
		}
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "quickstart")
	if runtime.GOOS == "windows" {
		program += ".exe"
	}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	temp := filepath.Join(dir, "temp")
	if err := os.Mkdir(temp, 0o700); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-port=0", "-broker-port=0", "-node-1-port=0", "-node-2-port=0", "-analysis=1s", "-forget=1s")
	cmd.Env = append(os.Environ(), "TMPDIR="+temp, "TMP="+temp, "HOME="+filepath.Join(dir, "home"))
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines, secret := pasteable(t, bufio.NewScanner(stdout))

	// Run all lines in one shell, as if they were pasted. The markers separate their outputs.
	const marker = "----- next line -----"
	script := strings.Join(lines, "\necho '"+marker+"'\n")
	out, err := exec.CommandContext(ctx, "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s\n%s", err, out, stderr.String())
	}
	outputs := strings.Split(string(out), marker+"\n")
	if len(outputs) != 4 {
		t.Fatalf("got %d outputs: %s", len(outputs), out)
	}

	if id, ok := strings.CutPrefix(strings.TrimSpace(outputs[0]), "submission "); !ok || len(id) != 26 {
		t.Errorf("1: %s", outputs[0])
	}
	submitted, err := sample(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	checkReport(t, outputs[1], submitted)
	head, body, _ := strings.Cut(outputs[2], "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/2 200") || !strings.Contains(head, "cache-status: fsbroker; hit") {
		t.Errorf("3: %s", head)
	}
	if strings.TrimSpace(body) != strings.TrimSpace(outputs[1]) {
		t.Errorf("3: the report differs from that in 2: %s", body)
	}
	if !strings.HasPrefix(outputs[3], "HTTP/2 404") || !strings.Contains(outputs[3], `"code":"unknown_submission"`) {
		t.Errorf("4: %s", outputs[3])
	}

	plantSecrets(ctx, t, temp, lines[1])
	checkAccessLog(t, temp, secret)

	if runtime.GOOS == "windows" {
		t.Skip("Ctrl-C cannot be sent on Windows")
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the command ended with %v: %s", err, stderr.String())
	}
	if log := stderr.String(); strings.Contains(log, planted) || strings.Contains(log, secret) {
		t.Errorf("a secret is in the log: %s", log)
	}
	for _, folder := range []string{temp, filepath.Join(dir, "home")} {
		if left, err := os.ReadDir(folder); len(left) > 0 {
			t.Errorf("the command left %v in %s (%v)", left, folder, err)
		}
	}
}

// pasteable returns the commands that the quickstart prints, and the secret in them.
func pasteable(t *testing.T, printed *bufio.Scanner) (lines []string, secret string) {
	t.Helper()
	for len(lines) < 4 && printed.Scan() {
		if strings.Contains(printed.Text(), "curl ") {
			lines = append(lines, printed.Text())
		}
	}
	if len(lines) != 4 {
		t.Fatalf("got %d lines with curl (%v)", len(lines), printed.Err())
	}
	_, secret, _ = strings.Cut(lines[1], "Bearer ")
	secret, _, _ = strings.Cut(secret, "'")
	return lines, secret
}

// planted is a wrong secret.
const planted = "planted-secret"

// planter is the User-Agent of the requests with the planted secret.
const planter = "planter/1.0"

// plantSecrets sends requests with the planted secret in all ways to the site of a printed command.
func plantSecrets(ctx context.Context, t *testing.T, temp, line string) {
	t.Helper()
	site := regexp.MustCompile(`https://localhost:\d+`).FindString(line)
	authorities, err := filepath.Glob(filepath.Join(temp, "*", "pki", "authorities", "local", "root.crt"))
	if err != nil || len(authorities) != 1 {
		t.Fatalf("certificates: %v (%v)", authorities, err)
	}
	send := func(path string, header ...string) {
		arguments := []string{"-sS", "-o", os.DevNull, "--cacert", authorities[0], "-A", planter, site + path}
		for _, field := range header {
			arguments = append(arguments, "-H", field)
		}
		if out, err := exec.CommandContext(ctx, "curl", arguments...).CombinedOutput(); err != nil {
			t.Fatalf("curl: %v: %s", err, out)
		}
	}
	for _, path := range []string{"/task", "/submit", "/elsewhere"} {
		send(path+"?secret="+planted+"&%73erect="+planted,
			"Authorization: Bearer "+planted, "Secret: "+planted, "X-Api-Key: "+planted, "Referer: https://localhost/?secret="+planted)
	}
}

// checkAccessLog checks that the access log has the requests, but no secret.
func checkAccessLog(t *testing.T, temp, secret string) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(temp, "*", "access.log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("access logs: %v (%v)", logs, err)
	}
	var log string
	for deadline := time.Now().Add(5 * time.Second); strings.Count(log, planter) < 3; time.Sleep(10 * time.Millisecond) {
		content, err := os.ReadFile(logs[0])
		if err != nil {
			t.Fatal(err)
		}
		if log = string(content); time.Now().After(deadline) {
			t.Fatalf("the access log does not have the requests: %s", log)
		}
	}
	if !strings.Contains(log, "secret=REDACTED") || len(secret) != 26 || strings.Contains(log, secret) || strings.Contains(log, planted) {
		t.Errorf("the access log is wrong, or has the secret %q or %q: %s", secret, planted, log)
	}
}

func checkReport(t *testing.T, output, submitted string) {
	t.Helper()
	var report struct {
		Result struct {
			TaskReference struct {
				State          string
				AdditionalInfo struct{ Digests map[string]string }
			}
			File struct{ Format string }
		}
	}
	if err := json.Unmarshal([]byte(output), &report); err != nil {
		t.Fatalf("2: %v: %s", err, output)
	}
	file, err := os.ReadFile(submitted)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(file)
	if r := report.Result.TaskReference; r.State != "SUCCESS" || r.AdditionalInfo.Digests["SHA-256"] != hex.EncodeToString(sum[:]) {
		t.Errorf("2: %s", output)
	}
	if runtime.GOOS == "linux" && report.Result.File.Format != "ELF" {
		t.Errorf("2: the format of the file is %q", report.Result.File.Format)
	}
}

// TestPortTaken checks that the error for a port in use names the flag for another port.
func TestPortTaken(t *testing.T) {
	taken, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	for _, flag := range []string{"-port", "-broker-port", "-node-1-port", "-node-2-port"} {
		args := []string{"-port=0", "-broker-port=0", "-node-1-port=0", "-node-2-port=0", flag + "=" + port}
		err := run(t.Context(), args, io.Discard)
		if err == nil || !strings.HasSuffix(err.Error(), "choose another port with "+flag) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", flag, err)
		}
	}
}

func TestBadFlags(t *testing.T) {
	for flag, want := range map[string]string{
		"submit":      `unexpected argument "submit"`,
		"-port=many":  "invalid value",
		"-port=99999": "choose another port with -port",
		"-forget=-1s": "cannot be negative",
	} {
		err := run(t.Context(), []string{"-broker-port=0", "-node-1-port=0", "-node-2-port=0", flag}, os.Stderr)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", flag, err, want)
		}
	}
}
