package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// beQuickstart is the environment variable that makes this test binary run as the quickstart.
const beQuickstart = "FSBROKER_TEST_BE_QUICKSTART"

func TestMain(m *testing.M) {
	if os.Getenv(beQuickstart) != "" {
		main()
		return
	}
	flag.Parse()
	_ = flag.Set("test.parallel", "8") // they mostly wait
	m.Run()
}

// quickstart is a running quickstart.
type quickstart struct {
	cmd     *exec.Cmd
	temp    string // its folder for temporary files
	home    string
	stdout  io.ReadCloser
	printed *bufio.Scanner // reads stdout
	log     stderr
}

// stderr is what a program writes to its standard error.
type stderr struct {
	text  bytes.Buffer  // may be read when the program has ended
	begun chan struct{} // is closed by the first write
}

func (s *stderr) Write(p []byte) (int, error) {
	if s.text.Len() == 0 {
		close(s.begun)
	}
	return s.text.Write(p)
}

// start runs the program as a user does, until stop is called. The site has a port that is reserved, because the program gives
// it back for a moment before Caddy listens.
func start(t *testing.T, args ...string) *quickstart {
	t.Helper()
	if testing.Short() {
		t.Skip("it starts processes")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	q := &quickstart{temp: t.TempDir(), home: t.TempDir(), log: stderr{begun: make(chan struct{})}}
	site := fmt.Sprintf("-port=%d", testenv.Port(t))
	q.cmd = program(t, q.home, self, append(args, site, "-broker-port=0", "-node-1-port=0", "-node-2-port=0")...)
	q.cmd.Env = append(q.cmd.Env, beQuickstart+"=1", "TMPDIR="+q.temp, "TMP="+q.temp)
	q.cmd.Stderr = io.MultiWriter(&q.log, t.Output())
	if q.stdout, err = q.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	q.printed = bufio.NewScanner(q.stdout)
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = q.cmd.Process.Kill() // if stop was not called
		_ = q.cmd.Wait()
	})
	return q
}

// program returns a command with a home of its own.
func program(t *testing.T, home, name string, args ...string) *exec.Cmd {
	t.Helper()
	command := exec.CommandContext(testenv.Context(t), name, args...)
	command.Env = append(os.Environ(), testenv.Home(home)...)
	return command
}

// command returns the next command that the program prints.
func (q *quickstart) command(t *testing.T) string {
	t.Helper()
	for q.printed.Scan() {
		if command := q.printed.Text(); strings.HasPrefix(command, "curl") {
			return command
		}
	}
	t.Fatal("the program ended without another command")
	return ""
}

// stop sends a signal, and checks that the program leaves nothing behind.
func (q *quickstart) stop(t *testing.T, signal os.Signal) {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("signals cannot be sent on Windows")
	}
	if err := q.cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	if err := q.cmd.Wait(); err != nil {
		t.Errorf("the program ended with %v: %s", err, &q.log.text)
	}
	for _, folder := range []string{q.temp, q.home} {
		if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
			t.Errorf("the program left %v in %s (%v)", left, folder, err)
		}
	}
}

// TestCommands runs the printed commands in each shell, and commands like them that fail.
func TestCommands(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"sh", "bash", "zsh", "pwsh", "powershell"} {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(shell); err != nil {
				t.Skip(err)
			}
			q := startFast(t)
			testShell(t, shell, q, q.command(t))
			q.stop(t, os.Interrupt)
		})
	}
	t.Run("nobody asks", func(t *testing.T) {
		t.Parallel()
		q := startFast(t)
		testUnasked(t, q, q.command(t))
		q.stop(t, os.Interrupt)
	})
	t.Run("failing", func(t *testing.T) {
		t.Parallel()
		testFailing(t, startFast(t))
	})
}

// startFast starts a program whose nodes are fast. They keep a task for much longer than it takes to get its reports.
func startFast(t *testing.T) *quickstart {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("the printed commands need curl")
	}
	return start(t, "-analysis=1s", "-forget=15s")
}

// testFailing runs commands that fail, and checks that no secret is logged.
func testFailing(t *testing.T, q *quickstart) {
	site := siteOf(q.command(t))
	config := only(t, filepath.Join(q.temp, "*", "curl.conf"))
	secret := secretOf(t, config)
	testErrors(t, site, config, secret)

	index := curl(t, "-K", config, "-i", site+"/")
	for _, want := range []string{"content-type: text/plain", "/submit ", "/submit-result?", "/task?", "UNKNOWN"} {
		if !strings.Contains(index, want) {
			t.Errorf("the index does not have %q: %s", want, index)
		}
	}

	plantSecrets(t, q.temp, site)
	checkAccessLog(t, q.temp, secret)
	q.stop(t, os.Interrupt)
	if log := q.log.text.String(); strings.Contains(log, planted) || strings.Contains(log, secret) {
		t.Errorf("a secret is in the log: %s", log)
	}
}

// testShell submits a file with a shell, waits for its report, and gets the report again when the node has deleted it.
func testShell(t *testing.T, shell string, q *quickstart, submit string) {
	run := func(command string) string {
		t.Helper()
		if runtime.GOOS != "windows" && strings.ContainsAny(command, "$`!'\\;|#") {
			t.Errorf("%s: shells differ in what its characters mean", command)
		}
		out, err := program(t, t.TempDir(), shell, "-c", command).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		return string(out)
	}
	parameter := "submitID=" + submissionID(t, run(submit))

	wait := q.command(t)
	head, report, _ := strings.Cut(run(wait), "\r\n\r\n")
	if !strings.Contains(wait, parameter+"&wait=60") || !strings.HasPrefix(head, "HTTP/2 200") {
		t.Fatalf("%s: %s", wait, head)
	}
	submitted, err := sample(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	checkReport(t, report, submitted)

	again, bypass := q.command(t), q.command(t)
	head, body, _ := strings.Cut(run(again), "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/2 200") || !strings.Contains(head, "cache-status: fsbroker; hit") || body != report {
		t.Errorf("%s: %s: %s, want %s", again, head, body, report)
	}
	if out := run(bypass); !strings.HasPrefix(out, "HTTP/2 404") || !strings.Contains(out, `"code":"unknown_submission"`) {
		t.Errorf("%s: %s", bypass, out)
	}
}

// testUnasked submits a file, and asks for its reports only when the node has deleted them.
func testUnasked(t *testing.T, q *quickstart, submit string) {
	out, err := program(t, t.TempDir(), "sh", "-c", submit).Output()
	if err != nil {
		t.Fatal(err)
	}
	id := submissionID(t, string(out))
	_, again, _ := q.command(t), q.command(t), q.command(t)
	config := only(t, filepath.Join(q.temp, "*", "curl.conf"))
	for _, kind := range []string{"", "&all=true"} {
		out := curl(t, "-K", config, "-i", siteOf(again)+"/task?submitID="+id+kind)
		if !strings.HasPrefix(out, "HTTP/2 200") || !strings.Contains(out, "cache-status: fsbroker; hit") {
			t.Errorf("%s: %s", kind, out)
		}
	}
}

// testErrors checks that the commands get an error if the submission is unknown, the secret is wrong or the file is too large.
func testErrors(t *testing.T, site, config, secret string) {
	wrong := filepath.Join(t.TempDir(), "curl.conf")
	content, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(wrong, bytes.Replace(content, []byte(secret), []byte(planted), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(t.TempDir(), "large")
	if err := os.WriteFile(large, make([]byte, 33<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, want string
		args       []string
	}{
		{"unknown submission", "HTTP/2 404", []string{"-K", config, site + "/task?submitID=unknown&wait=60"}},
		{"wrong secret", "HTTP/2 401", []string{"-K", wrong, site + "/task?submitID=unknown&wait=60"}},
		{"submit with a wrong secret", "HTTP/2 401", []string{"-K", wrong, "-F", "file=@" + config, site + "/submit"}},
		{"large file", "HTTP/2 413", []string{"-K", config, "-F", "file=@" + large, site + "/submit"}},
	} {
		if out := curl(t, append(test.args, "-i")...); !strings.HasPrefix(out, test.want) {
			t.Errorf("%s: %s, want %s", test.name, out, test.want)
		}
	}
}

// siteOf returns the URL of the site in a printed command.
func siteOf(command string) string {
	return regexp.MustCompile(`https://localhost:\d+`).FindString(command)
}

// submissionID returns the ID in the response to /submit.
func submissionID(t *testing.T, response string) string {
	t.Helper()
	var accepted struct{ AcceptedFiles []struct{ ID string } }
	if err := json.Unmarshal([]byte(response), &accepted); err != nil || len(accepted.AcceptedFiles) != 1 {
		t.Fatalf("%v: %s", err, response)
	}
	return accepted.AcceptedFiles[0].ID
}

// curl runs curl, which must get a response.
func curl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := program(t, t.TempDir(), "curl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("curl %q: %v: %s", args, err, out)
	}
	return string(out)
}

// only returns the path of the only file that matches a pattern.
func only(t *testing.T, pattern string) string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) != 1 {
		t.Fatalf("%s: %v (%v)", pattern, paths, err)
	}
	return paths[0]
}

// secretOf returns the secret in the options for curl.
func secretOf(t *testing.T, config string) string {
	t.Helper()
	content, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	_, secret, _ := strings.Cut(string(content), "Bearer ")
	secret, _, _ = strings.Cut(secret, `"`)
	return secret
}

// TestSignals ends the program in all ways.
func TestSignals(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			q := start(t)
			q.command(t)
			q.stop(t, signal)
		})
	}
	t.Run("during the start", func(t *testing.T) {
		t.Parallel()
		q := start(t)
		<-q.log.begun // by Caddy
		q.stop(t, syscall.SIGHUP)
	})
	t.Run("without a reader", func(t *testing.T) {
		if _, err := exec.LookPath("curl"); err != nil {
			t.Skip("submitting needs curl")
		}
		t.Parallel()
		q := start(t, "-analysis=100ms")
		site := siteOf(q.command(t))
		if err := q.stdout.Close(); err != nil {
			t.Fatal(err)
		}
		config := only(t, filepath.Join(q.temp, "*", "curl.conf"))
		id := submissionID(t, curl(t, "-K", config, "-F", "file=@"+config, site+"/submit"))
		curl(t, "-K", config, site+"/task?wait=60&submitID="+id) // the program has printed something meanwhile
		q.stop(t, syscall.SIGTERM)
	})
}

// planted is a wrong secret.
const planted = "planted-secret"

// planter is the User-Agent of the requests with the planted secret.
const planter = "planter/1.0"

// plantSecrets sends requests with the planted secret in all ways to the site.
func plantSecrets(t *testing.T, temp, site string) {
	t.Helper()
	authority := only(t, filepath.Join(temp, "*", "pki", "authorities", "local", "root.crt"))
	send := func(path string, header ...string) {
		arguments := []string{"-sS", "-o", os.DevNull, "--cacert", authority, "-A", planter, site + path}
		for _, field := range header {
			arguments = append(arguments, "-H", field)
		}
		curl(t, arguments...)
	}
	for _, path := range []string{"/task", "/submit", "/elsewhere"} {
		send(path+"?secret="+planted+"&%73erect="+planted,
			"Authorization: Bearer "+planted, "Secret: "+planted, "X-Api-Key: "+planted, "Referer: https://localhost/?secret="+planted)
	}
}

// checkAccessLog checks that the access log has the requests, but no secret.
func checkAccessLog(t *testing.T, temp, secret string) {
	t.Helper()
	path := only(t, filepath.Join(temp, "*", "access.log"))
	var log string
	testenv.Eventually(t, "the requests in the access log", func() bool {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		log = string(content)
		return strings.Count(log, planter) >= 3
	})
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
			File         struct{ Format string }
			FinalVerdict struct{ Verdict string }
		}
	}
	if err := json.Unmarshal([]byte(output), &report); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	if verdict := report.Result.FinalVerdict.Verdict; verdict != "UNKNOWN" {
		t.Errorf("the verdict is %q, but the quickstart says that it is always UNKNOWN", verdict)
	}
	file, err := os.ReadFile(submitted)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(file)
	if r := report.Result.TaskReference; r.State != "SUCCESS" || r.AdditionalInfo.Digests["SHA-256"] != hex.EncodeToString(sum[:]) {
		t.Errorf("the report is %s", output)
	}
	if runtime.GOOS == "linux" && report.Result.File.Format != "ELF" {
		t.Errorf("the format of the file is %q", report.Result.File.Format)
	}
}

// TestPortsTaken checks that one error names all ports in use, and the flags for others, and that nothing is left behind.
func TestPortsTaken(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	t.Setenv("TMP", temp)
	port := func() string {
		taken, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = taken.Close() })
		_, port, _ := net.SplitHostPort(taken.Addr().String())
		return port
	}
	site, broker, node := port(), port(), port()
	for _, test := range []struct {
		args []string
		want []string
	}{
		{[]string{"-port=" + site, "-broker-port=0", "-node-1-port=0", "-node-2-port=0"}, []string{"port " + site + ":", "with -port=0"}},
		{
			[]string{"-port=" + site, "-broker-port=" + broker, "-node-1-port=0", "-node-2-port=" + node},
			[]string{"port " + site + ":", "port " + broker + ":", "port " + node + ":", "with -port=0 -broker-port=0 -node-2-port=0"},
		},
		{[]string{"-port=0", "-broker-port=0", "-node-1-port=99999", "-node-2-port=0"}, []string{"port 99999:", "with -node-1-port=0"}},
	} {
		err := run(t.Context(), test.args, io.Discard)
		if err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", test.args, err)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %s", test.args, err, want)
			}
		}
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("the program left %v (%v)", left, err)
	}
}

func TestBadFlags(t *testing.T) {
	for flag, want := range map[string]string{
		"submit":      `unexpected argument "submit"`,
		"-port=many":  "invalid value",
		"-forget=-1s": "cannot be negative",
	} {
		err := run(t.Context(), []string{flag}, os.Stderr)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", flag, err, want)
		}
	}
}
