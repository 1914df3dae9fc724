package clients_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func readPage(t *testing.T) string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "CLIENTS.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// The page has the programs and the commands that the tests run.
func TestPage(t *testing.T) {
	page := readPage(t)
	shown := make(map[string]bool)
	for _, match := range regexp.MustCompile("(?s)\\(\\.\\./examples/([^)]+)\\)[^\n]*\n\n```\\w+\n(.*?)```\n").FindAllStringSubmatch(page, -1) {
		file, err := os.ReadFile(filepath.Join("..", filepath.FromSlash(match[1])))
		if err != nil {
			t.Fatal(err)
		}
		if want := strings.TrimPrefix(string(file), "//go:build generated\n\n"); match[2] != want {
			t.Errorf("the page does not have %s as it is, which is\n%s", match[1], want)
		}
		shown[match[1]] = true
	}
	for _, name := range []string{
		"clients/curl/poll.sh", "clients/python/poll.py", "clients/node/poll.mjs", "cors/report.js", "clients/java/Poll.java",
		"clients/go/main.go", "clients/typescript/main.ts",
	} {
		if !shown[name] {
			t.Errorf("the page does not have %s", name)
		}
	}

	packages, err := os.ReadFile("typescript/package.json")
	if err != nil {
		t.Fatal(err)
	}
	commands := []string{importCertificate, trustStoreOptions, generateGo, generateTypeScript, compileTypeScript, "npm install --save-dev --save-exact"}
	for _, match := range regexp.MustCompile(`"([@a-z/-]+)": "([0-9.]+)"`).FindAllStringSubmatch(string(packages), -1) {
		commands = append(commands, " "+match[1]+"@"+match[2])
	}
	module, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile(`\t(github.com/oapi-codegen/\S+) (v\S+)`).FindAllStringSubmatch(string(module), -1) {
		commands = append(commands, "@"+match[2])
	}
	if len(commands) != 11 {
		t.Errorf("the versions are %v", commands[6:])
	}
	for _, command := range commands {
		if !strings.Contains(page, command) {
			t.Errorf("the page does not have %q", command)
		}
	}
}

// TestCommands runs the page's commands of one line. They get the report of a submission, and then of the file.
func TestCommands(t *testing.T) {
	shell := needShell(t)
	need(t, "sha256sum", []string{"--version"}, "sha256sum")
	s := startSite(t, time.Second)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "sample.exe"), []byte(submitted), 0o600); err != nil {
		t.Fatal(err)
	}
	env := s.env("ID=" + s.submit(t))
	commands := regexp.MustCompile(`(?m)^curl .*$`).FindAllString(readPage(t), -1)
	if len(commands) != 2 {
		t.Errorf("the page has the commands %q", commands)
	}
	for _, command := range commands {
		command = strings.Replace(command, "https://fsbroker.example.com", s.url, 1)
		checkReport(t, mustRun(t, dir, env, shell, "-c", command))
	}
}
