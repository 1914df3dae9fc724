package clients_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The page has the programs and the commands that the tests run.
func TestPage(t *testing.T) {
	source, err := os.ReadFile(filepath.Join("..", "..", "docs", "CLIENTS.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(source)

	shown := make(map[string]bool)
	for _, match := range regexp.MustCompile("(?s)\\(\\.\\./examples/clients/([^)]+)\\)[^\n]*\n\n```\\w+\n(.*?)```\n").FindAllStringSubmatch(page, -1) {
		file, err := os.ReadFile(filepath.FromSlash(match[1]))
		if err != nil {
			t.Fatal(err)
		}
		if want := strings.TrimPrefix(string(file), "//go:build generated\n\n"); match[2] != want {
			t.Errorf("the page does not have %s as it is, which is\n%s", match[1], want)
		}
		shown[match[1]] = true
	}
	for _, name := range []string{"curl/poll.sh", "python/poll.py", "node/poll.mjs", "go/main.go", "typescript/main.ts"} {
		if !shown[name] {
			t.Errorf("the page does not have %s", name)
		}
	}

	packages, err := os.ReadFile("typescript/package.json")
	if err != nil {
		t.Fatal(err)
	}
	commands := []string{generateGo, generateTypeScript, compileTypeScript, "npm install --save-dev --save-exact"}
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
	if len(commands) != 9 {
		t.Errorf("the versions are %v", commands[4:])
	}
	for _, command := range commands {
		if !strings.Contains(page, command) {
			t.Errorf("the page does not have %q", command)
		}
	}
}
