package clients_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

const (
	corsTask       = "/task?appServerID=node-1&taskID=1" // its report is finished when the node is asked again
	corsUnfinished = "/task?appServerID=node-1&taskID=2"
)

// corsSite is a Caddy that runs examples/cors, in front of a node.
type corsSite struct {
	url    string
	secret string
	log    string // the file
}

// startCORS starts the example, which allows the given origin. It runs until the test ends.
func startCORS(t *testing.T, origin string) *corsSite {
	t.Helper()
	var requests atomic.Int32 // for the first task
	node := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		state := "IN_PROGRESS"
		if r.FormValue("taskID") == "1" && requests.Add(1) > 1 {
			state = "SUCCESS"
		}
		_, _ = fmt.Fprintf(w, `{"processTime":1,"result":{"taskReference":{"state":"%s"}}}`, state)
	}))
	t.Cleanup(node.Close)

	dir := filepath.ToSlash(t.TempDir())
	s := &corsSite{url: fmt.Sprintf("https://localhost:%d", testenv.Port(t)), secret: rand.Text(), log: dir + "/caddy.log"}
	for name, value := range map[string]string{
		"SITE": s.url, "ORIGIN": origin, "NODE_1": node.Listener.Addr().String(), "PORTAL_SECRET": s.secret, "NODE_1_SECRET": rand.Text(),
		"XDG_DATA_HOME": dir, // Caddy writes its instance ID there
	} {
		t.Setenv(name, value)
	}
	pinned := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: node.Certificate().Raw})
	for name, content := range map[string][]byte{"cert.pem": testsite.Localhost().PEM, "key.pem": testsite.Localhost().Key, "upstreams.crt": pinned} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	testsite.Run(t, corsCaddyfile(t, dir))
	return s
}

// corsCaddyfile returns the example's Caddyfile with what it needs to run anywhere. What it does about CORS stays as it is.
func corsCaddyfile(t *testing.T, dir string) []byte {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(corsExample, "Caddyfile"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	for _, edit := range [][2]string{
		{"\n{\n", "\n{\n\tadmin off\n\tpersist_config off\n\tauto_https disable_redirects\n\tgrace_period 3s\n\tstorage file_system \"" + dir + "\"\n"},
		{"\tlog {\n", "\tservers {\n\t\tprotocols h1 h2\n\t}\n\tlog {\n\t\toutput file \"" + dir + "/caddy.log\"\n"}, // no port is reserved for HTTP/3
		{"\tlog\n", "\tlog\n\tbind 127.0.0.1\n\ttls \"" + dir + "/cert.pem\" \"" + dir + "/key.pem\"\n"},
		{"/etc/caddy/upstreams.crt", dir + "/upstreams.crt"},
	} {
		if strings.Count(text, edit[0]) != 1 {
			t.Fatalf("the Caddyfile does not have %q once", edit[0])
		}
		text = strings.Replace(text, edit[0], edit[1], 1)
	}
	return []byte(text)
}

// corsExample is the folder of the example.
var corsExample = filepath.Join("..", "cors")

// request is a call of fetchReport.
type request struct {
	URL     string  `json:"url"`
	Options options `json:"options"`
}

type options struct {
	Secret string `json:"secret,omitempty"`
	Wait   int    `json:"wait,omitempty"`
	ETag   string `json:"etag,omitempty"`
}

// result is what the page gets from fetchReport.
type result struct {
	Error  string
	Status int
	Header map[string]string
	Body   struct {
		Code   string
		Result struct {
			TaskReference struct{ State string }
		}
	}
}

// TestBrowser opens the page of examples/cors at two origins. Only one of them is allowed.
func TestBrowser(t *testing.T) {
	browser := needChromium(t)
	var requests []request
	mux := http.NewServeMux()
	mux.Handle("/", http.FileServer(http.Dir(corsExample)))
	mux.HandleFunc("/requests.json", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(requests) })
	allowedServer, otherServer := httptest.NewUnstartedServer(mux), httptest.NewUnstartedServer(mux)
	allowed, other := "http://"+allowedServer.Listener.Addr().String(), "http://"+otherServer.Listener.Addr().String()
	s := startCORS(t, allowed)

	tests := []struct {
		name    string
		path    string
		options options
		status  int
		state   string // of a report
		code    string // of a problem
		fields  map[string]string
	}{
		{
			"waiting", corsTask, options{Secret: s.secret, Wait: 20}, 200, "SUCCESS", "",
			map[string]string{"etag": `^"`, "cache-status": "^fsbroker; ", "preference-applied": "^wait=20$", "content-type": "^application/json$"},
		},
		{
			"cached", corsTask, options{Secret: s.secret}, 200, "SUCCESS", "",
			map[string]string{"etag": `^"`, "cache-status": "^fsbroker; hit$", "age": "^[0-9]+$"},
		},
		{
			"unchanged", corsTask, options{Secret: s.secret, ETag: "*"}, 304, "", "",
			map[string]string{"etag": `^"`},
		},
		{
			"unfinished", corsUnfinished, options{Secret: s.secret}, 200, "IN_PROGRESS", "",
			map[string]string{"retry-after": "^[0-9]+$", "cache-control": "^no-store$"},
		},
		{
			"without preflight", corsTask + "&secret=" + s.secret, options{}, 200, "SUCCESS", "",
			map[string]string{"etag": `^"`},
		},
		{
			"wrong secret", corsTask, options{Secret: "wrong"}, 401, "", "unauthorized",
			map[string]string{"content-type": `^application/problem\+json$`},
		},
		{
			"unknown node", "/task?appServerID=node-9&taskID=1", options{Secret: s.secret}, 404, "", "unknown_node",
			map[string]string{"cache-status": "^fsbroker; detail=unknown_node$"},
		},
	}
	for _, test := range tests {
		requests = append(requests, request{s.url + test.path, test.options})
	}
	for _, server := range []*httptest.Server{allowedServer, otherServer} {
		server.Start()
		t.Cleanup(server.Close)
	}

	// First the allowed origin, so that there is a cached report that the other one must not get.
	for _, origin := range []string{allowed, other} {
		results := open(t, browser, origin+"/page.html")
		if len(results) != len(tests) {
			t.Fatalf("the page at %s has %d results, want %d", origin, len(results), len(tests))
		}
		for i, test := range tests {
			got := results[i]
			if origin == other {
				if !strings.HasPrefix(got.Error, "TypeError: ") || got.Status != 0 {
					t.Errorf("%s, at the other origin: the page gets %+v", test.name, got)
				}
				continue
			}
			if got.Error != "" || got.Status != test.status || got.Body.Result.TaskReference.State != test.state || got.Body.Code != test.code {
				t.Errorf("%s: the page gets %+v", test.name, got)
			}
			for name, want := range test.fields {
				if value, ok := got.Header[name]; !ok || !regexp.MustCompile(want).MatchString(value) {
					t.Errorf("%s: the page reads %s: %q, want %s", test.name, name, value, want)
				}
			}
		}
	}

	if err := caddy.Stop(); err != nil { // now the log is complete
		t.Error(err)
	}
	counts := countRequests(t, s.log)
	// Six requests of each origin need a preflight. The browser keeps an answer, but no refusal.
	for _, test := range []struct {
		what     string
		key      logged
		min, max int
	}{
		{"preflights of the allowed origin", logged{allowed, http.MethodOptions, 204, false}, 1, 5},
		{"preflights of the other origin", logged{other, http.MethodOptions, 204, false}, 6, 6},
		{"requests of the other origin that need no preflight", logged{other, http.MethodGet, 200, false}, 1, 1},
		{"requests for a report that the browser or the page has", logged{allowed, http.MethodGet, 304, true}, 2, 2},
	} {
		if got := counts[test.key]; got < test.min || got > test.max {
			t.Errorf("%s: got %d, want %d to %d in %v", test.what, got, test.min, test.max, counts)
		}
	}
	for key := range counts {
		if key.origin == other && key.authorization {
			t.Errorf("the other origin has sent a secret after the preflight: %+v", key)
		}
	}
}

// logged is what the access log has of a request.
type logged struct {
	origin, method string
	status         int
	authorization  bool
}

// countRequests counts the requests in the access log.
func countRequests(t *testing.T, file string) map[logged]int {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[logged]int)
	for line := range bytes.Lines(content) {
		var entry struct {
			Logger  string
			Status  int
			Request struct {
				Method  string
				Headers http.Header
			}
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if strings.HasPrefix(entry.Logger, "http.log.access") {
			header := entry.Request.Headers
			counts[logged{header.Get("Origin"), entry.Request.Method, entry.Status, header.Get("Authorization") != ""}]++
		}
	}
	return counts
}

// needChromium returns the command of Chromium or Chrome. It does not run it, which would write into the user's home.
func needChromium(t *testing.T) string {
	t.Helper()
	names := []string{"chromium", "chromium-browser", "google-chrome"}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skipf("SKIPPED: there is no Chromium (%s)", strings.Join(names, ", "))
	return ""
}

// open opens a page in a new browser, and returns the results that the page has when its script is done.
func open(t *testing.T, browser, url string) (results []result) {
	t.Helper()
	// The browser's processes may outlive it for a moment, so a folder that t.TempDir removes would fail the test.
	profile, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(profile) }()

	// Virtual time stands still while a response is pending. The browser trusts the site's certificate, and no other
	// self-signed certificate. It would not cache a response if it ignored all errors of certificates.
	command := exec.CommandContext(testenv.Context(t), browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+profile, "--ignore-certificate-errors-spki-list="+testsite.Localhost().KeyHash, "--virtual-time-budget=10000", "--dump-dom", url)
	command.Env = append(os.Environ(), testenv.Home(profile)...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	dom, err := command.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", url, err, &stderr)
	}
	found := regexp.MustCompile(`(?s)<pre id="results">(.+)</pre>`).FindSubmatch(dom)
	if found == nil {
		t.Fatalf("%s has no results:\n%s\n%s", url, dom, &stderr)
	}
	if err := json.Unmarshal([]byte(html.UnescapeString(string(found[1]))), &results); err != nil {
		t.Fatalf("%s: %v: %s", url, err, found[1])
	}
	return results
}
