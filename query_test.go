package fsbroker

import (
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

func TestParseQuery(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	for raw, want := range map[string]parsedQuery{
		"submitID=s1":                              {query: query{target: target{ID: harvest.ID{SubmitID: "s1"}}}, given: paramSubmitID},
		"submitID=s1&all&nocache":                  {query: query{target: target{ID: harvest.ID{SubmitID: "s1"}, kind: task.Complete}, nocache: true}, given: paramSubmitID | paramAll | paramNoCache},
		"&&taskID=t%201&appServerID=a+b&":          {query: query{target: target{ID: harvest.ID{AppServerID: "a b", TaskID: "t 1"}}}, given: paramAppServerID | paramTaskID},
		"appServerID=a&taskID=t&all=no&secret=%26": {query: query{target: target{ID: harvest.ID{AppServerID: "a", TaskID: "t"}}}, secret: "&", given: paramAppServerID | paramTaskID | paramAll | paramSecret},
		"serect=x=y&submitID=s%C3%A4":              {query: query{target: target{ID: harvest.ID{SubmitID: "sä"}}}, serect: "x=y", given: paramSubmitID | paramSerect},
		"secret&submitID=s1":                       {query: query{target: target{ID: harvest.ID{SubmitID: "s1"}}}, given: paramSubmitID | paramSecret},
		"sha256=" + sum:                            {query: query{sha256: sum}, given: paramSHA256},
		"all&sha256=" + strings.ToUpper(sum):       {query: query{target: target{kind: task.Complete}, sha256: strings.ToUpper(sum)}, given: paramSHA256 | paramAll},
		"submitID=s1&wait=0":                       {query: query{target: target{ID: harvest.ID{SubmitID: "s1"}}}, given: paramSubmitID | paramWait},
		"submitID=s1&wait=030":                     {query: query{target: target{ID: harvest.ID{SubmitID: "s1"}}}, wait: 30, given: paramSubmitID | paramWait},
		"submitID=s1&wait=99999999999999999999":    {query: query{target: target{ID: harvest.ID{SubmitID: "s1"}}}, wait: math.MaxUint32, given: paramSubmitID | paramWait},
	} {
		if got := parseQuery(raw); got != want {
			t.Errorf("%s: %+v, want %+v", raw, got, want)
		}
	}
}

func TestPreferredWait(t *testing.T) {
	for prefer, want := range map[string]uint32{
		"":                                     0,
		"wait=7":                               7,
		"WAIT = 7":                             7,
		`wait="7"`:                             7,
		"respond-async,wait=7,handling=strict": 7,
		"respond-async , wait=7 ; foo=bar":     7,
		"return=minimal; wait=1, wait=7":       7,
		`x="a, wait=1", wait=7`:                7,
		`x="\", wait=1", wait=7`:               7,
		`x; y=";,wait=1" ;z, wait=7`:           7,
		",, wait=7":                            7,
		"wait=7, wait=1":                       7,
		"wait=x, wait=7":                       0,
		"wait, wait=7":                         0,
		`wait="", wait=7`:                      0,
		`wait="7`:                              0,
		"wait=-7":                              0,
		"wait=7s":                              0,
		"wait=7 7":                             0,
		"wait:7":                               0,
		"await=7":                              0,
		`x="wait=1, wait=7`:                    0,
	} {
		if got := preferredWait(http.Header{"Prefer": {prefer}}); got != want {
			t.Errorf("%s: %d, want %d", prefer, got, want)
		}
	}
	if got := preferredWait(http.Header{"Prefer": {"respond-async", "wait=7", "wait=1"}}); got != 7 {
		t.Errorf("in several lines: %d", got)
	}
}

func FuzzPreferredWait(f *testing.F) {
	f.Add(`respond-async, wait="10"; a="b\", c", x`)
	f.Fuzz(func(t *testing.T, line string) {
		preferredWait(http.Header{"Prefer": {line}})
		// Only the first preference counts.
		for _, first := range []http.Header{{"Prefer": {"wait=3", line}}, {"Prefer": {"wait=3," + line}}, {"Prefer": {"wait=3;" + line}}} {
			if wait := preferredWait(first); wait != 3 {
				t.Errorf("%s: %d", first, wait)
			}
		}
	})
}

func FuzzQuery(f *testing.F) {
	f.Add("appServerID=n1&taskID=t1&all=true&nocache=0&serect=x")
	f.Add("submitID=%41&secret=%zz;&all")
	f.Add("submitID=a&wait=30&nocache")
	f.Add("sha256=0123456789abcdefABCDEF00112233440123456789abcdefABCDEF0011223344&all")
	f.Fuzz(func(t *testing.T, raw string) {
		q := parseQuery(raw)
		values, err := url.ParseQuery(raw)
		if err != nil {
			if q.problem == nil {
				t.Errorf("accepted, although: %v", err)
			}
			return
		}
		if q.problem != nil {
			return
		}
		for name, got := range map[string]string{
			"submitID": q.SubmitID, "appServerID": q.AppServerID, "taskID": q.TaskID, "sha256": q.sha256, "secret": q.secret, "serect": q.serect,
		} {
			if values.Has("submitID") && (name == "appServerID" || name == "taskID") {
				values.Del(name) // which submitID wins over
			}
			if len(values[name]) > 1 || values.Get(name) != got {
				t.Errorf("%s is %q, not %q", name, got, values[name])
			}
		}
		for name, which := range map[string]parameter{"wait": paramWait, "secret": paramSecret, "serect": paramSerect} {
			if given := q.given&which != 0; given != values.Has(name) {
				t.Errorf("has %s %t, want %q", name, given, values[name])
			}
		}
		if q.sha256 != "" && (q.SubmitID+q.AppServerID+q.TaskID != "" || q.nocache || q.given&paramWait != 0) {
			t.Errorf("accepted beside a file: %+v", q)
		}
		if q.SubmitID == "" && q.sha256 == "" && (q.AppServerID == "" || q.TaskID == "") {
			t.Errorf("accepted without a report: %+v", q)
		}
	})
}

func TestCutSecrets(t *testing.T) {
	for raw, want := range map[string]struct {
		rest           string
		secret, serect string
		problem        bool
	}{
		"":                               {},
		"a=1&b=%26&&c":                   {rest: "a=1&b=%26&&c"},
		"a=1&secret=x&b=2":               {rest: "a=1&b=2", secret: "x"},
		"%73ecret=%78&serect=y":          {secret: "x", serect: "y"},
		"Secret=x&SERECT=y&a":            {rest: "a"},
		"all=maybe&wait=x&submitID=&all": {rest: "all=maybe&wait=x&submitID=&all"},
		"secrets=x&my_secret=y":          {rest: "secrets=x&my_secret=y"},
		"secret=x&secret=x":              {secret: "x", problem: true},
		"secret=x&secret=y":              {problem: true},
		"secret=x&secret=y&secret=x":     {problem: true},
		"a=1;secret=x":                   {problem: true},
		"a=%zz&secret=x":                 {secret: "x", problem: true},
	} {
		q, rest := cutSecrets(raw)
		if rest != want.rest || q.secret != want.secret || q.serect != want.serect || (q.problem != nil) != want.problem {
			t.Errorf("%s: the rest is %s, and the query is %+v", raw, rest, q)
		}
	}
}

// What is left of a query has no secret, and all of the rest.
func FuzzCutSecrets(f *testing.F) {
	f.Add("a=1&secret=x&b=2&%53erect=y&&c")
	f.Fuzz(func(t *testing.T, raw string) {
		q, rest := cutSecrets(raw)
		if q.problem != nil {
			return
		}
		got, err := url.ParseQuery(rest)
		if err != nil {
			t.Fatalf("%q: %v", rest, err)
		}
		want, err := url.ParseQuery(raw)
		if err != nil {
			t.Fatalf("%q: %v", raw, err)
		}
		for name := range want {
			if strings.EqualFold(name, "secret") || strings.EqualFold(name, "serect") {
				delete(want, name)
			}
		}
		if !maps.EqualFunc(got, want, slices.Equal) {
			t.Errorf("%q: %v is left, want %v", raw, got, want)
		}
	})
}
