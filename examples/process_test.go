package examples_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
	_ "github.com/caddy-fsbroker/caddy-fsbroker/examples/webhook"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// beCaddy is the environment variable that makes this test binary run as Caddy with the module. So the tests need no
// separate build of Caddy, and the race detector covers it too.
const beCaddy = "FSBROKER_TEST_BE_CADDY"

func TestMain(m *testing.M) {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	flag.Parse()
	_ = flag.Set("test.parallel", "8") // they mostly wait
	m.Run()
}

// caddyCommand returns a command that runs Caddy with a separate environment and directory. So the examples see no variables
// of the test process, and leave no files in the source tree.
func caddyCommand(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	command := programCommand(t, self(t), args...)
	command.Dir = t.TempDir()
	command.Env = slices.Concat([]string{beCaddy + "=1", "CADDY_ADMIN=127.0.0.1:0"}, testenv.Home(command.Dir), env)
	return command
}

// self returns the path of this test binary.
func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// programCommand returns a command that ends with the test, and has a home of its own. With -short, it skips the test instead.
func programCommand(t *testing.T, program string, args ...string) *exec.Cmd {
	t.Helper()
	if testing.Short() {
		t.Skip("it starts processes")
	}
	command := exec.CommandContext(testenv.Context(t), program, args...)
	command.Env = append(os.Environ(), testenv.Home(t.TempDir())...)
	return command
}

// caddy runs a Caddy command, which must succeed, and returns its output.
func caddy(t *testing.T, env []string, args ...string) []byte {
	t.Helper()
	return outputOf(t, caddyCommand(t, env, args...))
}

// outputOf runs a command, which must succeed, and returns its output.
func outputOf(t *testing.T, command *exec.Cmd) []byte {
	t.Helper()
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.Output()
	if err != nil {
		t.Fatalf("%q: %v\n%s", command.Args, err, &stderr)
	}
	return stdout
}

// process is a program that runs until the test ends. What it logs on its standard error is part of the test's output, and
// holds no secret.
type process struct {
	t     *testing.T
	log   logBuffer
	kill  context.CancelFunc
	ended <-chan struct{} // is closed
	err   error           // how it has ended
}

// startCaddy starts Caddy with a configuration, and waits until it serves.
func startCaddy(t *testing.T, env []string, config string) *process {
	t.Helper()
	p := startProcess(t, caddyCommand(t, env, "run", "--config", config))
	p.waitFor("serving initial configuration")
	return p
}

func startProcess(t *testing.T, command *exec.Cmd) *process {
	t.Helper()
	ended := make(chan struct{})
	p := &process{t: t, ended: ended}
	command.Stderr = io.MultiWriter(&p.log, t.Output())
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = command.Wait()
		close(ended)
	}()
	p.kill = func() {
		_ = command.Process.Kill()
		<-ended
	}
	t.Cleanup(func() {
		p.kill()
		if log := p.log.String(); strings.Contains(log, configuredMark) || strings.Contains(log, plantedMark) {
			t.Error("a secret is logged")
		}
	})
	return p
}

// wantEnd waits until the process has ended, which must not be with an error.
func (p *process) wantEnd() {
	p.t.Helper()
	<-p.ended
	if p.err != nil {
		p.t.Errorf("the process ended with %v", p.err)
	}
}

// waitFor returns the next line of the log that contains message. No line before it may be an error.
func (p *process) waitFor(message string) (line string) {
	p.t.Helper()
	p.eventually(fmt.Sprintf("%q in the log", message), func() bool {
		for line = range p.log.next {
			if strings.Contains(line, message) {
				return true
			}
			if strings.Contains(line, `"level":"error"`) {
				p.t.Error(line)
			}
		}
		return false
	})
	return line
}

// eventually waits until done returns true. The process must not end before.
func (p *process) eventually(what string, done func() bool) {
	p.t.Helper()
	testenv.Eventually(p.t, what, func() bool {
		ended := false
		select {
		case <-p.ended:
			ended = true
		default:
		}
		isDone := done()
		if !isDone && ended {
			p.t.Fatalf("the process ended before %s: %v", what, p.err)
		}
		return isDone
	})
}

// logBuffer is what a process has written.
type logBuffer struct {
	mu   sync.Mutex
	text []byte
	read int // what next has returned
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	return len(p), nil
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// next yields the lines that it has not yielded yet.
func (l *logBuffer) next(yield func(line string) bool) {
	for {
		l.mu.Lock()
		line, _, found := bytes.Cut(l.text[l.read:], []byte("\n"))
		if found {
			l.read += len(line) + 1
		}
		l.mu.Unlock()
		if !found || !yield(string(line)) {
			return
		}
	}
}

// freeAddress returns a loopback address that belongs to the test. Nothing listens on it yet.
func freeAddress(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", testenv.Port(t))
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
