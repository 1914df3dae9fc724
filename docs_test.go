package fsbroker_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

// readDoc returns the text of a page of the documentation.
func readDoc(t *testing.T, name string) string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join("docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// problemCodes returns the codes of all problems.
func problemCodes(t *testing.T) map[string]bool {
	t.Helper()
	codes := make(map[string]bool)
	for _, code := range fsbroker.ProblemCodes() {
		codes[code] = true
	}
	if len(codes) < 20 {
		t.Errorf("found only %d codes", len(codes))
	}
	return codes
}

// Every problem links to the row of the table that explains it.
func TestDocsExplainEveryProblem(t *testing.T) {
	page := readDoc(t, "API.md")
	codes := problemCodes(t)
	for code := range codes {
		if !strings.Contains(page, `<a id="`+code+`"></a>`+"`"+code+"`") {
			t.Errorf("the page does not explain %s", code)
		}
	}
	for _, match := range regexp.MustCompile(`<a id="(\w+)">`).FindAllStringSubmatch(page, -1) {
		if !codes[match[1]] {
			t.Errorf("the page explains %s, which there is not", match[1])
		}
	}
}
