// Package clients_test runs clients of the Task API against a real Caddy: generated ones, and scripts that poll.
package clients_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The commands that generate the clients, as docs/CLIENTS.md has them.
const (
	generateGo         = "go tool oapi-codegen -generate types,client -package api -o client.gen.go"
	generateTypeScript = "npx openapi-ts -i openapi.yaml -o client"
)

var openAPI = filepath.Join("..", "..", "openapi.yaml")

// need skips the test where a tool is missing.
func need(t *testing.T, tool string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), tool, args...).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: this needs %s, but %q fails: %v %s", tool, append([]string{tool}, args...), err, bytes.TrimSpace(out))
	}
}

// run runs a command. It returns the standard output, and what went wrong with the standard error.
func run(t *testing.T, dir string, env []string, command ...string) (stdout string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir, cmd.Env, cmd.WaitDelay = dir, append(os.Environ(), env...), time.Second
	var out, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &stderr
	began := time.Now()
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	t.Logf("%.1fs: %s", time.Since(began).Seconds(), strings.Join(command, " "))
	return out.String(), err
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

// env returns the variables that the clients read. Each of them has its own for the certificate.
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
	command := strings.Fields(strings.Replace(generateGo, "client.gen.go", generated, 1))
	mustRun(t, ".", nil, append(command, openAPI)...)
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

	s := startSite(t, true)
	mustRun(t, dir, s.env("FSBROKER_SUBMIT_ID="+s.submit(t)), test, "-test.v")

	s = startSite(t, true)
	checkReport(t, mustRun(t, dir, s.env(), program, s.url, s.submit(t)))
}

func TestTypeScript(t *testing.T) {
	need(t, "node", "-e", "const [major, minor] = process.versions.node.split('.').map(Number); if (major < 20 || major === 20 && minor < 19) throw `node ${process.version} is older than 20.19, which openapi-ts requires`")
	need(t, "npm", "--version")
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
	mustRun(t, dir, nil, "npx", "tsc")

	s := startSite(t, true)
	mustRun(t, dir, s.env("FSBROKER_SUBMIT_ID="+s.submit(t)), "node", "dist/check.js")

	s = startSite(t, true)
	checkReport(t, mustRun(t, dir, s.env(), "node", "dist/main.js", s.url, s.submit(t)))
}

// scripts submit a file and poll for its report.
var scripts = []struct {
	name    string
	needs   []string
	command []string
}{
	{"curl", []string{"curl", "--version"}, []string{"sh", "curl/poll.sh"}},
	{"Python", []string{"python3", "-c", "import requests"}, []string{"python3", "python/poll.py"}},
	{"Node", []string{"node", "-e", "fetch"}, []string{"node", "node/poll.mjs"}},
}

func TestScripts(t *testing.T) {
	for _, script := range scripts {
		t.Run(script.name, func(t *testing.T) {
			need(t, script.needs[0], script.needs[1:]...)
			s := startSite(t, true)
			checkReport(t, mustRun(t, ".", s.env(), append(script.command, s.url, "Caddyfile")...))

			// A problem that no polling can cure ends the script.
			out, err := run(t, ".", append(s.env(), "FSBROKER_SECRET=wrong"), append(script.command, s.url, "Caddyfile")...)
			if err == nil || !strings.Contains(err.Error(), `"code":"unauthorized"`) {
				t.Errorf("with a wrong secret, the script ends with %v: %s", err, out)
			}
		})
	}
}
