package fsbroker_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

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

// Every problem links to the row of the README's table that explains it.
func TestReadmeExplainsEveryProblem(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	codes := problemCodes(t)
	for code := range codes {
		if !strings.Contains(string(readme), `<a id="`+code+`"></a>`+"`"+code+"`") {
			t.Errorf("the README does not explain %s", code)
		}
	}
	for _, match := range regexp.MustCompile(`<a id="(\w+)">`).FindAllStringSubmatch(string(readme), -1) {
		if !codes[match[1]] {
			t.Errorf("the README explains %s, which there is not", match[1])
		}
	}
}
