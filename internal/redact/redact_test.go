package redact

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

func TestLine(t *testing.T) {
	for line, want := range map[string]string{
		`{"uri":"/task?submitID=1&secret=x&all=true"}`:        `{"uri":"/task?submitID=1&secret=REDACTED&all=true"}`,
		`{"uri":"/task?secret=x&serect=y","status":200}`:      `{"uri":"/task?secret=REDACTED&serect=REDACTED","status":200}`,
		`{"uri":"/task?secret=","status":200}`:                `{"uri":"/task?secret=REDACTED","status":200}`,
		`{"uri":"/task?%53%45cre%54=x%26y&a=b"}`:              `{"uri":"/task?%53%45cre%54=REDACTED&a=b"}`,
		`{"uri":"/in?next=%2Ftask%3Fsecret%3dx%26a%3Db&a=b"}`: `{"uri":"/in?next=%2Ftask%3Fsecret%3dREDACTED&a=b"}`,
		`{"uri":"/in?next=%252Ftask%253F%2573ecret%253Dx"}`:   `{"uri":"/in?next=%252Ftask%253F%2573ecret%253DREDACTED"}`,
		`{"secret":"x&\"y","Secret":["x"],"secrets":"kept"}`:  `{"secret":"REDACTED","Secret":["x"],"secrets":"kept"}`,
		`{"secret": "x", "a": 1}`:                             `{"secret": "REDACTED", "a": 1}`,
		"/task?secret=x\t{\"status\": 200}\n":                 "/task?secret=REDACTED\t{\"status\": 200}\n",
		"secret=x\\\n":                                        "secret=REDACTED\n",
		`secret`:                                              `secret`,
		`secret=`:                                             `secret=REDACTED`,
		`{"uri":"/task?submitID=s%20t&taskID=%41%3D&host=x","=":1,"%":"%2","secret":1,"secret"`: ``,
	} {
		if want == "" {
			want = line
		}
		if got, found := Line([]byte(line)); string(got) != want || found != (want != line) {
			t.Errorf("%q becomes %q (%t), want %q", line, got, found, want)
		}
	}
}

// secretValue matches what redact replaces. It is easier to read, but a regular expression takes 50 µs for an entry.
var secretValue = regexp.MustCompile(`(?i)` +
	`(` + letters("se") + `(?:` + letters("cre") + `|` + letters("rec") + `)` + letters("t") + `(?:=|%(?:25)*3d))` +
	`(?:[^&"\\\x00-\x1f]|\\(?:[^\x00-\x1f]|$)|\\)*` +
	`|(` + letters("se") + `(?:` + letters("cre") + `|` + letters("rec") + `)` + letters("t") + `": ?")(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f]|\\)*`)

// letters returns a pattern for lower-case letters, each of which may be percent-encoded.
func letters(text string) string {
	var pattern strings.Builder
	for _, c := range text {
		fmt.Fprintf(&pattern, `(?:%c|%%(?:25)*(?:%x|%x))`, c, c, unicode.ToUpper(c))
	}
	return pattern.String()
}

func FuzzLine(f *testing.F) {
	f.Add("/task?secret=a&b", "x")
	f.Add("%2573erect%253d\\\"", "\"\t\\")
	f.Fuzz(func(t *testing.T, before, after string) {
		for _, line := range []string{before + after, before + "secret=" + after, before + `"serect":"` + after} {
			got, _ := Line([]byte(line))
			if want := secretValue.ReplaceAllString(line, "${1}${2}"+Placeholder); string(got) != want {
				t.Errorf("%q becomes %q, want %q", line, got, want)
			}
		}
		uri, err := json.Marshal(map[string]string{"uri": before + "?secret=" + strings.ReplaceAll(after, "&", "") + "&" + before})
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := Line(uri); !json.Valid(got) {
			t.Errorf("%s becomes %s, which is not JSON", uri, got)
		}
	})
}
