package fsbroker_test

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSecretIn(t *testing.T) {
	for option, want := range map[string]struct {
		query  string
		header []string
	}{
		"":                               {"all=false&secret=the-nodes-own-secret&serect=the-nodes-own-secret&taskID=t1", []string{nodeSecret}},
		"secret_in serect":               {"all=false&serect=the-nodes-own-secret&taskID=t1", nil},
		"secret_in secret":               {"all=false&secret=the-nodes-own-secret&taskID=t1", nil},
		"secret_in header":               {"all=false&taskID=t1", []string{nodeSecret}},
		"secret_in header secret":        {"all=false&secret=the-nodes-own-secret&taskID=t1", []string{nodeSecret}},
		"secret_in serect header secret": {"all=false&secret=the-nodes-own-secret&serect=the-nodes-own-secret&taskID=t1", []string{nodeSecret}},
	} {
		var header http.Header
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			header = r.Header.Clone()
			responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
		})
		s := startSite(t, fmt.Sprintf(`fsbroker_task {
			secret {env.CALLER_SECRET}
			node node-1 %s/base/ {
				secret {env.NODE_SECRET}
				%s
			}
		}`, node.URL, option))
		s.get(pair).wantStatus(t, http.StatusOK)
		if got := node.requests()[0]; got.RawQuery != want.query || got.Path != "/base/task" {
			t.Errorf("%s: the node got a request for %s", option, got)
		}
		if got := header["Secret"]; !slices.Equal(got, want.header) {
			t.Errorf("%s: the node got the header %q", option, got)
		}
		s.wantNoSecretInLog()
	}
	// Without a secret, none is sent.
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "all=false&taskID=t1" || r.Header["Secret"] != nil {
			t.Errorf("the node got %s and %v", r.URL, r.Header)
		}
		responds(http.StatusOK, reportOf("t1", "SUCCESS"))(w, r)
	})
	s := startSite(t, "fsbroker_task {\n secret {env.CALLER_SECRET}\n node node-1 "+node.URL+"\n}")
	s.get(pair).wantStatus(t, http.StatusOK)
}

func TestNodeFaults(t *testing.T) {
	whole := reportOf("t1", "SUCCESS")
	bomb := gzipped(t, bytes.Repeat([]byte(" "), 64<<20)) // 64 MiB out of 64 KiB
	elsewhere := newBackend(t, responds(http.StatusOK, whole))
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		status  int
		code    string
	}{
		"not JSON":         {responds(200, "<html>the-nodes-own-secret</html>"), 502, "node_bad_answer"},
		"empty":            {responds(200, ""), 502, "node_bad_answer"},
		"half":             {responds(200, whole[:len(whole)/2]), 502, "node_bad_answer"},
		"trailing garbage": {responds(200, whole+"x"), 502, "node_bad_answer"},
		"another document": {responds(200, `{"error":"the-nodes-own-secret"}`), 502, "node_bad_answer"},
		"no result":        {responds(200, `{"processTime":1,"result":null}`), 502, "node_bad_answer"},
		"odd result":       {responds(200, `{"processTime":1,"result":"the-nodes-own-secret"}`), 502, "node_bad_answer"},
		"odd subtasks":     {responds(200, `{"result":{"taskReference":{"state":"SUCCESS"},"subtaskReferences":7}}`), 502, "node_bad_answer"},
		"a list":           {responds(200, `[1]`), 502, "node_bad_answer"},
		"server error":     {responds(500, whole), 502, "node_bad_answer"},
		"too many":         {responds(429, ""), 503, "node_overloaded"},
		"partial content":  {responds(206, whole), 502, "node_bad_answer"},
		"secret refused":   {responds(401, ""), 502, "node_refused_secret"},
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
				time.Sleep(20 * time.Millisecond) // the pace at which it drips
			}
		}, 504, "node_timeout"},
		"gzip bomb": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb)
		}, 502, "node_answer_too_large"},
		"too large":         {responds(200, whole+strings.Repeat(" ", 64<<10)), 502, "node_answer_too_large"},
		"too large, length": {responds(200, strings.Repeat(" ", 1<<20)), 502, "node_answer_too_large"},
		"other encoding": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "br")
			_, _ = io.WriteString(w, whole)
		}, 502, "node_bad_answer"},
	} {
		t.Run(name, func(t *testing.T) {
			node := newBackend(t, test.handler)
			timeout := ""
			if test.status == http.StatusGatewayTimeout {
				timeout = "timeout 500ms"
			}
			s := startSite(t, options(node, timeout+"\nmax_report 64KiB"))
			for range 2 {
				r := s.get(pair)
				r.wantProblem(t, test.status, test.code)
				r.wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; detail="+test.code)
			}
			node.setHandler(responds(200, whole)) // such a response does not make the node count as down
			s.get(pair).wantStatus(t, http.StatusOK)
			s.wantNoSecretInLog()
		})
	}
	elsewhere.wantRequests(t, 0)
}

func TestGzippingNode(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	compressed := gzipped(t, []byte(document))
	node := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(compressed)
	})
	s := startSite(t, options(node, ""))
	if got := s.get(pair); string(got.body) != document {
		t.Errorf("got %q", got.body)
	}
}

func TestFailDuration(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		address := refused(t)
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

		restartBackend(t, address, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		s.get(pair).wantProblem(t, http.StatusServiceUnavailable, "node_down")
		s.getUntil(pair, "the node to be tried again", func(r reply) bool {
			return r.status != http.StatusServiceUnavailable
		}).wantStatus(t, http.StatusOK)

		log, err := os.ReadFile(s.logFile())
		if err != nil {
			t.Fatal(err)
		}
		for _, once := range []string{`"msg":"node fails"`, `"msg":"node answers again"`} {
			if n := bytes.Count(log, []byte(once)); n != 1 {
				t.Errorf("%s was logged %d times", once, n)
			}
		}
		s.wantNoSecretInLog()
	})
}

func TestConnectTimeout(t *testing.T) {
	// Nothing accepts the listener's connections, so a TLS handshake never ends.
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tlsNode := fmt.Sprintf("https://%s", l.Addr())
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
	node := newBackend(t, responds(http.StatusOK, document))
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

// forward_auth leaves dial information in the request's context, which Caddy's transport would use.
func TestNodesAreDialledDespiteOtherHandlers(t *testing.T) {
	auth := newBackend(t, responds(http.StatusOK, ""))
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, fmt.Sprintf(`route {
		forward_auth %s {
			uri /auth
		}
		%s
	}`, auth.URL, options(node, "")))
	s.get(pair).wantStatus(t, http.StatusOK)
	node.wantRequests(t, 1)
	for _, q := range auth.requests() {
		if q.Path != "/auth" {
			t.Errorf("the auth server got a request for %s", q.Path)
		}
	}
}

func TestTransport(t *testing.T) {
	node := startTLSServer(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	host := strings.TrimPrefix(node.URL, "https://")
	ca := writeFile(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: node.Certificate().Raw})))
	options := func(address, transport string) string {
		return fmt.Sprintf(`fsbroker_task {
			secret {env.CALLER_SECRET}
			node node-1 %s {env.NODE_SECRET}
			%s
		}`, address, transport)
	}

	for _, address := range []string{host, "https://" + host} { // a TLS transport makes https the default scheme
		s := startSite(t, options(address, "transport http {\n tls_trust_pool file "+ca+"\n dial_timeout 2s\n }"))
		s.get(pair).wantStatus(t, http.StatusOK)
		s.client.CloseIdleConnections()
	}
	// A placeholder in the server's name is resolved without a caller's request.
	s := startSite(t, options(host, "transport http {\n tls_trust_pool file "+ca+"\n tls_server_name {env.TLS_NAME}\n }"))
	t.Setenv("TLS_NAME", "example.com")
	s.get(pair).wantStatus(t, http.StatusOK)
	s.client.CloseIdleConnections()

	// A node whose certificate is not trusted cannot be connected to.
	s = startSite(t, options("https://"+host, ""))
	s.get(pair).wantProblem(t, http.StatusBadGateway, "node_untrusted_certificate")
	s.wantNoSecretInLog()
}
