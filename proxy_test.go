package fsbroker_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// proxied returns the directive for a broker whose endpoints are passed through, with options of the broker and others.
func proxied(address, ofBroker, more string) string {
	return fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		broker %s {
			secret {env.BROKER_SECRET}
			proxy
			%s
		}
		%s
	}`, address, ofBroker, more)
}

// bearer is the header field with the caller's secret.
const bearer = "Authorization: Bearer " + callerSecret

// request returns a request with a body. It has no secret unless a header field has one.
func (s *site) request(method, path string, body io.Reader, header ...string) *http.Request {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.base+path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, field := range header {
		name, value, _ := strings.Cut(field, ": ")
		req.Header.Add(name, value)
	}
	return req
}

// send sends a request with a body, and does not follow redirects.
func (s *site) send(method, path string, body io.Reader, header ...string) reply {
	s.t.Helper()
	resp, err := s.client.Transport.RoundTrip(s.request(method, path, body, header...))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, secret := range allSecrets {
		if bytes.Contains(content, []byte(secret)) || strings.Contains(fmt.Sprint(resp.Header, resp.Trailer), secret) {
			s.t.Errorf("%s %s: the response holds a secret: %v %s", method, path, resp.Header, content)
		}
	}
	return reply{resp.StatusCode, resp.Header, content}
}

// arrival is a request as a broker gets it.
type arrival struct {
	method, uri, host, body string
	header                  http.Header
	trailer                 http.Header
}

// arrivals returns the handler of a broker that records requests, and what it has recorded since the last call.
func arrivals(then http.HandlerFunc) (handler http.HandlerFunc, recorded func() []arrival) {
	var mu sync.Mutex
	var all []arrival
	handler = func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		all = append(all, arrival{r.Method, r.RequestURI, r.Host, string(body), r.Header, r.Trailer})
		mu.Unlock()
		then(w, r)
	}
	return handler, func() []arrival {
		mu.Lock()
		defer mu.Unlock()
		since := all
		all = nil
		return since
	}
}

// one returns the only arrival.
func one(t *testing.T, all []arrival) arrival {
	t.Helper()
	if len(all) != 1 {
		t.Fatalf("the broker got %d requests, want 1: %v", len(all), all)
	}
	return all[0]
}

// Every request gets to the broker as it is, apart from the secrets.
func TestProxy(t *testing.T) {
	handler, arrived := arrivals(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-From", "the broker")
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusNotFound) // the status is the caller's business
		}
		_, _ = fmt.Fprintf(w, "%s, as it is", r.URL.Path)
	})
	broker := newBackend(t, handler)
	s := startSite(t, proxied(broker.URL+"/base/", "", ""))
	all := "serect=" + brokerSecret
	all = "secret=" + brokerSecret + "&" + all
	for _, test := range []struct{ method, path, uri string }{
		{"POST", "/submit", "/submit?"},
		{"POST", "/submit?priority=7&password=a+b%26c", "/submit?priority=7&password=a+b%26c&"},
		{"POST", "/submit?x=1&serect=" + callerSecret + "&y=2", "/submit?x=1&y=2&"},
		{"GET", "/submit-result?secret=%74" + callerSecret[1:] + "&submitID=7f3c", "/submit-result?submitID=7f3c&"},
		{"GET", "/submit-result?%73ecret=" + callerSecret, "/submit-result?"},
		{"GET", "/file?sha256=00&SECRET=x&Serect=y", "/file?sha256=00&"},
		{"POST", "/reputation", "/reputation?"},
		{"GET", "/system-info?appServers", "/system-info?appServers&"},
		{"DELETE", "/submit", "/submit?"},
	} {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			s := s.in(t)
			var body io.Reader
			if test.method == "POST" {
				body = strings.NewReader("a form with a file")
			}
			r := s.send(test.method, test.path, body, bearer, "secret: "+callerSecret, "X-Api-Key: "+callerSecret,
				"Referer: https://portal.example.com/?a=b&secret="+callerSecret, "X-Original-Uri: /submit?serect="+callerSecret,
				"Accept: application/json", "Content-Type: multipart/form-data; boundary=x", "X-Mine: 1", "User-Agent: mine",
				"Accept-Encoding: br")
			want := http.StatusOK
			if test.method == "GET" {
				want = http.StatusNotFound
			}
			r.wantStatus(t, want)
			endpoint, _, _ := strings.Cut(test.path, "?")
			if string(r.body) != "/base"+endpoint+", as it is" {
				t.Errorf("the body is %s", r.body)
			}
			r.wantHeader(t, "X-From", "the broker")
			r.wantHeader(t, "X-Content-Type-Options", "nosniff")
			r.wantHeader(t, "Cache-Control", "no-store")
			got := one(t, arrived())
			if got.method != test.method || got.uri != "/base"+test.uri+all || got.host != strings.TrimPrefix(broker.URL, "http://") {
				t.Errorf("the broker got %s %s of %s", got.method, got.uri, got.host)
			}
			if body != nil && got.body != "a form with a file" {
				t.Errorf("the broker got the body %q", got.body)
			}
			if strings.Contains(fmt.Sprint(got), callerSecret) {
				t.Errorf("the broker got the caller's secret: %v", got)
			}
			for name, want := range map[string]string{
				"Secret": brokerSecret, "X-Api-Key": "", "Authorization": "", "Referer": "", "X-Original-Uri": "", "X-Mine": "1",
				"Accept": "application/json", "Content-Type": "multipart/form-data; boundary=x", "User-Agent": "mine",
				"Accept-Encoding": "br", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https",
			} {
				if got := got.header.Get(name); got != want && (name != "X-Forwarded-For" || got != "::1") {
					t.Errorf("the broker got %s: %q, want %q", name, got, want)
				}
			}
		})
	}
	s.wantNoSecretInLog()
}

// The broker gets its secret where it takes it, and nowhere else.
func TestProxySecretIn(t *testing.T) {
	handler, arrived := arrivals(responds(http.StatusOK, ""))
	broker := newBackend(t, handler)
	for secretIn, want := range map[string]string{
		"header": "/submit " + brokerSecret,
		"secret": "/submit?secret=" + brokerSecret + " ",
		"serect": "/submit?serect=" + brokerSecret + " ",
	} {
		s := startSite(t, proxied(broker.URL, "secret_in "+secretIn, ""))
		s.send("POST", "/submit", nil, bearer).wantStatus(t, http.StatusOK)
		if got := one(t, arrived()); got.uri+" "+got.header.Get("secret") != want {
			t.Errorf("%s: %s %v", secretIn, got.uri, got.header)
		}
	}
	// Without a secret of the broker, that of the caller does not get there either.
	s := startSite(t, fmt.Sprintf("fsbroker_task {\n secret {env.CALLER_SECRET}\n broker %s {\n proxy\n }\n }", broker.URL))
	s.send("POST", "/submit?secret="+callerSecret, nil, bearer, "secret: "+callerSecret).wantStatus(t, http.StatusOK)
	if got := one(t, arrived()); got.uri != "/submit" || got.header.Get("Secret") != "" {
		t.Errorf("the broker got %s %v", got.uri, got.header)
	}
}

// Only clients with a valid secret get to the broker.
func TestProxyAuthentication(t *testing.T) {
	broker := newBackend(t, responds(http.StatusOK, ""))
	s := startSite(t, proxied(broker.URL, "", ""))
	form := "--x\r\nContent-Disposition: form-data; name=\"secret\"\r\n\r\n" + callerSecret + "\r\n--x--\r\n"
	for name, test := range map[string]struct {
		path   string
		header []string
		status int
		code   string
	}{
		"none":                          {"/submit", nil, 401, "unauthorized"},
		"wrong":                         {"/submit", []string{"secret: wrong"}, 401, "unauthorized"},
		"the broker's":                  {"/submit", []string{"secret: " + brokerSecret}, 401, "unauthorized"},
		"wrong beside right":            {"/submit?secret=wrong", []string{bearer}, 401, "unauthorized"},
		"in a form":                     {"/submit", []string{"Content-Type: multipart/form-data; boundary=x"}, 401, "unauthorized"},
		"twice":                         {"/submit?secret=" + callerSecret + "&secret=" + callerSecret, nil, 400, "repeated_parameter"},
		"a broken escape":               {"/submit?a=%zz", []string{bearer}, 400, "malformed_query"},
		"a broken escape, unauthorized": {"/submit?a=%zz", nil, 401, "unauthorized"},
		"another separator":             {"/submit?a=b;secret=c", []string{bearer}, 400, "malformed_query"},
	} {
		t.Run(name, func(t *testing.T) {
			r := s.in(t).send("POST", test.path, strings.NewReader(form), test.header...)
			r.wantProblem(t, test.status, test.code)
			r.wantHeader(t, "Cache-Status", "fsbroker; detail="+test.code)
			if test.status == 401 && !strings.Contains(string(r.body), "(a field of a form is not read)") {
				t.Errorf("the problem does not say where to send the secret: %s", r.body)
			}
		})
	}
	broker.wantRequests(t, 0)
	s.send("OPTIONS", "/submit", nil).wantStatus(t, http.StatusNoContent)
	broker.wantRequests(t, 0)
	s.wantNoSecretInLog()
}

// However a path is spelled, it is one endpoint, for allow and for the broker.
func TestAllow(t *testing.T) {
	handler, arrived := arrivals(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, handler)
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET} {
			allow /task /SUBMIT-result
		}
		secret tester {env.NODE_SECRET} {
			allow /submit-Result /task
		}
		secret all {env.BROKER_SECRET}
		secret submitter submitters-secret {
			allow /submit
		}
		broker %s {
			secret {env.BROKER_SECRET}
			secret_in header
			proxy /submit /Submit-Result /file /system-info
		}
	}
	respond 418`, broker.URL))
	for path, want := range map[string]string{
		"/submit-result":               "/Submit-Result",
		"/SUBMIT-RESULT":               "/Submit-Result",
		"//submit-result":              "/Submit-Result",
		"/x/../submit-result":          "/Submit-Result",
		"/file/..//./submit-result":    "/Submit-Result",
		"/%73ubmit-result":             "/Submit-Result",
		"/file%2F..%2Fsubmit-result":   "/Submit-Result",
		"/submit":                      "forbidden",
		"/Submit":                      "forbidden",
		"/submit-result/../submit":     "forbidden",
		"/submit-result%2f..%2fsubmit": "forbidden",
		"/submit-result/..//%53ubmit":  "forbidden",
		"/system-info":                 "forbidden",
		"/file":                        "forbidden",
		"/task/../file":                "forbidden",
		"/submit-result/":              "418",
		"/submit-result;x=/submit":     "418",
		"/submit-resultx":              "418",
	} {
		r := s.send("POST", path, nil, bearer)
		got := arrived()
		switch want {
		case "forbidden":
			r.wantProblem(t, http.StatusForbidden, "forbidden")
			if len(got) > 0 {
				t.Errorf("%s: the broker got %v", path, got)
			}
		case "418":
			r.wantStatus(t, http.StatusTeapot)
		default:
			r.wantStatus(t, http.StatusOK)
			if one(t, got).uri != want {
				t.Errorf("%s: the broker got %v, want %s", path, got, want)
			}
		}
	}
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	s.send("GET", "/task?submitID=s1", nil, "secret: submitters-secret").wantProblem(t, http.StatusForbidden, "forbidden")
	s.send("GET", "/task", nil, "secret: submitters-secret").wantProblem(t, http.StatusForbidden, "forbidden")
	s.send("POST", "/submit", nil, "secret: submitters-secret").wantStatus(t, http.StatusOK)
	s.send("POST", "/file", nil, "secret: submitters-secret").wantProblem(t, http.StatusForbidden, "forbidden")
	s.send("POST", "/submit", nil, "secret: wrong").wantProblem(t, http.StatusUnauthorized, "unauthorized")
	for _, path := range []string{"/submit", "/Submit-Result", "/file", "/system-info"} {
		resp, err := s.client.Transport.RoundTrip(s.request("POST", path, nil, "secret: "+brokerSecret))
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %v %v", path, resp, err)
		}
		resp.Body.Close()
	}
	s.wantNoSecretInLog()
}

// Methods that would show the broker's secret, or what no endpoint is for, do not get to the broker.
func TestProxyMethods(t *testing.T) {
	handler, arrived := arrivals(responds(http.StatusOK, ""))
	broker := newBackend(t, handler)
	s := startSite(t, proxied(broker.URL, "", ""))
	const methods = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
	for _, method := range []string{"TRACE", "TRACK", "PROPFIND", "get", "CONNEC"} {
		r := s.send(method, "/submit", nil, bearer)
		r.wantProblem(t, http.StatusMethodNotAllowed, "method_not_allowed")
		r.wantHeader(t, "Allow", methods)
	}
	s.send("TRACE", "/submit", nil).wantProblem(t, http.StatusUnauthorized, "unauthorized")
	s.send("OPTIONS", "/submit", nil).wantHeader(t, "Allow", methods)
	s.send("OPTIONS", "/task", nil).wantHeader(t, "Allow", "GET, HEAD, OPTIONS")
	s.send("POST", "/task", nil, bearer).wantHeader(t, "Allow", "GET, HEAD, OPTIONS")
	if got := arrived(); len(got) != 0 {
		t.Errorf("the broker got %v", got)
	}
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} {
		s.send(method, "/submit", nil, bearer).wantStatus(t, http.StatusOK)
		if got := one(t, arrived()); got.method != method {
			t.Errorf("the broker got %s, want %s", got.method, method)
		}
	}
}

// Fields for one connection go no further, and no connection becomes a tunnel, which would have no endpoint.
func TestProxyHopByHop(t *testing.T) {
	handler, arrived := arrivals(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "X-Broker-Hop")
		w.Header().Set("X-Broker-Hop", "1")
		w.Header().Set("Keep-Alive", "timeout=5")
		w.WriteHeader(http.StatusOK)
	})
	broker := newBackend(t, handler)
	s := startPlainSite(t, proxied(broker.URL, "", ""))
	r := s.send("POST", "/submit", strings.NewReader("x"), bearer, "Connection: X-Caller-Hop, Upgrade", "X-Caller-Hop: 1",
		"Upgrade: h2c", "Keep-Alive: 5", "Te: trailers, deflate", "Proxy-Authorization: Basic x", "Proxy-Connection: keep-alive")
	r.wantStatus(t, http.StatusOK)
	for _, name := range []string{"X-Broker-Hop", "Keep-Alive"} {
		r.wantHeader(t, name, "")
	}
	got := one(t, arrived())
	for _, name := range []string{"Connection", "Upgrade", "X-Caller-Hop", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection"} {
		if value := got.header.Get(name); value != "" {
			t.Errorf("the broker got %s: %s", name, value)
		}
	}

	// A trailer is a header as well.
	req := s.request("POST", "/submit", io.NopCloser(strings.NewReader("x")), bearer)
	req.Trailer = http.Header{"Secret": {callerSecret}}
	resp, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got := one(t, arrived()); got.body != "x" || len(got.trailer) > 0 || resp.StatusCode != http.StatusOK {
		t.Errorf("status %d, the broker got %v", resp.StatusCode, got)
	}

	broker.setHandler(raw([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")))
	s.send("GET", "/submit", nil, bearer, "Connection: Upgrade", "Upgrade: h2c").wantProblem(t, http.StatusBadGateway, "broker_bad_answer")
}

// No field of a response repeats the broker's secret, and a redirect leads to this site.
func TestProxyResponseHeader(t *testing.T) {
	broker := newBackend(t, nil)
	s := startSite(t, proxied(broker.URL+"/base", "", ""))
	for location, want := range map[string]string{
		"URI":                           "/submit-result?submitID=1",
		"URL":                           "/submit-result?submitID=1",
		"https://other.example.com/URI": "https://other.example.com/base/submit-result?submitID=1",
		"/next?to=" + brokerSecret:      "",
		"/base/file?x=1&SECRET=y#top":   "/file?x=1#top",
		"%zz":                           "",
		"/base/a%2Fb":                   "/a/b",
		"/elsewhere":                    "/elsewhere",
	} {
		broker.setHandler(func(w http.ResponseWriter, r *http.Request) {
			location := strings.NewReplacer("/URI", r.RequestURI, "URI", r.RequestURI, "URL", broker.URL+r.RequestURI).Replace(location)
			w.Header().Set("Location", location)
			w.Header().Set("Link", "<"+r.RequestURI+">; rel=self")
			w.Header().Set("Set-Cookie", "key="+r.Header.Get("secret"))
			w.Header().Set("X-Encoded", strings.ReplaceAll(brokerSecret, "-", "%2D"))
			w.Header().Set("X-Content-Type-Options", "off")
			w.Header().Set("Cache-Control", "max-age=5")
			w.Header().Set("Trailer", "X-Late, X-Kept")
			w.WriteHeader(http.StatusFound)
			_, _ = io.WriteString(w, "moved")
			w.Header().Set("X-Late", brokerSecret)
			w.Header().Set("X-Kept", "kept")
		})
		r := s.send("GET", "/submit-result?submitID=1", nil, bearer)
		r.wantStatus(t, http.StatusFound)
		r.wantHeader(t, "Location", want)
		for _, name := range []string{"Link", "Set-Cookie", "X-Encoded"} {
			r.wantHeader(t, name, "")
		}
		r.wantHeader(t, "X-Content-Type-Options", "nosniff")
		r.wantHeader(t, "Cache-Control", "max-age=5")
	}
	// Interim responses are not passed on.
	broker.setHandler(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "<"+r.RequestURI+">; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		w.WriteHeader(http.StatusOK)
	})
	s.send("GET", "/file", nil, bearer).wantStatus(t, http.StatusOK)
	s.wantNoSecretInLog()
}

// Errors are problem documents, as they are for /task.
func TestProxyProblems(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = fmt.Fprintf(conn, "%s %s\r\n\r\n", r.URL, r.Header)
		_ = conn.Close()
	}
	aborts := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	slow := func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		status  int
		code    string
	}{
		"an echo instead of a response": {echo, 502, "broker_bad_answer"},
		"no response":                   {aborts, 502, "broker_bad_answer"},
		"a late response":               {slow, 504, "broker_timeout"},
		"a refused secret":              {responds(401, brokerSecret), 502, "broker_refused_secret"},
		"a forbidden secret":            {responds(403, brokerSecret), 502, "broker_refused_secret"},
	} {
		t.Run(name, func(t *testing.T) {
			broker := newBackend(t, test.handler)
			timeout := ""
			if test.status == http.StatusGatewayTimeout {
				timeout = "transport http {\n response_header_timeout 300ms\n }"
			}
			s := startSite(t, proxied(broker.URL, "", timeout))
			for _, method := range []string{"POST", "GET"} {
				r := s.send(method, "/submit?a=b", strings.NewReader("a file"), bearer)
				r.wantProblem(t, test.status, test.code)
				r.wantHeader(t, "Cache-Status", "fsbroker; fwd=bypass; detail="+test.code)
				r.wantHeader(t, "X-Content-Type-Options", "nosniff")
			}
			s.wantNoSecretInLog()
		})
	}
	t.Run("responses that are the caller's business", func(t *testing.T) {
		broker := newBackend(t, nil)
		s := startSite(t, proxied(broker.URL, "", ""))
		for _, status := range []int{200, 204, 400, 404, 409, 410, 413, 429, 500, 503} {
			broker.setHandler(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", "7")
				w.WriteHeader(status)
				if status != 204 {
					_, _ = io.WriteString(w, "why")
				}
			})
			r := s.send("POST", "/submit", nil, bearer)
			r.wantStatus(t, status)
			r.wantHeader(t, "Retry-After", "7")
			if status != 204 && string(r.body) != "why" {
				t.Errorf("%d: %s", status, r.body)
			}
		}
	})
}

// A broker that cannot be connected to is left alone for a while, by /task and by what is passed through.
func TestProxyWithoutBroker(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		address := strings.TrimPrefix(broker.URL, "http://")
		broker.Close()
		s := startWithAdmin(t, proxied(broker.URL, "", "fail_duration 1s"), "")
		r := s.send("POST", "/submit", strings.NewReader("a file"), bearer)
		r.wantProblem(t, http.StatusBadGateway, "broker_unreachable")
		r = s.send("POST", "/submit", strings.NewReader("a file"), bearer)
		r.wantProblem(t, http.StatusServiceUnavailable, "broker_down")
		r.wantHeader(t, "Retry-After", "1")
		r.wantHeader(t, "Cache-Status", "fsbroker; detail=broker_down")
		s.get("/task?submitID=s1").wantProblem(t, http.StatusServiceUnavailable, "broker_down")
		if fails := s.logged("fails"); len(fails) != 1 || fails[0]["code"] != "broker_unreachable" {
			t.Errorf("the log has %v", fails)
		}
		restartBackend(t, address, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		eventually(t, "the broker to be asked again", func() bool {
			return s.send("POST", "/submit", strings.NewReader("a file"), bearer).status == http.StatusOK
		})
		s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
		if again := s.logged("answers again"); len(again) != 1 {
			t.Errorf("the log has %v", again)
		}
		s.wantNoSecretInLog()
	})
}

// A broker that speaks another scheme than its address says is found out, whatever is asked of it first.
func TestProxyScheme(t *testing.T) {
	plain := newBackend(t, responds(http.StatusOK, ""))
	tls := startTLSServer(t, responds(http.StatusOK, ""))
	for address, code := range map[string]string{
		strings.Replace(plain.URL, "http:", "https:", 1): "broker_wrong_scheme",
		strings.Replace(tls.URL, "https:", "http:", 1):   "broker_wrong_scheme",
		tls.URL: "broker_untrusted_certificate",
	} {
		s := startSite(t, proxied(address, "", "fail_duration 1h"))
		for _, forward := range []string{"fwd=bypass; ", ""} { // the second time, it is not tried
			r := s.send("POST", "/submit", strings.NewReader("a file"), bearer)
			r.wantProblem(t, http.StatusBadGateway, code)
			if r.header.Get("Retry-After") == "" {
				t.Error("there is no Retry-After")
			}
			r.wantHeader(t, "Cache-Status", "fsbroker; "+forward+"detail="+code)
		}
		s.wantNoSecretInLog()
	}
	s := startSite(t, proxied(tls.URL, "", "transport http {\n tls_insecure_skip_verify\n }"))
	s.send("POST", "/submit", strings.NewReader("a file"), bearer).wantStatus(t, http.StatusOK)
}

// No log of reverse_proxy, of any level and in any format, has a secret. That of the caller is in the access log, which
// needs the format fsbroker for that.
func TestProxyLogs(t *testing.T) {
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.RequestURI, http.StatusFound) })
	s := newSite(t)
	config := strings.Replace(s.caddyfile(proxied(broker.URL, "", "fail_duration 1ms")), "format fsbroker", "format json", 1)
	if err := testsite.Load([]byte(config)); err != nil {
		t.Fatal(err)
	}
	s.trust()
	ask := func() {
		for _, path := range []string{"/submit", "/submit?secret=" + callerSecret, "/submit-result?a=b&serect=" + callerSecret} {
			s.send("POST", path, strings.NewReader("a file"), bearer, "secret: "+callerSecret, "Referer: /?secret="+callerSecret)
		}
	}
	ask()
	broker.setHandler(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, "too little")
	})
	for range 2 {
		resp, err := s.client.Do(s.request("GET", "/file", nil, bearer))
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Error("a response that is cut off looks complete")
		}
	}
	broker.Close()
	ask()
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		t.Fatal(err)
	}
	messages := make(map[string]int)
	for line := range strings.Lines(string(log)) {
		var entry struct{ Logger, Msg, Error string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if strings.Contains(line, brokerSecret) {
			t.Errorf("the log has the broker's secret: %s", line)
		}
		if strings.HasPrefix(entry.Logger, "http.handlers.") && strings.Contains(line, callerSecret) {
			t.Errorf("the log has the caller's secret: %s", line)
		}
		if entry.Logger == "http.handlers.reverse_proxy" {
			messages[entry.Msg]++
		}
	}
	if messages["upstream roundtrip"] < 5 || messages["aborting with incomplete response"] != 2 {
		t.Errorf("reverse_proxy logs %v", messages)
	}
}

// A file is never sent twice, whatever happens to the first try.
func TestProxyNeverRepeatsAFile(t *testing.T) {
	var mu sync.Mutex
	bodies := 0
	broker := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		mu.Lock()
		bodies++
		mu.Unlock()
		if r.Header.Get("X-Abort") != "" {
			panic(http.ErrAbortHandler)
		}
	})
	s := startSite(t, proxied(broker.URL, "", ""))
	for _, abort := range []string{"X-Abort: 1", "X-Go: on", "X-Abort: 1", "Idempotency-Key: 1"} {
		header := []string{bearer, abort}
		if strings.HasPrefix(abort, "Idempotency") { // which lets Go's transport repeat a request
			header = append(header, "X-Abort: 1")
		}
		s.send("POST", "/submit", strings.NewReader("a file"), header...)
	}
	mu.Lock()
	defer mu.Unlock()
	if bodies != 4 {
		t.Errorf("4 files got to the broker %d times", bodies)
	}
}

// The site's request_body bounds what is uploaded, whether or not the size is announced.
func TestProxyRequestBody(t *testing.T) {
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprint(w, n)
	})
	s := startSite(t, "request_body {\n max_size 1MB\n }\n"+proxied(broker.URL, "", ""))
	r := s.send("POST", "/submit", strings.NewReader(strings.Repeat("x", 999_000)), bearer)
	r.wantStatus(t, http.StatusOK)
	if string(r.body) != "999000" {
		t.Errorf("the broker got %s bytes", r.body)
	}
	s.send("POST", "/submit", strings.NewReader(strings.Repeat("x", 1_000_001)), bearer).wantStatus(t, http.StatusRequestEntityTooLarge)
	unannounced := struct{ io.Reader }{strings.NewReader(strings.Repeat("x", 1_000_001))}
	s.send("POST", "/submit", unannounced, bearer).wantProblem(t, http.StatusRequestEntityTooLarge, "request_too_large")
	if s.logged("fails") != nil {
		t.Error("the broker is blamed")
	}
	s.send("POST", "/submit", strings.NewReader("x"), bearer).wantStatus(t, http.StatusOK)
}

// The server's read timeout ends an upload that does not go on. The broker is not blamed for it.
func TestProxySlowUpload(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
		s := newAdminSite(t, "servers {\n timeouts {\n read_body 300ms\n }\n }")
		s.load(proxied(broker.URL, "", ""))
		s.trust()
		reader, writer := io.Pipe()
		defer writer.Close()
		go func() { _, _ = io.WriteString(writer, "the beginning of a file") }()
		before := s.scrape()
		s.send("POST", "/submit", reader, bearer).wantProblem(t, http.StatusRequestTimeout, "request_timeout")
		s.wantMetrics(before, map[string]string{`requests_total{cache="none",client="tester",code="408",endpoint="/submit"}`: "1"})
		s.send("POST", "/submit", strings.NewReader("a file"), bearer).wantStatus(t, http.StatusOK)
	})
}

// The site's encode compresses what the broker does not.
func TestProxyEncode(t *testing.T) {
	document := strings.Repeat(`{"file":"AAAA"}`, 1000)
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		responds(http.StatusOK, document)(w, r)
	})
	s := startSite(t, "encode gzip\n"+proxied(broker.URL, "", ""))
	r := s.send("GET", "/file", nil, bearer, "Accept-Encoding: gzip")
	r.wantHeader(t, "Content-Encoding", "gzip")
	if r.plain(t) != document || len(r.body) > len(document)/10 {
		t.Errorf("got %d bytes", len(r.body))
	}
	broker.setHandler(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(gzipped(t, []byte(document)))
	})
	r = s.send("GET", "/file", nil, bearer, "Accept-Encoding: gzip")
	if r.header.Get("Content-Encoding") != "gzip" || r.plain(t) != document {
		t.Errorf("got %d bytes in %s", len(r.body), r.header.Get("Content-Encoding"))
	}
	if r = s.send("GET", "/file", nil, bearer); r.header.Get("Content-Encoding") != "" || string(r.body) != document {
		t.Errorf("got %d bytes in %s", len(r.body), r.header.Get("Content-Encoding"))
	}
}

// Bodies are streamed in both directions, for longer than timeout.
func TestProxyStreams(t *testing.T) {
	fsbroker.SkipIfShort(t)
	for _, start := range []func(testing.TB, string) *site{startSite, func(t testing.TB, d string) *site { return startPlainSite(t.(*testing.T), d) }} {
		received := make(chan string, 2)
		goOn := make(chan struct{})
		broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			part := make([]byte, 100)
			n, _ := r.Body.Read(part)
			received <- string(part[:n])
			rest, _ := io.ReadAll(r.Body)
			time.Sleep(400 * time.Millisecond)
			_, _ = io.WriteString(w, "first, ")
			_ = http.NewResponseController(w).Flush()
			received <- string(rest)
			select {
			case <-goOn:
			case <-r.Context().Done():
			}
			_, _ = io.WriteString(w, "then the rest")
		})
		s := start(t, proxied(broker.URL, "", "timeout 200ms"))
		reader, writer := io.Pipe()
		answer := make(chan *http.Response, 1)
		go func() {
			resp, err := s.client.Do(s.request("POST", "/submit", reader, bearer))
			if err != nil {
				t.Error(err)
				return
			}
			answer <- resp
		}()
		_, _ = io.WriteString(writer, "a part")
		if got := within(t, "what the broker gets", received); got != "a part" {
			t.Errorf("the broker got %q before the end", got)
		}
		time.Sleep(400 * time.Millisecond)
		_, _ = io.WriteString(writer, " and the end")
		_ = writer.Close()
		resp := within(t, "the answer", answer)
		part := make([]byte, 100)
		n, err := resp.Body.Read(part)
		if got := string(part[:n]); got != "first, " || err != nil {
			t.Errorf("the caller got %q before the end: %v", got, err)
		}
		if got := within(t, "what the broker gets", received); got != " and the end" {
			t.Errorf("the broker got %q at the end", got)
		}
		close(goOn)
		if rest, err := io.ReadAll(resp.Body); string(rest) != "then the rest" || err != nil {
			t.Errorf("the caller got %q at the end: %v", rest, err)
		}
		resp.Body.Close()
	}
}

// repeated is a reader of n bytes.
func repeated(n int64) io.Reader { return io.LimitReader(endless{}, n) }

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i)
	}
	return len(p), nil
}

// However large a body is, it takes no memory.
func TestProxyMemory(t *testing.T) {
	fsbroker.SkipIfShort(t)
	if fsbroker.RaceDetector {
		t.Skip("the race detector makes allocations larger")
	}
	const size = 200 * mib
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			n, _ := io.Copy(io.Discard, r.Body)
			_, _ = fmt.Fprint(w, n)
			return
		}
		_, _ = io.Copy(w, repeated(size))
	})
	s := startSite(t, proxied(broker.URL, "", "cache {\n max_size 16MiB\n }"))
	s.send("POST", "/submit", strings.NewReader("x"), bearer)
	peak := peakHeap(func() {
		if r := s.send("POST", "/submit", repeated(size), bearer); string(r.body) != fmt.Sprint(size) {
			t.Errorf("the broker got %s bytes", r.body)
		}
	})
	t.Logf("200 MiB up: %d MiB", peak/mib)
	if peak > 8*mib {
		t.Errorf("an upload of 200 MiB takes %d MiB", peak/mib)
	}
	peak = peakHeap(func() {
		resp, err := s.client.Do(s.request("GET", "/file", nil, bearer))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
			t.Errorf("the caller got %d bytes: %v", n, err)
		}
	})
	t.Logf("200 MiB down: %d MiB", peak/mib)
	if peak > 8*mib {
		t.Errorf("a download of 200 MiB takes %d MiB", peak/mib)
	}
}

// A caller that leaves ends the request to the broker. It is counted as one that left.
func TestProxyCallerLeaves(t *testing.T) {
	g := newGate()
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/file" {
			_, _ = io.WriteString(w, "the beginning")
			_ = http.NewResponseController(w).Flush()
		}
		g.then(nil)(w, r)
	})
	s := startWithAdmin(t, proxied(broker.URL, "", ""), "")
	before := s.scrape()
	for _, path := range []string{"/submit", "/file"} {
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			resp, err := s.client.Do(s.request("POST", path, strings.NewReader("a file"), bearer).WithContext(ctx))
			if err == nil {
				_, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			left <- err
		}()
		within(t, "the request", g.entered)
		leave()
		within(t, "the broker to notice", g.left)
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	eventually(t, "both to be counted", func() bool {
		after := s.scrape()
		return after[`caddy_fsbroker_requests_total{cache="none",client="tester",code="499",endpoint="/file"}`] != "" &&
			after[`caddy_fsbroker_requests_total{cache="none",client="tester",code="499",endpoint="/submit"}`] != ""
	})
	s.wantMetrics(before, map[string]string{
		`requests_total{cache="none",client="tester",code="499",endpoint="/submit"}`: "1",
		`requests_total{cache="none",client="tester",code="499",endpoint="/file"}`:   "1",
	})
}

// What is passed through is in metrics and logs, like requests for reports.
func TestProxyIsCounted(t *testing.T) {
	broker := newBackend(t, nil)
	s := startWithAdmin(t, proxied(broker.URL, "", "")+"\nheader >X-Came-By {http.fsbroker.client}/{http.fsbroker.upstream}", "")
	host := strings.TrimPrefix(broker.URL, "http://")
	before := s.scrape()
	broker.setHandler(responds(http.StatusOK, ""))
	r := s.send("POST", "/SUBMIT", nil, bearer, "User-Agent: agent-1")
	r.wantHeader(t, "X-Came-By", "tester/broker")
	s.send("POST", "/submit", nil, "User-Agent: agent-2").wantHeader(t, "X-Came-By", "/")
	broker.setHandler(responds(http.StatusNotFound, ""))
	s.send("GET", "/file?sha256=secret-sum", nil, bearer).wantStatus(t, http.StatusNotFound)
	broker.setHandler(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	s.send("POST", "/file", nil, bearer).wantStatus(t, http.StatusBadGateway)
	broker.setHandler(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, "too little")
	})
	resp, err := s.client.Do(s.request("GET", "/reputation", nil, bearer))
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("a response that is cut off looks complete")
	}
	s.wantMetrics(before, map[string]string{
		`requests_total{cache="none",client="tester",code="200",endpoint="/submit"}`:            "1",
		`requests_total{cache="none",client="",code="401",endpoint="/submit"}`:                  "1",
		`requests_total{cache="none",client="tester",code="404",endpoint="/file"}`:              "1",
		`requests_total{cache="none",client="tester",code="502",endpoint="/file"}`:              "1",
		`requests_total{cache="none",client="tester",code="502",endpoint="/reputation"}`:        "1",
		`questions_total{node="",outcome="answered",role="broker"}`:                             "2",
		`questions_total{node="",outcome="unknown",role="broker"}`:                              "1",
		`questions_total{node="",outcome="bad_answer",role="broker"}`:                           "1",
		`questions_in_flight{address="` + host + `",namespace="default",node="",role="broker"}`: "0",
	})
	for series := range s.scrape() {
		if strings.Contains(series, "secret-") || strings.Contains(series, "SUBMIT") {
			t.Errorf("the series %s has a name that a caller sent", series)
		}
	}
	logged := s.accessLog("agent-1")
	for field, want := range map[string]any{
		"fsbroker_client": "tester", "user_id": "tester", "fsbroker_cache": "none", "fsbroker_upstream": "broker",
	} {
		if logged[field] != want {
			t.Errorf("the access log has %v in %s, want %v", logged[field], field, want)
		}
	}
}

// A request that is passed through is a span below that of the caller's request.
func TestProxyIsTraced(t *testing.T) {
	c := startCollector(t)
	handler, arrived := arrivals(responds(http.StatusOK, ""))
	broker := newBackend(t, handler)
	s := startSite(t, "tracing {\n span site\n }\n"+proxied(broker.URL, "", ""))
	s.send("POST", "/submit?submitID=secret-submission", strings.NewReader("x"), bearer).wantStatus(t, http.StatusOK)
	traceparent := one(t, arrived()).header.Get("Traceparent")
	s.restart(proxied(broker.URL, "", "")) // which exports the spans
	c.mu.Lock()
	defer c.mu.Unlock()
	found := false
	for _, span := range c.spans {
		if span.GetName() != "fsbroker submit" {
			continue
		}
		found = true
		if want := fmt.Sprintf("%x", span.GetSpanId()); !strings.Contains(traceparent, want) {
			t.Errorf("the broker got the traceparent %s, want the span %s", traceparent, want)
		}
	}
	if !found {
		t.Errorf("there is no span: %v", c.spans)
	}
	for _, text := range append(slices.Clone(allSecrets), "secret-submission") {
		if bytes.Contains(c.raw, []byte("fsbroker submit?")) || text != "secret-submission" && bytes.Contains(c.raw, []byte(text)) {
			t.Errorf("the spans have %s", text)
		}
	}
}

// A reload does not interrupt an upload.
func TestProxyDuringReload(t *testing.T) {
	arrived := make(chan struct{}, 2)
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		sum := sha256.New()
		_, _ = io.Copy(sum, r.Body)
		_, _ = fmt.Fprintf(w, "%x", sum.Sum(nil))
	})
	s := startSite(t, proxied(broker.URL, "", ""))
	reader, writer := io.Pipe()
	answer := make(chan string, 1)
	go func() {
		resp, err := s.client.Do(s.request("POST", "/submit", reader, bearer))
		if err != nil {
			t.Error(err)
			return
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		answer <- string(body)
	}()
	_, _ = io.WriteString(writer, "a part")
	within(t, "the beginning", arrived)
	s.load(proxied(broker.URL, "", "timeout 20s"))
	_, _ = io.WriteString(writer, " and the end")
	_ = writer.Close()
	if got := within(t, "the answer", answer); got != fmt.Sprintf("%x", sha256.Sum256([]byte("a part and the end"))) {
		t.Errorf("the broker got something else: %s", got)
	}
	s.send("POST", "/submit", strings.NewReader("x"), bearer).wantStatus(t, http.StatusOK)
}

// Without proxy, the handler serves /task and nothing else.
func TestWithoutProxy(t *testing.T) {
	broker := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf("fsbroker_task {\n secret {env.CALLER_SECRET}\n broker %s {env.BROKER_SECRET}\n }\n respond 418", broker.URL))
	for _, path := range []string{"/submit", "/submit-result", "/file", "/reputation", "/system-info"} {
		s.send("POST", path, nil, bearer).wantStatus(t, http.StatusTeapot)
	}
	broker.wantRequests(t, 0)
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
}

// The handlers of a namespace pass the same endpoints through. What a client may use is a handler's own business.
func TestProxyOfANamespace(t *testing.T) {
	broker := newBackend(t, responds(http.StatusOK, ""))
	directive := func(path, allow, proxy string) string {
		return fmt.Sprintf("handle_path %s/* {\n fsbroker_task {\n secret {env.CALLER_SECRET} {\n allow %s\n }\n broker %s {\n proxy %s\n }\n }\n }\n", path, allow, broker.URL, proxy)
	}
	s := startSite(t, directive("/one", "/submit", "/submit /file")+directive("/other", "/file", "/submit /file"))
	statuses := make(map[string]int)
	for _, path := range []string{"/one/submit", "/one/file", "/other/submit", "/other/file"} {
		statuses[path] = s.send("POST", path, nil, bearer).status
	}
	if want := map[string]int{"/one/submit": 200, "/one/file": 403, "/other/submit": 403, "/other/file": 200}; !maps.Equal(statuses, want) {
		t.Errorf("the statuses are %v, want %v", statuses, want)
	}
	err := s.tryLoad(directive("/one", "/submit", "/submit") + directive("/other", "/submit", "/submit /file"))
	if err == nil || !strings.Contains(err.Error(), "differ in proxy, at Caddyfile:") {
		t.Errorf("handlers that differ load: %v", err)
	}
}

// A request that another handler has sent elsewhere is passed to the broker nevertheless.
func TestProxyAfterForwardAuth(t *testing.T) {
	gate := newBackend(t, responds(http.StatusOK, ""))
	handler, arrived := arrivals(responds(http.StatusOK, ""))
	broker := newBackend(t, handler)
	s := startSite(t, fmt.Sprintf("route {\n forward_auth %s {\n uri /auth\n transport http {\n network_proxy none\n }\n }\n %s\n }", gate.URL, proxied(broker.URL, "", "")))
	s.send("POST", "/submit", strings.NewReader("a file"), bearer).wantStatus(t, http.StatusOK)
	if got := one(t, arrived()); got.body != "a file" {
		t.Errorf("the broker got %v", got)
	}
	if len(gate.requests()) == 0 {
		t.Error("forward_auth sent no request")
	}
}

// An IPv6 address is a broker like another.
func TestProxyIPv6(t *testing.T) {
	listener, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: responds(http.StatusOK, "")}}
	server.Start()
	t.Cleanup(server.Close)
	s := startSite(t, proxied(server.URL, "", ""))
	s.send("POST", "/submit", strings.NewReader("a file"), bearer).wantStatus(t, http.StatusOK)
}
