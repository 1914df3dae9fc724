// Package examples_test checks the examples: that Caddy formats them as they are and accepts them, and that the one for
// production does what it says. An example is found by the names of its files, Caddyfile and caddy.json.
package examples_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
)

// beCaddy is the environment variable that makes this test binary a Caddy with the module: nothing has to be built, and
// the race detector comes along.
const beCaddy = "FSBROKER_TEST_BE_CADDY"

func TestMain(m *testing.M) {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	m.Run()
}

func TestExamples(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
			return fs.SkipDir // a module of its own, perhaps for another Caddy
		}
		switch entry.Name() {
		case "Caddyfile":
			t.Run(path, func(t *testing.T) { testCaddyfile(t, path) })
		case "caddy.json":
			t.Run(path, func(t *testing.T) { validate(t, readFile(t, path)) })
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func testCaddyfile(t *testing.T, path string) {
	caddy(t, nil, "fmt", absolute(t, path)) // fails where the formatting differs

	adapted := caddy(t, nil, "adapt", "--pretty", "--config", absolute(t, path))
	validate(t, adapted)

	twin := filepath.Join(filepath.Dir(path), "caddy.json")
	if _, err := os.Stat(twin); err != nil {
		return
	}
	if want := readFile(t, twin); !bytes.Equal(adapted, want) {
		t.Errorf("%s is not what %s adapts to: caddy adapt --pretty --config %[2]s >%[1]s", twin, path)
	}
}

// validate has Caddy provision a configuration, which resolves its secrets.
func validate(t *testing.T, config []byte) {
	t.Helper()
	path, _ := withSecrets(t, config)
	caddy(t, nil, "validate", "--config", path)
}

// placeholder is {env.NAME} or {file./path/to/name}, which examples have for secrets and nothing else.
var placeholder = regexp.MustCompile(`\{(?:env\.|file\.(?:[^}]*/)?)([^}/]+)\}`)

// withSecrets makes every placeholder of a configuration one for a file that holds a secret. It writes the configuration
// to a file as well, and returns its path, and the secrets by the names of the variables and files they stand for.
func withSecrets(t *testing.T, config []byte) (path string, secrets map[string]string) {
	t.Helper()
	dir := t.TempDir()
	secrets = make(map[string]string)
	config = placeholder.ReplaceAllFunc(config, func(found []byte) []byte {
		name := string(placeholder.FindSubmatch(found)[1])
		secrets[name] = "the-secret-of-" + name
		file := filepath.Join(dir, name)
		writeFile(t, file, secrets[name]+"\n")
		return []byte("{file." + filepath.ToSlash(file) + "}")
	})
	path = filepath.Join(dir, "caddy.json")
	writeFile(t, path, string(config))
	return path, secrets
}

// TestProduction runs the example for production, for a domain that needs no certificate. The requests end before a node
// or the broker would be asked: there are none.
func TestProduction(t *testing.T) {
	address := freeAddress(t)
	env := []string{"FSBROKER_DOMAIN=http://" + address}
	config, secrets := withSecrets(t, caddy(t, env, "adapt", "--config", absolute(t, "production/Caddyfile")))
	log := start(t, "run", "--config", config)
	log.waitFor(t, "serving initial configuration")

	for _, test := range []struct {
		path   string
		client string
		status int
	}{
		{"/task?submitID=1", "", http.StatusUnauthorized},
		{"/task?submitID=1", "node-1", http.StatusUnauthorized},
		{"/task", "portal", http.StatusBadRequest},
		{"/task?appServerID=node-3&taskID=1", "soc", http.StatusNotFound},
		{"/task?appServerID=node-3&taskID=1", "soc-next", http.StatusNotFound},
		{"/system-info", "broker", http.StatusNotFound},
		{"/", "", http.StatusNotFound},
	} {
		for _, spelling := range []string{"serect", "secret"} {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+test.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			secret := secrets[test.client]
			if test.client != "" {
				query := request.URL.Query()
				query.Set(spelling, secret)
				request.URL.RawQuery = query.Encode()
			}
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != test.status {
				t.Errorf("%s with the secret of %q: got %d, want %d", test.path, test.client, response.StatusCode, test.status)
			}
			logged := log.waitFor(t, "handled request")
			if test.client != "" && !strings.Contains(logged, spelling+"=REDACTED") {
				t.Errorf("%s with the secret of %q: it is not redacted in %s", test.path, test.client, logged)
			}
		}
	}
}

// output is what a running Caddy writes to its log, line by line.
type output struct{ *bufio.Scanner }

// start starts Caddy, until the test ends, or until nobody can be expected to wait for its log any longer.
func start(t *testing.T, args ...string) output {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	command := caddyCommand(ctx, t, nil, args...)
	stderr, err := command.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = command.Wait() // killed
	})
	return output{bufio.NewScanner(stderr)}
}

// waitFor returns the next line of the log with a message.
func (o output) waitFor(t *testing.T, message string) string {
	t.Helper()
	for o.Scan() {
		if line := o.Text(); strings.Contains(line, message) {
			return line
		} else if strings.Contains(line, `"level":"error"`) {
			t.Error(line)
		}
	}
	t.Fatalf("Caddy ended, and never logged %q", message)
	return ""
}

// caddy runs Caddy to its end, which has to be a good one, and returns its output.
func caddy(t *testing.T, env []string, args ...string) []byte {
	t.Helper()
	command := caddyCommand(t.Context(), t, env, args...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.Output()
	if err != nil {
		t.Fatalf("caddy %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return stdout
}

// caddyCommand gives Caddy an environment of its own, as a variable of ours must not get into an example, and a directory
// of its own, as an example's files must not get into ours.
func caddyCommand(ctx context.Context, t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	command := exec.CommandContext(ctx, self, args...)
	command.Dir = home
	command.Env = append([]string{beCaddy + "=1", "CADDY_ADMIN=127.0.0.1:0", "HOME=" + home, "AppData=" + home}, env...)
	return command
}

// TestDockerfile checks that the image's Caddy is the one that the module is tested with.
func TestDockerfile(t *testing.T) {
	var caddy struct{ Version string }
	list := exec.CommandContext(t.Context(), "go", "list", "-m", "-json", "github.com/caddyserver/caddy/v2")
	if out, err := list.Output(); err != nil {
		t.Fatal(err)
	} else if err := json.Unmarshal(out, &caddy); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("ARG CADDY_VERSION=%s\n", strings.TrimPrefix(caddy.Version, "v"))
	if dockerfile := readFile(t, "production/Dockerfile"); !bytes.Contains(dockerfile, []byte(want)) {
		t.Errorf("production/Dockerfile: go.mod wants %s", want)
	}
}

// freeAddress names an address of the loopback interface that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
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
