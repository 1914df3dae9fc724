package fsbroker_test

import (
	"bytes"
	"fmt"
	"log"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// The outcome of a request is in the access log, and in placeholders that directives evaluate when the response is
// written or later.
func TestRequestsAreLogged(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("submitID") == "s2" {
			responds(http.StatusOK, reportOf("t2", "SUCCESS"))(w, r)
			return
		}
		explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`)(w, r)
	})
	s := startSite(t, options(node, brokerOption(broker))+`
	header >X-Came-By {http.fsbroker.client}/{http.fsbroker.cache}/{http.fsbroker.node}/{http.fsbroker.upstream}
	log_append by_directive {http.fsbroker.cache}`)
	bearer := "Authorization: Bearer " + callerSecret
	for i, test := range []struct {
		path, secret                  string
		client, cache, node, upstream string
	}{
		{pair, bearer, "tester", "miss", "node-1", "node"},
		{pair, bearer, "tester", "hit", "node-1", ""},
		{"/task?submitID=s1", bearer, "tester", "miss", "node-1", "node"},
		{"/task?submitID=s1", bearer, "tester", "hit", "", ""},
		{"/task?submitID=s2", bearer, "tester", "miss", "", "broker"},
		{pair + "&nocache", bearer, "tester", "bypass", "node-1", "node"},
		{"/task", bearer, "tester", "none", "", ""},
		{"/task?appServerID=node-2&taskID=t1", bearer, "tester", "error", "", ""},
		{pair, "X-No: secret", "", "none", "", ""},
	} {
		agent := "request-" + string(rune('a'+i))
		r := s.do(t.Context(), http.MethodGet, test.path, test.secret, "User-Agent: "+agent)
		r.wantHeader(t, "X-Came-By", test.client+"/"+test.cache+"/"+test.node+"/"+test.upstream)
		logged := s.accessLog(agent)
		for field, want := range map[string]string{
			"fsbroker_client": test.client, "fsbroker_cache": test.cache, "fsbroker_node": test.node,
			"fsbroker_upstream": test.upstream,
			"by_directive":      test.cache, "user_id": test.client,
		} {
			if got, ok := logged[field].(string); got != want || ok != (want != "" || field == "user_id") {
				t.Errorf("%s: the access log has %v in %s, want %q", agent, logged[field], field, want)
			}
		}
	}

	node.setHandler(responds(http.StatusNotFound, ""))
	s.get("/task?appServerID=node-1&taskID=t2").wantHeader(t, "X-Came-By", "tester/error/node-1/")
	s.wantNoSecretInLog()
}

func TestSecretInQueryIsAdvisedAgainst(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	directives := strings.Replace(options(node, ""), "secret tester", "secret other {env.NODE_SECRET}\nsecret tester {env.BROKER_SECRET}\nsecret tester", 1)
	s := startSite(t, directives)
	const advice = "Authorization: Bearer"

	s.get(pair)
	s.do(t.Context(), http.MethodGet, pair+"&secret=wrong")
	if got := s.logged(advice); len(got) != 0 {
		t.Errorf("want no warning yet: %v", got)
	}
	for range 3 {
		s.do(t.Context(), http.MethodGet, pair+"&secret="+callerSecret).wantStatus(t, 200)
		s.do(t.Context(), http.MethodGet, pair+"&serect="+brokerSecret).wantStatus(t, 200)
	}
	if got := s.logged(advice); len(got) != 1 || got[0]["client"] != "tester" || got[0]["level"] != "warn" {
		t.Errorf("want one warning for the client tester: %v", got)
	}
	s.do(t.Context(), http.MethodGet, pair+"&secret="+nodeSecret).wantStatus(t, 200)
	if got := s.logged(advice); len(got) != 2 || got[1]["client"] != "other" {
		t.Errorf("want another warning, for the client other: %v", got)
	}
	s.load(directives)
	eventually(t, "another warning with the new configuration", func() bool {
		s.do(t.Context(), http.MethodGet, pair+"&secret="+callerSecret)
		return len(s.logged(advice)) == 3
	})
	s.wantNoSecretInLog()
}

// syncBuffer is a buffer for several goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// net/http prints what a node sends on an idle connection to the standard logger, which may be an echo of its secret.
func TestSecretInUnsolicitedResponse(t *testing.T) {
	output := new(syncBuffer)
	was := log.Writer()
	log.SetOutput(output)
	t.Cleanup(func() { log.SetOutput(was) })
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%secho %s", len(document), document, r.URL)
		_ = conn.Close()
	})
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)
	eventually(t, "the line", func() bool { return strings.Contains(output.String(), "Unsolicited response") })
	if strings.Contains(output.String(), nodeSecret) {
		t.Errorf("the standard logger prints a secret: %s", output)
	}
}
