// Package clients_test runs clients of the Task API against a real Caddy: generated ones, and scripts that poll.
package clients_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// The commands that generate and compile the clients, as docs/CLIENTS.md has them.
const (
	generateGo         = "go tool oapi-codegen -generate types,client -package api -o api/client.gen.go openapi.yaml"
	generateTypeScript = "npx openapi-ts -i openapi.yaml -o client"
	compileTypeScript  = "npx tsc"
)

// The commands that let Java trust the site's certificate, as docs/CLIENTS.md has them.
const (
	importCertificate = "keytool -importcert -noprompt -file root.crt -keystore trust.p12 -storetype PKCS12 -storepass changeit"
	trustStoreOptions = `export JDK_JAVA_OPTIONS="-Djavax.net.ssl.trustStore=trust.p12 -Djavax.net.ssl.trustStorePassword=changeit"`
)

// checked is how long an analysis takes that the generated clients are checked with: much longer than their first wait, and much
// shorter than their second one.
const checked = 8 * time.Second

var openAPI = filepath.Join("..", "..", "openapi.yaml")

// need returns the first of several commands that runs with args. It skips the test if there is none, and says what is
// missing.
func need(t *testing.T, what string, args []string, commands ...string) string {
	t.Helper()
	var failure error
	for _, command := range commands {
		check := exec.CommandContext(testenv.Context(t), command, args...)
		check.Env = append(os.Environ(), testenv.Home(t.TempDir())...)
		if failure = check.Run(); failure == nil {
			return command
		}
	}
	t.Skipf("SKIPPED: %s is missing (%v)", what, failure)
	return ""
}

// needPython prefers the interpreter that comes first in PATH, but only that of the system has packages of the system.
func needPython(t *testing.T) string {
	t.Helper()
	return need(t, "Python with the package requests", []string{"-c", "import requests"}, "python3", "/usr/bin/python3")
}

// needNode needs the version that openapi-ts requires.
func needNode(t *testing.T) string {
	t.Helper()
	const check = "const [major, minor] = process.versions.node.split('.').map(Number);" +
		"process.exit(major > 20 || major === 20 && minor >= 19 ? 0 : 1)"
	return need(t, "Node 20.19 or newer", []string{"-e", check}, "node")
}

func needShell(t *testing.T) string {
	t.Helper()
	need(t, "curl", []string{"--version"}, "curl")
	return need(t, "a shell", []string{"-c", "true"}, "sh")
}

// needJava needs the version that has all methods of Poll.java, with a compiler.
func needJava(t *testing.T) string {
	t.Helper()
	need(t, "keytool", []string{"-help"}, "keytool")
	modules, err := exec.CommandContext(t.Context(), "java", "--list-modules").Output()
	if err != nil {
		t.Skipf("SKIPPED: Java is missing (%v)", err)
	}
	compiler := regexp.MustCompile(`(?m)^jdk\.compiler@(\d+)`).FindSubmatch(modules)
	if compiler == nil {
		t.Skip("SKIPPED: Java has no compiler")
	}
	if version, err := strconv.Atoi(string(compiler[1])); err != nil || version < 17 {
		t.Skipf("SKIPPED: Java %s is too old", compiler[1])
	}
	return "java"
}

// trustStore makes a trust store with the site's certificate, as docs/CLIENTS.md has it, and returns the variable for Java.
func trustStore(t *testing.T, s *site) string {
	t.Helper()
	dir := t.TempDir()
	mustRun(t, dir, nil, strings.Fields(strings.Replace(importCertificate, "root.crt", s.ca, 1))...)
	_, options, _ := strings.Cut(trustStoreOptions, "=")
	return "JDK_JAVA_OPTIONS=" + strings.Replace(strings.Trim(options, `"`), "trust.p12", filepath.ToSlash(filepath.Join(dir, "trust.p12")), 1)
}

// run runs a command. It returns the standard output, and what went wrong with the standard error.
func run(t *testing.T, dir string, env []string, command ...string) (stdout string, err error) {
	t.Helper()
	cmd := exec.CommandContext(testenv.Context(t), command[0], command[1:]...)
	cmd.Dir, cmd.Env = dir, slices.Concat(os.Environ(), homeFor(t, command[0]), env)
	var out, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &stderr
	began := time.Now()
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	t.Logf("%.1fs: %s", time.Since(began).Seconds(), strings.Join(command, " "))
	return out.String(), err
}

// homeFor returns the variables of a home of its own for a program, unless it has its caches of packages in the user's.
func homeFor(t *testing.T, program string) []string {
	t.Helper()
	if program == "go" || program == "npm" {
		return nil
	}
	return testenv.Home(t.TempDir())
}

// mustRun is like run, for a command that must succeed.
func mustRun(t *testing.T, dir string, env []string, command ...string) string {
	t.Helper()
	out, err := run(t, dir, env, command...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return out
}

// env returns the variables that the clients read. Each of them has its own for the certificate. That of Java is the one
// that trustStore returns.
func (s *site) env(more ...string) []string {
	return append(more, "FSBROKER_SITE="+s.url, "FSBROKER_SECRET="+s.secret,
		"SSL_CERT_FILE="+s.ca, "CURL_CA_BUNDLE="+s.ca, "REQUESTS_CA_BUNDLE="+s.ca, "NODE_EXTRA_CA_CERTS="+s.ca)
}

// checkReport checks that a client has printed a finished report.
func checkReport(t *testing.T, printed string) {
	t.Helper()
	var report struct {
		Result struct{ TaskReference struct{ State string } }
	}
	if err := json.Unmarshal([]byte(printed), &report); err != nil || report.Result.TaskReference.State != "SUCCESS" {
		t.Errorf("this is no finished report (%v): %s", err, printed)
	}
}

// The generated code is a file in a temporary folder that the go command takes for one of this module's.
func TestGo(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string {
		path, err := filepath.Abs(name)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	generated := filepath.Join(dir, "client.gen.go")
	command := strings.NewReplacer("api/client.gen.go", generated, "openapi.yaml", openAPI).Replace(generateGo)
	mustRun(t, ".", nil, strings.Fields(command)...)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{file("go/api/client.gen.go"): generated}})
	if err != nil {
		t.Fatal(err)
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	program, test := filepath.Join(dir, "client.exe"), filepath.Join(dir, "client.test.exe")
	mustRun(t, ".", nil, "go", "build", "-overlay", overlayFile, "-tags", "generated", "-o", program, "./go")
	mustRun(t, ".", nil, "go", "test", "-overlay", overlayFile, "-tags", "generated", "-c", "-o", test, "./go")

	s := startSite(t, checked)
	mustRun(t, dir, s.env("FSBROKER_SUBMIT_ID="+s.submit(t)), test, "-test.v")

	s = startSite(t, time.Second)
	checkReport(t, mustRun(t, dir, s.env(), program, s.url, s.submit(t)))
}

func TestTypeScript(t *testing.T) {
	node := needNode(t)
	need(t, "npm", []string{"--version"}, "npm")
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("typescript")); err != nil {
		t.Fatal(err)
	}
	description, err := os.ReadFile(openAPI)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "openapi.yaml"), description, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, dir, nil, "npm", "ci", "--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund")
	mustRun(t, dir, nil, strings.Fields(generateTypeScript)...)
	mustRun(t, dir, nil, strings.Fields(compileTypeScript)...)

	s := startSite(t, checked)
	mustRun(t, dir, s.env("FSBROKER_SUBMIT_ID="+s.submit(t)), node, "dist/check.js")

	s = startSite(t, time.Second)
	checkReport(t, mustRun(t, dir, s.env(), node, "dist/main.js", s.url, s.submit(t)))
}

// scripts submit a file and poll for its report.
var scripts = []struct {
	name string
	tool func(*testing.T) string
	file string
}{
	{"curl", needShell, "curl/poll.sh"},
	{"Python", needPython, "python/poll.py"},
	{"Node", needNode, "node/poll.mjs"},
	{"Java", needJava, "java/Poll.java"},
}

func TestScripts(t *testing.T) {
	for _, script := range scripts {
		t.Run(script.name, func(t *testing.T) {
			tool := script.tool(t)
			s := startSite(t, time.Second)
			env := s.env()
			if script.name == "Java" {
				env = append(env, trustStore(t, s))
			}

			// The first response is 503, which passes. Then come 204 or an unfinished report.
			s.overloaded.Store(true)
			checkReport(t, mustRun(t, ".", env, tool, script.file, s.url, "Caddyfile"))
			if s.overloaded.Load() {
				t.Error("the broker was not asked for a report")
			}

			// A problem that no polling can cure ends the script, whether the client may not submit, or not get a report.
			for secret, code := range map[string]string{"wrong": "unauthorized", s.uploader: "forbidden"} {
				out, err := run(t, ".", append(slices.Clip(env), "FSBROKER_SECRET="+secret), tool, script.file, s.url, "Caddyfile")
				if err == nil || !strings.Contains(err.Error(), `"code":"`+code+`"`) {
					t.Errorf("with the secret of %s, the script ends with %v: %s", code, err, out)
				}
			}
		})
	}
}
