// Package examples_test checks that the examples are formatted and valid, and runs some of them. It finds an example by
// the names of its files, Caddyfile and caddy.json.
package examples_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
)

// beCaddy is the environment variable that makes this test binary run as Caddy with the module. So the tests need no
// separate build of Caddy, and the race detector covers it too.
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
			return fs.SkipDir // a nested module, which may use another Caddy
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
	caddy(t, nil, "fmt", absolute(t, path)) // fails if the formatting differs

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

// validate runs `caddy validate`, which provisions the configuration and resolves its secrets.
func validate(t *testing.T, config []byte) {
	t.Helper()
	path, _ := withSecrets(t, config)
	caddy(t, nil, "validate", "--config", path)
}

// placeholder matches {env.NAME} and {file./path/to/name}. The examples use these only for secrets.
var placeholder = regexp.MustCompile(`\{(?:env\.|file\.(?:[^}]*/)?)([^}/]+)\}`)

// withSecrets replaces every placeholder of a configuration with one for a file that contains a secret. It writes the
// configuration to a file. It returns the path of that file, and the secrets by the names of the variables and files.
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

// TestProduction runs the production example with a domain that needs no certificate. There are no nodes and no broker,
// so it sends only requests that do not reach them.
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
				t.Errorf("%s with the secret of %q: the secret is not redacted in %s", test.path, test.client, logged)
			}
		}
	}
}

// TestRateLimit checks that fail2ban counts exactly the requests without a valid secret.
func TestRateLimit(t *testing.T) {
	filter := regexp.MustCompile(`(?m)^failregex = (.*)$`).FindSubmatch(readFile(t, "rate-limit/fail2ban/filter.d/caddy-fsbroker.conf"))
	if filter == nil {
		t.Fatal("the filter has no failregex")
	}
	counted := regexp.MustCompile(strings.Replace(string(filter[1]), "<HOST>", `(?P<host>[0-9.]+)`, 1))
	logs := t.TempDir()

	site, secrets := startExample(t, "rate-limit/Caddyfile", "LOGS_DIRECTORY="+logs, "CLIENTS=127.0.0.0/8")
	requests := []struct {
		path, secret, userAgent string
		status                  int
	}{
		{"/task", "", "", 401},
		{"/task", "wrong", "", 401},
		{"/TA%53K", "wrong", "", 401},
		{"/task", secrets["PORTAL_SECRET"], "", 400},
		{"/task", secrets["PORTAL_SECRET"], `"client_ip":"192.0.2.1","status":401,"fsbroker; detail=unauthorized"`, 400},
	}
	for _, request := range requests {
		if response := get(t, site+request.path, request.secret, request.userAgent); response.StatusCode != request.status {
			t.Errorf("%+v: got %d", request, response.StatusCode)
		}
	}
	var lines []string
	for deadline := time.Now().Add(5 * time.Second); len(lines) < len(requests) && time.Now().Before(deadline); {
		log := readFile(t, filepath.Join(logs, "fsbroker.log"))
		lines = slices.Collect(strings.Lines(string(log)))
	}
	for i, line := range lines {
		match := counted.FindStringSubmatch(line)
		if wrong := requests[i].status == http.StatusUnauthorized; wrong != (match != nil) || wrong && match[1] != "127.0.0.1" {
			t.Errorf("%+v: the filter finds %q in %s", requests[i], match, line)
		}
	}

	site, _ = startExample(t, "rate-limit/Caddyfile", "LOGS_DIRECTORY="+t.TempDir())
	if response, err := http.Get(site + "/task"); err == nil {
		response.Body.Close()
		t.Errorf("from a network that is not allowed: got %d", response.StatusCode)
	}
}

// TestMigration sends the same requests to the site before and after the migration.
func TestMigration(t *testing.T) {
	startUpstream := func(name string) *httptest.Server {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = fmt.Fprintf(w, `{"result":{"from":"%s","path":"%s"}}`, name, r.URL.Path)
		}))
		t.Cleanup(server.Close)
		return server
	}
	broker, node := startUpstream("broker"), startUpstream("node-1")
	const task = "/task?appServerID=node-1&taskID=1"
	for folder, wanted := range map[string]map[string]string{
		"before": {
			task:      `{"result":{"from":"broker","path":"/task"}}`,
			"/submit": `{"result":{"from":"broker","path":"/submit"}}`,
		},
		"after": {
			task:      `{"result":{"from":"node-1","path":"/task"}}`,
			"/submit": `{"result":{"from":"broker","path":"/submit"}}`,
		},
	} {
		t.Run(folder, func(t *testing.T) {
			site, secrets := startExample(t, "migration/"+folder+"/Caddyfile",
				"BROKER="+strings.TrimPrefix(broker.URL, "http://"), "NODE_1="+strings.TrimPrefix(node.URL, "http://"))
			for path, want := range wanted {
				for _, secretParam := range []string{"serect", "secret", ""} {
					url, bearer := site+path, secrets["BROKER_SECRET"]
					if secretParam != "" {
						separator := "?"
						if strings.Contains(path, "?") {
							separator = "&"
						}
						url, bearer = url+separator+secretParam+"="+bearer, ""
					}
					response := get(t, url, bearer, "")
					if got := response.body; got != want {
						t.Errorf("%s with %q: %d %s", path, secretParam, response.StatusCode, got)
					}
				}
			}
			if status := get(t, site+task, "", "").StatusCode; folder == "after" && status != http.StatusUnauthorized {
				t.Errorf("without a secret: got %d", status)
			}
			if status := get(t, site+task+"&taskID=2", secrets["BROKER_SECRET"], "").StatusCode; folder == "after" && status != http.StatusBadRequest {
				t.Errorf("with a repeated parameter: got %d", status)
			}
		})
	}
}

// response is an HTTP response with its body.
type response struct {
	*http.Response
	body string
}

// get sends a GET request, with a secret and a User-Agent unless they are empty.
func get(t *testing.T, url, secret, userAgent string) response {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if secret != "" {
		request.Header.Set("Authorization", "Bearer "+secret)
	}
	if userAgent != "" {
		request.Header.Set("User-Agent", userAgent)
	}
	r, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{r, string(body)}
}

// startExample runs an example with the given environment variables. It sets $SITE, and returns the site's URL.
func startExample(t *testing.T, path string, env ...string) (site string, secrets map[string]string) {
	t.Helper()
	site = "http://" + freeAddress(t)
	config, secrets := withSecrets(t, caddy(t, append(env, "SITE="+site), "adapt", "--config", absolute(t, path)))
	start(t, "run", "--config", config).waitFor(t, "serving initial configuration")
	return site, secrets
}

// TestSecretsAreGiven checks that systemd and Docker Compose give Caddy exactly the secrets that the Caddyfile reads.
func TestSecretsAreGiven(t *testing.T) {
	for _, test := range []struct{ runner, given, caddyfile string }{
		{"systemd/caddy.service", `(?m)^LoadCredential=([\w-]+):/etc/caddy/secrets/([\w-]+)$`, "systemd/Caddyfile"},
		{"compose/compose.yaml", `(?m)^  ([\w-]+):\n    file: secrets/([\w-]+)$`, "production/Caddyfile"},
	} {
		var given []string
		for _, match := range regexp.MustCompile(test.given).FindAllStringSubmatch(string(readFile(t, test.runner)), -1) {
			given = append(given, match[1])
			if match[1] != match[2] {
				t.Errorf("%s: %s is read from %s", test.runner, match[1], match[2])
			}
		}
		var read []string
		for _, match := range regexp.MustCompile(`\{file\..*/([\w-]+)\}`).FindAllStringSubmatch(string(readFile(t, test.caddyfile)), -1) {
			read = append(read, match[1])
		}
		slices.Sort(given)
		slices.Sort(read)
		if !slices.Equal(given, slices.Compact(read)) {
			t.Errorf("%s gives %q, %s reads %q", test.runner, given, test.caddyfile, read)
		}
	}
	compose := readFile(t, "compose/compose.yaml")
	if list := regexp.MustCompile(`secrets: \[(.*)\]`).FindSubmatch(compose); list == nil {
		t.Error("the service in compose.yaml has no secrets")
	} else {
		for name := range strings.SplitSeq(string(list[1]), ", ") {
			if !bytes.Contains(compose, []byte("\n  "+name+":\n    file: ")) {
				t.Errorf("compose.yaml has no file for %s", name)
			}
		}
	}
}

// output reads the log of a running Caddy, line by line.
type output struct{ *bufio.Scanner }

// start starts Caddy. It is killed when the test ends, or after a minute.
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

// waitFor returns the next line of the log that contains message.
func (o output) waitFor(t *testing.T, message string) string {
	t.Helper()
	for o.Scan() {
		if line := o.Text(); strings.Contains(line, message) {
			return line
		} else if strings.Contains(line, `"level":"error"`) {
			t.Error(line)
		}
	}
	t.Fatalf("Caddy ended without logging %q", message)
	return ""
}

// caddy runs a Caddy command, which must succeed, and returns its output.
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

// caddyCommand returns a command that runs Caddy with a separate environment and directory. So the examples see no
// variables of the test process, and leave no files in the source tree.
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

// TestDockerfile checks that the image has the Caddy version of go.mod.
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
		t.Errorf("production/Dockerfile: go.mod requires %s", want)
	}
}

// freeAddress returns a loopback address on which no process listens.
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
