package fsbroker_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

// options are those of a site with one node, named node-1.
func options(node *backend, more string) string {
	return fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		%s
	}`, node.URL, more)
}

// brokerOption adds a broker.
func brokerOption(broker *backend) string {
	return fmt.Sprintf("broker %s {env.BROKER_SECRET}", broker.URL)
}

const pair = "/task?appServerID=node-1&taskID=t1"

func TestReport(t *testing.T) {
	document := reportOf("t1", "SUCCESS", "SUCCESS")
	node := newBackend(t, says(http.StatusOK, document))
	s := startSite(t, options(node, ""))

	first := s.get(pair)
	first.wantStatus(t, http.StatusOK)
	first.wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
	first.wantHeader(t, "Age", "")

	time.Sleep(1100 * time.Millisecond)
	again := s.get(pair)
	again.wantStatus(t, http.StatusOK)
	again.wantHeader(t, "Cache-Status", "fsbroker; hit")
	again.wantHeader(t, "Age", "1")

	for _, r := range []reply{first, again} {
		if string(r.body) != document {
			t.Errorf("got %s", r.body)
		}
		r.wantHeader(t, "Content-Type", "application/json")
		r.wantHeader(t, "Content-Length", fmt.Sprint(len(document)))
		r.wantHeader(t, "Cache-Control", "private, no-cache")
		r.wantHeader(t, "Vary", "Accept-Encoding")
		r.wantHeader(t, "Content-Encoding", "")
		r.wantHeader(t, "ETag", first.header.Get("ETag"))
	}

	node.wantQuestions(t, 1)
	question := node.questions()[0]
	if question.Path != "/task" {
		t.Errorf("the node was asked for %s", question.Path)
	}
	want := url.Values{"taskID": {"t1"}, "all": {"false"}, "serect": {nodeSecret}, "secret": {nodeSecret}}
	if got := question.Query(); got.Encode() != want.Encode() {
		t.Errorf("the node was asked %v, want %v", got, want)
	}
	s.wantNoSecretInLog()
}

func TestByteForByte(t *testing.T) {
	for name, document := range map[string]string{
		"white space and order": "\n{ \"result\" : {\"b\":1, \"a\": 2.50} ,\"processTime\":1}\n\n",
		"escapes":               `{"result":{"text":"\u00e4\/ä\u2028"}}`,
		"invalid utf-8":         "{\"result\":{\"text\":\"\xff\xfe\"}}",
		"large numbers":         `{"result":{"n":123456789012345678901234567890}}`,
		"incompressible":        `{"result":{}}`,
		"long":                  reportOf("t1", "SUCCESS") + strings.Repeat(" ", 1<<20),
		"long and dense":        dense(5 << 20),
	} {
		t.Run(name, func(t *testing.T) {
			node := newBackend(t, says(http.StatusOK, document))
			s := startSite(t, options(node, ""))
			for _, accept := range []string{"identity", "gzip", "identity", "gzip"} {
				r := s.get(pair, "Accept-Encoding: "+accept)
				r.wantStatus(t, http.StatusOK)
				if got := r.plain(t); got != document {
					t.Errorf("%s: got %.200q", accept, got)
				}
			}
			node.wantQuestions(t, 1)
		})
	}
}

// dense is a finished report of about a size, of which gzip can save no more than half.
func dense(size int) string {
	digits := make([]byte, size/2)
	_, _ = rand.NewChaCha8([32]byte{}).Read(digits)
	return fmt.Sprintf(`{"result":{"taskReference":{"state":"SUCCESS"},"digest":"%x"}}`, digits)
}

// plain is a reply's body without its encoding.
func (r reply) plain(t testing.TB) string {
	t.Helper()
	if r.header.Get("Content-Encoding") == "" {
		return string(r.body)
	}
	zr, err := gzip.NewReader(bytes.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(zr)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

func TestAuthentication(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		secret portal portal-secret-1
		secret portal {file.%s}
		node node-1 %s
	}
	header X-Client {http.fsbroker.client},{http.auth.user.id}`, writeFile(t, "portal-secret-2\n"), node.URL))

	for name, test := range map[string]struct {
		query  string
		header string
		status int
	}{
		"none":                           {"", "", 401},
		"bearer":                         {"", "Bearer " + callerSecret, 200},
		"bearer in another case":         {"", "bearer   " + callerSecret, 200},
		"serect":                         {"&serect=" + callerSecret, "", 200},
		"secret":                         {"&secret=" + callerSecret, "", 200},
		"both spellings":                 {"&secret=" + callerSecret + "&serect=" + callerSecret, "", 200},
		"percent-encoded":                {"&secret=%74he-callers-own-secret", "", 200},
		"another client's":               {"", "Bearer portal-secret-1", 200},
		"a rotated one, from a file":     {"&secret=portal-secret-2", "", 200},
		"basic is somebody else's":       {"&secret=" + callerSecret, "Basic " + base64.StdEncoding.EncodeToString([]byte("a:b")), 200},
		"wrong bearer":                   {"", "Bearer wrong", 401},
		"wrong serect":                   {"&serect=wrong", "", 401},
		"wrong secret":                   {"&secret=wrong", "", 401},
		"empty":                          {"&secret=", "", 401},
		"empty bearer":                   {"", "Bearer ", 401},
		"basic alone":                    {"", "Basic " + base64.StdEncoding.EncodeToString([]byte(callerSecret)), 401},
		"wrong beside right":             {"&secret=" + callerSecret + "&serect=wrong", "", 401},
		"wrong beside bearer":            {"&secret=wrong", "Bearer " + callerSecret, 401},
		"a prefix":                       {"", "Bearer " + callerSecret[:5], 401},
		"longer":                         {"", "Bearer " + callerSecret + "x", 401},
		"another case":                   {"", "Bearer " + strings.ToUpper(callerSecret), 401},
		"repeated":                       {"&secret=" + callerSecret + "&secret=" + callerSecret, "", 400},
		"wrong, then right":              {"&secret=wrong&secret=" + callerSecret, "", 401},
		"right, but the rest is not":     {"&all=maybe&secret=" + callerSecret, "", 400},
		"wrong, and the rest is not":     {"&all=maybe&secret=wrong", "", 401},
		"right, broken escape elsewhere": {"&x=%zz&secret=" + callerSecret, "", 400},
		"none, broken escape":            {"&x=%zz", "", 401},
	} {
		t.Run(name, func(t *testing.T) {
			var header []string
			if test.header != "" {
				header = []string{"Authorization: " + test.header}
			}
			r := s.do(t.Context(), http.MethodGet, pair+test.query, header...)
			r.wantStatus(t, test.status)
			if test.status == 401 {
				r.wantProblem(t, 401, "unauthorized")
				r.wantHeader(t, "WWW-Authenticate", "Bearer")
				r.wantHeader(t, "Cache-Status", "fsbroker; detail=unauthorized")
			}
		})
	}

	// A wrong secret is said before anything else.
	s.do(t.Context(), http.MethodPost, "/task").wantProblem(t, 401, "unauthorized")
	s.do(t.Context(), http.MethodGet, "/task").wantProblem(t, 401, "unauthorized")
	s.wantNoSecretInLog()
}

func TestClientNames(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		secret portal portal-secret-1
		secret portal portal-secret-2
		node node-1 %s
	}
	log_append fsbroker_client {http.fsbroker.client}`, node.URL))

	for secret, name := range map[string]string{callerSecret: "default", "portal-secret-1": "portal", "portal-secret-2": "portal"} {
		s.do(t.Context(), http.MethodGet, pair, "Authorization: Bearer "+secret, "User-Agent: with "+secret[:7]).wantStatus(t, 200)
		logged := s.accessLog("with " + secret[:7])
		if logged["user_id"] != name || logged["fsbroker_client"] != name {
			t.Errorf("the access log names %v and %v, want %s", logged["user_id"], logged["fsbroker_client"], name)
		}
	}
}

// accessLog is the line of the request that was made with a User-Agent.
func (s *site) accessLog(userAgent string) map[string]any {
	s.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(s.logFile())
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(string(log)) {
			var fields map[string]any
			if strings.Contains(line, userAgent) && json.Unmarshal([]byte(line), &fields) == nil && fields["msg"] == "handled request" {
				return fields
			}
		}
	}
	s.t.Fatalf("no access log of %s", userAgent)
	return nil
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return filepath.ToSlash(name)
}

func TestMethods(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, says(http.StatusOK, document))
	s := startSite(t, options(node, ""))
	bearer := "Authorization: Bearer " + callerSecret

	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"} {
		r := s.do(t.Context(), method, pair, bearer)
		r.wantProblem(t, 405, "method_not_allowed")
		r.wantHeader(t, "Allow", "GET, HEAD")
	}
	node.wantQuestions(t, 0)

	for range 2 { // from the node, and kept
		head := s.do(t.Context(), http.MethodHead, pair, bearer)
		head.wantStatus(t, http.StatusOK)
		head.wantHeader(t, "Content-Length", fmt.Sprint(len(document)))
		head.wantHeader(t, "Content-Type", "application/json")
		if len(head.body) > 0 {
			t.Errorf("HEAD came with %q", head.body)
		}
	}
	node.wantQuestions(t, 1)
	get := s.get(pair)
	get.wantHeader(t, "ETag", s.do(t.Context(), http.MethodHead, pair, bearer).header.Get("ETag"))

	head := s.do(t.Context(), http.MethodHead, "/task", bearer)
	head.wantStatus(t, http.StatusBadRequest)
	if len(head.body) > 0 || head.header.Get("Content-Length") == "0" {
		t.Errorf("HEAD came with %q, length %s", head.body, head.header.Get("Content-Length"))
	}
}

func TestBadQuestions(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, says(http.StatusOK, `{}`))
	s := startSite(t, options(node, brokerOption(broker)))

	for query, code := range map[string]string{
		"":                                       "missing_parameter",
		"all=true":                               "missing_parameter",
		"taskID=t1":                              "missing_parameter",
		"appServerID=node-1":                     "missing_parameter",
		"submitID=":                              "malformed_parameter",
		"submitID=a%00b":                         "malformed_parameter",
		"submitID=a%ffb":                         "malformed_parameter",
		"submitID=a%0ab":                         "malformed_parameter",
		"submitID=" + strings.Repeat("a", 257):   "malformed_parameter",
		"appServerID=node-1&taskID=":             "malformed_parameter",
		"appServerID=&taskID=t1":                 "malformed_parameter",
		"appServerID=node-1&taskID=t1&taskID=t2": "repeated_parameter",
		"appServerID=node-1&taskID=t1&all=1&all=1":         "repeated_parameter",
		"appServerID=node-1&taskID=t1&nocache=1&nocache=0": "repeated_parameter",
		"submitID=a&submitID=a":                            "repeated_parameter",
		"appServerID=node-1&taskID=t1&all=maybe":           "malformed_parameter",
		"appServerID=node-1&taskID=t1&all=2":               "malformed_parameter",
		"appServerID=node-1&taskID=t1&nocache=ja":          "malformed_parameter",
		"appServerID=node-1&taskID=t1&nocache=%20true":     "malformed_parameter",
		"appServerID=node-1&taskID=%zz":                    "malformed_query",
		"appServerID=node-1;taskID=t1":                     "malformed_query",
		"appServerID=node-1&taskID=t1&something=else%":     "malformed_query",
		"appserverid=node-1&taskid=t1":                     "missing_parameter",
		"appServerID=node-1&taskID=t1&wait":                "malformed_parameter",
		"appServerID=node-1&taskID=t1&wait=":               "malformed_parameter",
		"appServerID=node-1&taskID=t1&wait=5s":             "malformed_parameter",
		"appServerID=node-1&taskID=t1&wait=-1":             "malformed_parameter",
		"appServerID=node-1&taskID=t1&wait=%2B1":           "malformed_parameter",
		"appServerID=node-1&taskID=t1&wait=1.5":            "malformed_parameter",
		"appServerID=node-1&taskID=t1&wait=0&wait=1":       "repeated_parameter",
	} {
		r := s.get("/task?" + query)
		r.wantProblem(t, http.StatusBadRequest, code)
		r.wantHeader(t, "Cache-Status", "fsbroker; detail="+code)
	}
	node.wantQuestions(t, 0)
	broker.wantQuestions(t, 0)

	s.get("/task?appServerID=node-2&taskID=t1").wantProblem(t, http.StatusNotFound, "unknown_node")
	s.get("/task?appServerID=node-1&taskID=t1&_=123&_=456").wantStatus(t, http.StatusOK)
}

func TestBooleans(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	for value, want := range map[string]string{
		"": "false", "&all": "true", "&all=": "true",
		"&all=true": "true", "&all=TRUE": "true", "&all=1": "true", "&all=Yes": "true", "&all=on": "true",
		"&all=false": "false", "&all=False": "false", "&all=0": "false", "&all=no": "false", "&all=OFF": "false",
	} {
		s.get(pair+"&nocache"+value).wantStatus(t, http.StatusOK)
		asked := node.questions()
		if got := asked[len(asked)-1].Query().Get("all"); got != want {
			t.Errorf("%q: the node was asked for all=%s", value, got)
		}
	}
	before := len(node.questions())
	for _, kept := range []string{"&nocache=false", "&nocache=0", "&nocache=No", "&nocache=off"} {
		s.get(pair+kept).wantHeader(t, "Cache-Status", "fsbroker; hit")
	}
	node.wantQuestions(t, before)
}

func TestAllIsAnotherReport(t *testing.T) {
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		says(http.StatusOK, fmt.Sprintf(`{"result":{"all":%s}}`, r.URL.Query().Get("all")))(w, r)
	})
	s := startSite(t, options(node, ""))
	for range 2 {
		if got := s.get(pair + "&all=true"); string(got.body) != `{"result":{"all":true}}` {
			t.Errorf("got %s", got.body)
		}
		if got := s.get(pair); string(got.body) != `{"result":{"all":false}}` {
			t.Errorf("got %s", got.body)
		}
	}
	node.wantQuestions(t, 2)
}

func TestOtherPathsPass(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, "")+"\nrespond \"not ours\" 418")
	for _, path := range []string{"/", "/tasks", "/task/", "/task/x", "/submit", "/x/task"} {
		s.get(path).wantStatus(t, http.StatusTeapot)
	}
	s.get(pair).wantStatus(t, http.StatusOK)
	s.get("/task").wantProblem(t, http.StatusBadRequest, "missing_parameter")
}

func TestMatchers(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	for _, matcher := range []string{"/reports/*", "*", "@reports"} {
		directives := strings.Replace(options(node, ""), "fsbroker_task", "fsbroker_task "+matcher, 1)
		s := startSite(t, "@reports path /reports/1\n"+directives)
		s.get("/reports/1?appServerID=node-1&taskID=t1").wantStatus(t, http.StatusOK)
	}
}

func TestUnfinishedReport(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
	s := startSite(t, options(node, "poll_interval 1s"))

	for i, want := range []string{"fsbroker; fwd=uri-miss; stored", "fsbroker; hit", "fsbroker; hit"} {
		r := s.get(pair)
		r.wantStatus(t, http.StatusOK)
		r.wantHeader(t, "Cache-Status", want)
		r.wantHeader(t, "Cache-Control", "no-store")
		if i == 2 {
			s.get(pair, "If-None-Match: "+r.header.Get("ETag")).wantStatus(t, http.StatusNotModified)
		}
	}
	node.wantQuestions(t, 1)

	node.becomes(says(http.StatusOK, reportOf("t1", "SUCCESS", "IN_PROGRESS")))
	time.Sleep(1100 * time.Millisecond)
	s.get(pair).wantHeader(t, "Cache-Control", "no-store")
	node.wantQuestions(t, 2)

	node.becomes(says(http.StatusOK, reportOf("t1", "success_partial", "FAILED")))
	time.Sleep(1100 * time.Millisecond)
	s.get(pair).wantHeader(t, "Cache-Control", "private, no-cache")
	node.becomes(says(http.StatusNotFound, ""))
	time.Sleep(1100 * time.Millisecond)
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	node.wantQuestions(t, 3)
}

func TestNothingToReportYet(t *testing.T) {
	node := newBackend(t, says(http.StatusNoContent, ""))
	s := startSite(t, options(node, "poll_interval 1500ms"))
	for _, want := range []string{"fsbroker; fwd=uri-miss; stored", "fsbroker; hit"} {
		r := s.get(pair)
		r.wantStatus(t, http.StatusNoContent)
		r.wantHeader(t, "Retry-After", "2")
		r.wantHeader(t, "Cache-Control", "no-store")
		r.wantHeader(t, "Cache-Status", want)
		r.wantHeader(t, "ETag", "")
	}
	node.wantQuestions(t, 1)
}

func TestSecretWithBraces(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, `secret braced a\{b\}c`))
	s.do(t.Context(), http.MethodGet, pair, "Authorization: Bearer a{b}c").wantStatus(t, http.StatusOK)
}

func TestTooLargeToBeKept(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, dense(100<<10)))
	s := startSite(t, options(node, "cache {\n max_size 10KiB\n }"))
	for range 2 {
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss")
	}
	node.wantQuestions(t, 2)
}

// A site that takes less of a node than another does not spoil the other's answer.
func TestSitesWithOtherBounds(t *testing.T) {
	answer := make(chan struct{})
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		<-answer
		says(http.StatusOK, dense(100<<10))(w, r)
	})
	s := startSite(t, "handle_path /strict/* {\n"+options(node, "max_report 1KiB")+"\n}\n"+options(node, ""))
	strict, lax := make(chan reply, 1), make(chan reply, 1)
	go func() { strict <- s.get("/strict" + pair) }()
	eventually(t, "the first question", func() bool { return len(node.questions()) == 1 })
	go func() { lax <- s.get(pair) }()
	time.Sleep(100 * time.Millisecond) // for it to join the first, if it does
	close(answer)
	(<-strict).wantProblem(t, http.StatusBadGateway, "node_answer_too_large")
	(<-lax).wantStatus(t, http.StatusOK)
}

func TestReportsExpire(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, "cache {\n ttl 300ms\n }"))
	s.get(pair)
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	time.Sleep(400 * time.Millisecond)
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
	node.wantQuestions(t, 2)
}

func TestConditionalRequests(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	plain := s.get(pair).header.Get("ETag")
	packed := s.get(pair, "Accept-Encoding: gzip").header.Get("ETag")
	if plain == packed || plain == "" || packed == "" {
		t.Fatalf("two forms go by %s and %s", plain, packed)
	}
	for name, test := range map[string]struct {
		header []string
		status int
		etag   string
	}{
		"the same":                {[]string{"If-None-Match: " + plain}, 304, plain},
		"the same, weak":          {[]string{"If-None-Match: W/" + plain}, 304, plain},
		"one of several":          {[]string{`If-None-Match: "a", ` + plain + `,"b"`}, 304, plain},
		"in a second line":        {[]string{`If-None-Match: "a"`, "If-None-Match: " + plain}, 304, plain},
		"any":                     {[]string{"If-None-Match: *"}, 304, plain},
		"another":                 {[]string{`If-None-Match: "a"`}, 200, plain},
		"without quotes":          {[]string{"If-None-Match: " + strings.Trim(plain, `"`)}, 200, plain},
		"the other form's":        {[]string{"If-None-Match: " + packed}, 200, plain},
		"compressed":              {[]string{"If-None-Match: " + packed, "Accept-Encoding: gzip"}, 304, packed},
		"compressed, the other's": {[]string{"If-None-Match: " + plain, "Accept-Encoding: gzip"}, 200, packed},
	} {
		t.Run(name, func(t *testing.T) {
			r := s.get(pair, test.header...)
			r.wantStatus(t, test.status)
			r.wantHeader(t, "ETag", test.etag)
			r.wantHeader(t, "Cache-Control", "private, no-cache")
			r.wantHeader(t, "Vary", "Accept-Encoding")
			r.wantHeader(t, "Cache-Status", "fsbroker; hit")
			if test.status == 304 && len(r.body) > 0 {
				t.Errorf("304 came with %q", r.body)
			}
		})
	}
	node.wantQuestions(t, 1)

	fresh := s.get(pair+"&nocache", "If-None-Match: "+plain)
	fresh.wantStatus(t, http.StatusNotModified)
	node.wantQuestions(t, 2)
}

func TestEncodings(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, says(http.StatusOK, document))
	s := startSite(t, options(node, "")+"\nencode zstd gzip")
	for accept, want := range map[string]string{
		"gzip": "gzip", "GZIP": "gzip", "br, gzip;q=0.5": "gzip", "*": "gzip", "deflate,gzip": "gzip",
		"identity": "", "gzip;q=0": "", "gzip; q=0.0, *": "", "*;q=0": "", "br": "",
		"zstd": "zstd", // what this module does not do, encode still does
	} {
		r := s.get(pair, "Accept-Encoding: "+accept)
		r.wantStatus(t, http.StatusOK)
		r.wantHeader(t, "Content-Encoding", want)
		if vary := r.header.Values("Vary"); len(vary) != 1 || vary[0] != "Accept-Encoding" {
			t.Errorf("%s: Vary: %q", accept, vary)
		}
		if want != "zstd" && r.plain(t) != document {
			t.Errorf("%s: got %q", accept, r.body)
		}
	}
}

func TestNocache(t *testing.T) {
	first, second := reportOf("t1", "SUCCESS"), reportOf("t1", "SUCCESS", "FAILED")
	node := newBackend(t, says(http.StatusOK, first))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)

	node.becomes(says(http.StatusOK, second))
	if got := s.get(pair); string(got.body) != first {
		t.Errorf("without nocache: %s", got.body)
	}
	fresh := s.get(pair + "&nocache=true")
	fresh.wantHeader(t, "Cache-Status", "fsbroker; fwd=request; stored")
	if string(fresh.body) != second {
		t.Errorf("with nocache: %s", fresh.body)
	}
	if got := s.get(pair); string(got.body) != second {
		t.Errorf("nocache did not refresh what is kept: %s", got.body)
	}

	// What is worse than what is kept is told, and does not take its place.
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		status int
		code   string
	}{
		"forgotten":  {says(http.StatusNotFound, ""), 404, "unknown_task"},
		"broken":     {says(http.StatusOK, "{"), 502, "node_bad_answer"},
		"failing":    {says(http.StatusInternalServerError, ""), 502, "node_bad_answer"},
		"refusing":   {says(http.StatusUnauthorized, ""), 502, "node_refused_secret"},
		"unfinished": {says(http.StatusOK, reportOf("t1", "IN_PROGRESS")), 200, ""},
		"empty":      {says(http.StatusNoContent, ""), 204, ""},
	} {
		t.Run(name, func(t *testing.T) {
			node.becomes(test.answer)
			r := s.get(pair + "&nocache")
			r.wantStatus(t, test.status)
			if test.code != "" {
				r.wantProblem(t, test.status, test.code)
				r.wantHeader(t, "Cache-Status", "fsbroker; fwd=request; detail="+test.code)
				if !strings.Contains(string(r.body), "without nocache") {
					t.Errorf("the problem does not say that there is a kept report: %s", r.body)
				}
			}
			kept := s.get(pair)
			kept.wantHeader(t, "Cache-Status", "fsbroker; hit")
			if string(kept.body) != second {
				t.Errorf("kept: %s", kept.body)
			}
		})
	}
	node.becomes(says(http.StatusNotFound, ""))
	if r := s.get("/task?appServerID=node-1&taskID=t2&nocache"); strings.Contains(string(r.body), "without nocache") {
		t.Errorf("nothing is kept, but: %s", r.body)
	}
}

func TestErrorsAreNotKept(t *testing.T) {
	node := newBackend(t, says(http.StatusNotFound, ""))
	s := startSite(t, options(node, ""))
	s.get(pair).wantProblem(t, 404, "unknown_task")
	s.get(pair).wantProblem(t, 404, "unknown_task")
	node.becomes(says(http.StatusBadGateway, ""))
	s.get(pair).wantProblem(t, 502, "node_bad_answer")
	node.becomes(says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s.get(pair).wantStatus(t, http.StatusOK)
	node.wantQuestions(t, 4)
}

func TestSubmissions(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, says(http.StatusOK, document))
	broker := newBackend(t, nil)
	s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 200ms"))

	for name, test := range map[string]struct {
		answer http.HandlerFunc
		status int
		code   string
	}{
		"flat":            {says(200, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`), 200, ""},
		"in the result":   {says(200, `{"state":"SUCCESS","appServerID":"node-1","result":{"taskID":"t1"}}`), 200, ""},
		"a scan's answer": {says(200, `{"processTime":3,"state":"success","appServerID":"node-1","httpStatus":200,"result":{"processTime":9,"scanTasks":[{"taskReference":{"ID":"t1","state":"IN_PROGRESS"}},{"taskReference":{"ID":"t2"}}]}}`), 200, ""},
		"deeper":          {says(200, `{"appServerID":"node-1","result":{"response":{"scanTasks":[{"taskReference":{"ID":"t1"}}]}}}`), 200, ""},
		"other case":      {says(200, `{"State":"SUCCESS","appServerId":"node-1","taskId":"t1"}`), 200, ""},
		"without a state": {says(200, `{"appServerID":"node-1","taskID":"t1"}`), 200, ""},
		"queued":          {says(200, `{"state":"QUEUED","position":3}`), 204, ""},
		"queued, 204":     {says(204, ""), 204, ""},
		"in progress":     {says(200, `{"state":"in_progress"}`), 204, ""},
		"failed":          {says(200, `{"state":"FAILED","appServerID":"node-1"}`), 404, "submission_failed"},
		"unknown":         {says(404, ""), 404, "unknown_submission"},
		"another node":    {says(200, `{"state":"SUCCESS","appServerID":"node-9","taskID":"t1"}`), 404, "unknown_node"},
		"no node":         {says(200, `{"state":"SUCCESS","taskID":"t1"}`), 502, "broker_bad_answer"},
		"no task":         {says(200, `{"state":"SUCCESS","appServerID":"node-1"}`), 502, "broker_bad_answer"},
		"nothing":         {says(200, `{}`), 502, "broker_bad_answer"},
		"null":            {says(200, `null`), 502, "broker_bad_answer"},
		"a list":          {says(200, `[]`), 502, "broker_bad_answer"},
		"odd types":       {says(200, `{"state":1,"appServerID":{},"taskID":[],"scanTasks":[1]}`), 502, "broker_bad_answer"},
		"not JSON":        {says(200, `<html>`), 502, "broker_bad_answer"},
		"refused":         {says(403, ""), 502, "broker_refused_secret"},
		"failing":         {says(500, ""), 502, "broker_bad_answer"},
		"another page":    {says(302, ""), 502, "broker_bad_answer"},
	} {
		t.Run(name, func(t *testing.T) {
			broker.becomes(test.answer)
			r := s.get("/task?submitID=" + url.QueryEscape(name))
			r.wantStatus(t, test.status)
			switch test.status {
			case 200:
				if string(r.body) != document {
					t.Errorf("got %s", r.body)
				}
			case 204:
				r.wantHeader(t, "Retry-After", "1")
			default:
				r.wantProblem(t, test.status, test.code)
			}
			switch {
			case name == "no node" && !strings.Contains(string(r.body), "appServerID"),
				name == "no task" && !strings.Contains(string(r.body), "taskID"):
				t.Errorf("the problem does not name the missing field: %s", r.body)
			}
		})
	}
	for _, q := range broker.questions() {
		if q.Path != "/submit-result" || q.Query().Get("serect") != brokerSecret || q.Query().Get("secret") != brokerSecret {
			t.Errorf("the broker was asked %s", q)
		}
	}
	s.wantNoSecretInLog()
}

func TestSubmissionsAreKept(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, says(http.StatusOK, `{"state":"QUEUED"}`))
	s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 1s"))
	const submitted = "/task?submitID=s1"

	s.get(submitted).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
	s.get(submitted).wantHeader(t, "Cache-Status", "fsbroker; hit")
	broker.wantQuestions(t, 1)
	s.get(submitted+"&nocache").wantStatus(t, http.StatusNoContent)
	broker.wantQuestions(t, 2)

	broker.becomes(says(http.StatusOK, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	time.Sleep(1100 * time.Millisecond)
	s.get(submitted).wantStatus(t, http.StatusOK)
	broker.becomes(says(http.StatusNotFound, ""))
	s.get(submitted).wantHeader(t, "Cache-Status", "fsbroker; hit")
	s.get(submitted+"&nocache").wantStatus(t, http.StatusOK)
	broker.wantQuestions(t, 3)
	node.wantQuestions(t, 2)

	// The submission wins over the pair, which is not even looked at.
	s.get("/task?submitID=s1&appServerID=node-7").wantStatus(t, http.StatusOK)
	// The same report by its pair.
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
}

func TestWithoutBroker(t *testing.T) {
	node := newBackend(t, nil)
	s := startSite(t, options(node, ""))
	s.get("/task?submitID=s1").wantProblem(t, http.StatusBadRequest, "no_broker")
}

func TestSecretParam(t *testing.T) {
	for option, want := range map[string]string{
		"":                    "all=false&secret=the-nodes-own-secret&serect=the-nodes-own-secret&taskID=t1",
		"secret_param serect": "all=false&serect=the-nodes-own-secret&taskID=t1",
		"secret_param secret": "all=false&secret=the-nodes-own-secret&taskID=t1",
	} {
		node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
		s := startSite(t, fmt.Sprintf(`fsbroker_task {
			secret {env.CALLER_SECRET}
			node node-1 %s/base/ {
				secret {env.NODE_SECRET}
				%s
			}
		}`, node.URL, option))
		s.get(pair).wantStatus(t, http.StatusOK)
		if got := node.questions()[0]; got.RawQuery != want || got.Path != "/base/task" {
			t.Errorf("%s: the node was asked %s", option, got)
		}
	}
}

func TestNodeFaults(t *testing.T) {
	whole := reportOf("t1", "SUCCESS")
	bomb := gzipped(t, bytes.Repeat([]byte(" "), 64<<20)) // 64 MiB out of 64 KiB
	elsewhere := newBackend(t, says(http.StatusOK, whole))
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		status int
		code   string
	}{
		"not JSON":         {says(200, "<html>the-nodes-own-secret</html>"), 502, "node_bad_answer"},
		"empty":            {says(200, ""), 502, "node_bad_answer"},
		"half":             {says(200, whole[:len(whole)/2]), 502, "node_bad_answer"},
		"trailing garbage": {says(200, whole+"x"), 502, "node_bad_answer"},
		"another document": {says(200, `{"error":"the-nodes-own-secret"}`), 502, "node_bad_answer"},
		"no result":        {says(200, `{"processTime":1,"result":null}`), 502, "node_bad_answer"},
		"odd result":       {says(200, `{"processTime":1,"result":"the-nodes-own-secret"}`), 502, "node_bad_answer"},
		"odd subtasks":     {says(200, `{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":7}}`), 502, "node_bad_answer"},
		"a list":           {says(200, `[1]`), 502, "node_bad_answer"},
		"server error":     {says(500, whole), 502, "node_bad_answer"},
		"too many":         {says(429, ""), 502, "node_bad_answer"},
		"partial content":  {says(206, whole), 502, "node_bad_answer"},
		"secret refused":   {says(401, ""), 502, "node_refused_secret"},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/task?"+r.URL.RawQuery, http.StatusFound)
		}, 502, "node_bad_answer"},
		"closed": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 502, "node_bad_answer"},
		"closed half-way": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(whole)))
			_, _ = io.WriteString(w, whole[:len(whole)/2])
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, 502, "node_bad_answer"},
		"garbage instead of HTTP": {func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_, _ = io.WriteString(conn, "echo "+r.URL.String()+"\r\n\r\n")
				_ = conn.Close()
			}
		}, 502, "node_bad_answer"},
		"hanging": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 504, "node_timeout"},
		"dripping": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, " ")
				_ = http.NewResponseController(w).Flush()
				time.Sleep(20 * time.Millisecond)
			}
		}, 504, "node_timeout"},
		"gzip bomb": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb)
		}, 502, "node_answer_too_large"},
		"too large":         {says(200, whole+strings.Repeat(" ", 64<<10)), 502, "node_answer_too_large"},
		"too large, length": {says(200, strings.Repeat(" ", 1<<20)), 502, "node_answer_too_large"},
		"other encoding": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "br")
			_, _ = io.WriteString(w, whole)
		}, 502, "node_bad_answer"},
	} {
		t.Run(name, func(t *testing.T) {
			node := newBackend(t, test.answer)
			s := startSite(t, options(node, "timeout 500ms\nmax_report 64KiB"))
			for range 2 {
				r := s.get(pair)
				r.wantProblem(t, test.status, test.code)
				r.wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; detail="+test.code)
			}
			node.becomes(says(200, whole)) // none of this is held against the node
			s.get(pair).wantStatus(t, http.StatusOK)
			s.wantNoSecretInLog()
		})
	}
	elsewhere.wantQuestions(t, 0)
}

func gzipped(t *testing.T, plain []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	if _, err := zw.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestGzippingNode(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(gzipped(t, []byte(document)))
	})
	s := startSite(t, options(node, ""))
	if got := s.get(pair); string(got.body) != document {
		t.Errorf("got %q", got.body)
	}
}

func TestAnswersBeingReadAreBounded(t *testing.T) {
	document := reportOf("t1", "SUCCESS") + strings.Repeat(" ", 600<<10)
	g := newGate()
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(document)))
		_, _ = io.WriteString(w, document[:1000])
		_ = http.NewResponseController(w).Flush()
		g.then(says(http.StatusOK, document[1000:]))(w, r)
	})
	s := startSite(t, options(node, "max_report 1MiB\ncache {\n max_size 1MiB\n }"))

	first := make(chan reply, 1)
	go func() { first <- s.get(pair) }()
	within(t, "the first answer", g.entered)
	for i := range 20 {
		r := s.get(fmt.Sprintf("/task?appServerID=node-1&taskID=other-%d", i))
		r.wantProblem(t, http.StatusServiceUnavailable, "busy")
		r.wantHeader(t, "Retry-After", "1")
	}
	close(g.open)
	(<-first).wantStatus(t, http.StatusOK)
	s.get("/task?appServerID=node-1&taskID=other").wantStatus(t, http.StatusOK)
}

func TestFailDuration(t *testing.T) {
	address := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		fail_duration 1500ms
	}`, address))

	s.get(pair).wantProblem(t, http.StatusBadGateway, "node_unreachable")
	down := s.get(pair)
	down.wantProblem(t, http.StatusServiceUnavailable, "node_down")
	down.wantHeader(t, "Retry-After", "2")
	down.wantHeader(t, "Cache-Status", "fsbroker; detail=node_down")

	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	node := &httptest.Server{Listener: l, Config: &http.Server{Handler: says(http.StatusOK, reportOf("t1", "SUCCESS"))}}
	node.Start()
	t.Cleanup(node.Close)
	s.get(pair).wantProblem(t, http.StatusServiceUnavailable, "node_down")
	time.Sleep(1600 * time.Millisecond)
	s.get(pair).wantStatus(t, http.StatusOK)

	log, err := os.ReadFile(s.logFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, once := range []string{`"msg":"fails"`, `"msg":"answers again"`} {
		if n := bytes.Count(log, []byte(once)); n != 1 {
			t.Errorf("%s was logged %d times", once, n)
		}
	}
	s.wantNoSecretInLog()
}

func TestConnectTimeout(t *testing.T) {
	// A listener that is full takes no more connections, and does not refuse them either.
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tlsNode := fmt.Sprintf("https://%s", l.Addr()) // connects, but never finishes its handshake
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		timeout 300ms
	}`, tlsNode))
	s.get(pair).wantProblem(t, http.StatusGatewayTimeout, "node_timeout")
	s.get(pair).wantProblem(t, http.StatusServiceUnavailable, "node_down")
}

func TestKeptReportsOutliveTheNode(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, says(http.StatusOK, document))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	node.Close()
	s.get(pair+"&nocache").wantProblem(t, http.StatusBadGateway, "node_unreachable")
	down := s.get(pair + "&nocache")
	down.wantProblem(t, http.StatusServiceUnavailable, "node_down")
	if !strings.Contains(string(down.body), "without nocache") {
		t.Errorf("the problem does not say that there is a kept report: %s", down.body)
	}
	if got := s.get(pair); string(got.body) != document {
		t.Errorf("got %s", got.body)
	}
}

// gate is an answer that waits until it is opened.
type gate struct {
	entered, left chan struct{} // one value for each question that came, and that its asker gave up
	open          chan struct{}
}

func newGate() *gate {
	return &gate{entered: make(chan struct{}, 1000), left: make(chan struct{}, 1000), open: make(chan struct{})}
}

func (g *gate) then(answer http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		g.entered <- struct{}{}
		select {
		case <-g.open:
			answer(w, r)
		case <-r.Context().Done():
			g.left <- struct{}{}
		}
	}
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatalf("waited too long for %s", what)
	}
}

func TestOneQuestionForAllCallers(t *testing.T) {
	const callers = 200
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(says(http.StatusOK, document)))
	s := startSite(t, options(node, ""))

	var wg sync.WaitGroup
	statuses := make([]string, callers)
	for i := range callers {
		wg.Go(func() {
			r := s.get(pair)
			if r.status != http.StatusOK || string(r.body) != document {
				t.Errorf("status %d: %s", r.status, r.body)
			}
			statuses[i] = r.header.Get("Cache-Status")
		})
	}
	within(t, "the question", g.entered)
	time.Sleep(100 * time.Millisecond)
	close(g.open)
	wg.Wait()
	node.wantQuestions(t, 1)
	counts := map[string]int{}
	for _, status := range statuses {
		counts[status]++
	}
	if counts["fsbroker; fwd=uri-miss; stored"] != 1 || counts["fsbroker; fwd=uri-miss; collapsed"] == 0 {
		t.Errorf("the callers were told %v", counts)
	}
}

func TestCallersThatLeave(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(says(http.StatusOK, document)))
	s := startSite(t, options(node, ""))
	bearer := "Authorization: Bearer " + callerSecret

	// One who leaves does not take the answer away from the other.
	impatient, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := s.try(impatient, http.MethodGet, pair, bearer)
		left <- err
	}()
	within(t, "the question", g.entered)
	answered := make(chan reply, 1)
	go func() { answered <- s.get(pair) }()
	time.Sleep(100 * time.Millisecond)
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller left with %v", err)
	}
	time.Sleep(100 * time.Millisecond)
	close(g.open)
	if r := <-answered; string(r.body) != document {
		t.Errorf("the other got %s", r.body)
	}
	node.wantQuestions(t, 1)

	// When all have left, the question is dropped, and one who comes then has it asked again.
	g2 := newGate()
	node.becomes(g2.then(says(http.StatusOK, document)))
	impatient, leave = context.WithCancel(t.Context())
	go func() {
		_, err := s.try(impatient, http.MethodGet, pair+"&all", bearer)
		left <- err
	}()
	within(t, "the second question", g2.entered)
	leave()
	<-left
	within(t, "the second question to be dropped", g2.left)
	close(g2.open)
	s.get(pair+"&all").wantStatus(t, http.StatusOK)
	node.wantQuestions(t, 3)
}

func TestNocacheJoinsNoEarlierQuestion(t *testing.T) {
	stale, fresh := reportOf("t1", "SUCCESS"), reportOf("t1", "SUCCESS", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(says(http.StatusOK, stale)))
	s := startSite(t, options(node, ""))

	first := make(chan reply, 1)
	go func() { first <- s.get(pair) }()
	within(t, "the question", g.entered)
	node.becomes(says(http.StatusOK, fresh))
	const callers = 20
	rest := make(chan reply, callers)
	for range callers {
		go func() { rest <- s.get(pair + "&nocache") }()
	}
	time.Sleep(200 * time.Millisecond)
	node.wantQuestions(t, 1) // one at a time
	close(g.open)
	if r := <-first; string(r.body) != stale {
		t.Errorf("the first got %s", r.body)
	}
	for range callers {
		if r := <-rest; string(r.body) != fresh {
			t.Errorf("a nocache caller got %s", r.body)
		}
	}
	node.wantQuestions(t, 2) // and all who had come before it share the second
}

func TestSitesThatNameNodesAlike(t *testing.T) {
	one := newBackend(t, says(http.StatusOK, reportOf("one", "SUCCESS")))
	other := newBackend(t, says(http.StatusOK, reportOf("other", "SUCCESS")))
	s := startSite(t, strings.Replace(options(one, ""), "fsbroker_task", "fsbroker_task /one", 1)+"\n"+
		strings.Replace(options(other, ""), "fsbroker_task", "fsbroker_task /other", 1)+"\n"+
		strings.Replace(options(one, ""), "fsbroker_task", "fsbroker_task /same", 1))
	for range 2 {
		for _, name := range []string{"one", "other"} {
			if r := s.get("/" + name + "?appServerID=node-1&taskID=t1"); string(r.body) != reportOf(name, "SUCCESS") {
				t.Errorf("%s got %s", name, r.body)
			}
		}
	}
	s.get("/same?appServerID=node-1&taskID=t1").wantHeader(t, "Cache-Status", "fsbroker; hit")
}

func TestReloadKeepsReports(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	for i := range 5 {
		s.load(options(node, fmt.Sprintf("timeout %ds\ncache {\n max_size %dMiB\n }", i+1, i+1)))
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	}
	// A configuration that does not load changes nothing.
	if err := s.tryLoad(options(node, "broker 127.0.0.1:1 {env.NOT_SET}")); err == nil {
		t.Error("a broker with an empty secret was taken")
	}
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	node.wantQuestions(t, 1)
	if n := fsbroker.StoreUsers(); n != 1 {
		t.Errorf("%d handlers hold the store, want the one that runs", n)
	}
	// When the last handler is gone, so is what was kept.
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := fsbroker.StoreUsers(); n != 0 {
		t.Errorf("%d handlers hold the store, though none runs", n)
	}
}

func TestReloadWhileRequestsAreInFlight(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	g := newGate()
	node := newBackend(t, g.then(says(http.StatusOK, document)))
	broker := newBackend(t, g.then(says(http.StatusOK, `{"appServerID":"node-1","taskID":"t2"}`)))
	s := startSite(t, options(node, brokerOption(broker)))

	var wg sync.WaitGroup
	ask := func(path string) {
		wg.Go(func() {
			if r := s.get(path); r.status != http.StatusOK || string(r.body) != document {
				t.Errorf("%s: status %d: %s", path, r.status, r.body)
			}
		})
	}
	ask(pair)
	ask("/task?submitID=s1") // will ask the node when its own configuration has long been cleaned up
	within(t, "the first question", g.entered)
	within(t, "the second question", g.entered)
	for range 3 {
		s.load(options(node, brokerOption(broker)+"\npoll_interval 3s"))
		ask(pair)
		time.Sleep(50 * time.Millisecond)
	}
	close(g.open)
	wg.Wait()
	node.wantQuestions(t, 2)
	broker.wantQuestions(t, 1)
}

func TestStopWhileRequestsAreInFlight(t *testing.T) {
	g := newGate()
	node := newBackend(t, g.then(nil))
	s := startSite(t, options(node, "timeout 60s"))
	// a site that does not wait for long
	if err := s.loadCaddyfile(strings.Replace(s.caddyfile(options(node, "timeout 60s")), "grace_period 5s", "grace_period 200ms", 1)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := s.try(t.Context(), http.MethodGet, pair, "Authorization: Bearer "+callerSecret)
		ended <- err
	}()
	within(t, "the question", g.entered)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	s.client.CloseIdleConnections()
	node.CloseClientConnections()
	within(t, "the question to be dropped", g.left)
	<-ended
}

// forward_auth leaves dial information in the request's context, which Caddy's transport would follow.
func TestNodesAreDialledWhateverOtherHandlersLeaveBehind(t *testing.T) {
	auth := newBackend(t, says(http.StatusOK, ""))
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf(`route {
		forward_auth %s {
			uri /auth
		}
		%s
	}`, auth.URL, options(node, "")))
	s.get(pair).wantStatus(t, http.StatusOK)
	node.wantQuestions(t, 1)
	for _, q := range auth.questions() {
		if q.Path != "/auth" {
			t.Errorf("the auth server was asked %s", q.Path)
		}
	}
}

func TestTransport(t *testing.T) {
	node := httptest.NewTLSServer(says(http.StatusOK, reportOf("t1", "SUCCESS")))
	t.Cleanup(node.Close)
	host := strings.TrimPrefix(node.URL, "https://")
	ca := writeFile(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: node.Certificate().Raw})))
	options := func(address, transport string) string {
		return fmt.Sprintf(`fsbroker_task {
			secret {env.CALLER_SECRET}
			node node-1 %s {env.NODE_SECRET}
			%s
		}`, address, transport)
	}

	for _, address := range []string{host, "https://" + host} { // TLS goes without saying where it is configured
		s := startSite(t, options(address, "transport http {\n tls_trust_pool file "+ca+"\n dial_timeout 2s\n }"))
		s.get(pair).wantStatus(t, http.StatusOK)
		s.client.CloseIdleConnections()
	}
	// A placeholder in the server's name is resolved outside of any caller's request.
	s := startSite(t, options(host, "transport http {\n tls_trust_pool file "+ca+"\n tls_server_name {env.TLS_NAME}\n }"))
	t.Setenv("TLS_NAME", "example.com")
	s.get(pair).wantStatus(t, http.StatusOK)
	s.client.CloseIdleConnections()

	// A node that cannot be trusted cannot be connected to.
	s = startSite(t, options("https://"+host, ""))
	s.get(pair).wantProblem(t, http.StatusBadGateway, "node_unreachable")
	s.get(pair).wantProblem(t, http.StatusServiceUnavailable, "node_down")
	s.wantNoSecretInLog()
}

func TestJSON(t *testing.T) {
	node := newBackend(t, says(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, says(http.StatusOK, `{"appServerID":"node-1","taskID":"t1"}`))
	s := newSite(t)
	load := func(handler string) error {
		config := fmt.Sprintf(`{
			"admin": {"disabled": true, "config": {"persist": false}},
			"storage": {"module": "file_system", "root": %q},
			"logging": {"logs": {"default": {"level": "ERROR"}}},
			"apps": {
				"tls": {"certificates": {"load_files": [{"certificate": %q, "key": %q}]}},
				"http": {"servers": {"test": {
					"listen": [":%d"],
					"automatic_https": {"disable": true},
					"tls_connection_policies": [{}],
					"routes": [{"match": [{"host": ["localhost"], "path": ["/task"]}], "handle": [%s]}, {"match": [{"host": ["localhost"]}]}]
				}}}
			}
		}`, s.dir, s.write("cert.pem", certificate().pem), s.write("key.pem", certificate().key), s.port, handler)
		return caddy.Load([]byte(config), true)
	}
	if err := load(fmt.Sprintf(`{
		"handler": "fsbroker_task",
		"secrets": [{"client": "tester", "secret": "{env.CALLER_SECRET}"}],
		"nodes": [{"app_server_id": "node-1", "address": %q, "secret": "{env.NODE_SECRET}", "secret_param": "secret"}],
		"broker": {"address": %q, "secret": "{env.BROKER_SECRET}"},
		"transport": {"protocol": "http", "dial_timeout": "1s"},
		"timeout": "5s", "poll_interval": "1s", "max_wait": "90s", "max_report": 1000000, "fail_duration": "1s",
		"cache": {"ttl": "1h", "max_size": 1000000}
	}`, node.URL, broker.URL)); err != nil {
		t.Fatal(err)
	}
	s.trust()
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	s.get("/task?submitID=s1").wantHeader(t, "Cache-Status", "fsbroker; hit")

	for handler, want := range map[string]string{
		`{"handler": "fsbroker_task"}`:                                                                                                                                               "no secret is configured",
		`{"handler": "fsbroker_task", "secrets": [{"secret": ""}]}`:                                                                                                                  "the secret is empty",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{env.NOT_SET}"}]}`:                                                                                                     "{env.NOT_SET} is empty",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{no.such}"}]}`:                                                                                                         "unrecognized placeholder {no.such}",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "one {env.NOT_SET}"}]}`:                                                                                                 "braces",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "an{unspeakable}one"}]}`:                                                                                                "braces",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{unspeakable}"}]}`:                                                                                                     "braces",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{file./no/such/file}"}]}`:                                                                                              "{file./no/such/file} is empty",
		`{"handler": "fsbroker_task", "secrets": [{"client": "a b", "secret": "s"}]}`:                                                                                                "client's name wants",
		`{"handler": "fsbroker_task", "secrets": [{"client": "a", "secret": "s"}, {"client": "b", "secret": "s"}]}`:                                                                  "share one secret",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}]}`:                                                                                                                 "no node is configured",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"address": "a:1"}]}`:                                                                                  "application server ID wants",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "ftp://a"}]}`:                                                        `node "a": the address wants`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1", "secret_param": "x"}]}`:                                       "secret_param wants serect or secret",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1", "secret": "{env.NO}"}]}`:                                      "{env.NO} is empty",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "{env.NO}"}]}`:                                                       "{env.NO} is empty",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "broker": {}}`:                                              "broker: the address wants",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "timeout": -1}`:                                             "timeout wants to be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "max_wait": -1}`:                                            "max_wait wants to be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "health_interval": -1}`:                                     "health_interval wants to be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "health_timeout": -1}`:                                      "health_timeout wants to be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"ttl": -1}}`:                                      "cache.ttl wants to be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "transport": {"protocol": "no"}}`:                           "unknown module",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "transport": {"protocol": "fastcgi"}}`:                      "cannot be used: use http",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "transport": {"protocol": "http", "proxy_protocol": "v2"}}`: "proxy_protocol cannot be used",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}, {"app_server_id": "a", "address": "b:1"}]}`:                  `node "a" is configured twice`,
		`{"handler": "fsbroker_task", "no_such": 1}`:                                                                                                                                 "unknown field",
	} {
		err := load(handler)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", handler, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "unspeakable") {
			t.Errorf("%s: the error shows a part of a secret: %v", handler, err)
		}
	}
	// What did not load has changed nothing.
	s.get("/task?submitID=s1").wantHeader(t, "Cache-Status", "fsbroker; hit")
}
