package fsbroker_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// problemCodes are those that the source has.
func problemCodes(t *testing.T) map[string]bool {
	t.Helper()
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	own := regexp.MustCompile(`code: "(\w+)"|refuse\("(\w+)"`)
	ofPeer := regexp.MustCompile(`\.problem\(http\.\w+, "(\w+)"`)
	codes := make(map[string]bool)
	for _, name := range sources {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		for _, match := range own.FindAllStringSubmatch(string(source), -1) {
			codes[match[1]+match[2]] = true
		}
		for _, match := range ofPeer.FindAllStringSubmatch(string(source), -1) {
			codes["node_"+match[1]], codes["broker_"+match[1]] = true, true
		}
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
