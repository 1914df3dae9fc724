package javabackend_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// callerSecret is what the callers of Caddy send.
const callerSecret = "of the callers"

// startCaddy runs Caddy with the module in front of a Java server until the test ends, and returns its URL. The upstreams
// are a line for the broker and one for the node.
func startCaddy(t *testing.T, upstreams string) string {
	t.Helper()
	site := fmt.Sprintf("http://127.0.0.1:%d", testenv.Port(t))
	dir := t.TempDir()
	t.Setenv("XDG_DATA_HOME", dir) // Caddy writes its instance ID there
	t.Setenv("CALLER_SECRET", callerSecret)
	t.Setenv("UPSTREAM_SECRET", secret)
	text := fmt.Sprintf(`{
		admin off
		persist_config off
		storage file_system "%s"
		grace_period 3s
		log {
			output discard
		}
	}
	%s {
		fsbroker_task {
			secret portal {env.CALLER_SECRET}
			%s
			poll_interval 100ms
		}
	}`, filepath.ToSlash(dir), site, upstreams)
	testsite.Run(t, []byte(text))
	return site
}

// upstreams returns the lines for the broker and the node, with the secret in the header alone. The secret and the
// transport may be wrong.
func (s *server) upstreams(secret, transport string) string {
	const secretIn = "{\nsecret %s\nsecret_in header\n}\n"
	return fmt.Sprintf("broker %s "+secretIn+"node %s %s "+secretIn+"%s", s.broker, secret, s.appServerID, s.node, secret, transport)
}

// pinned is the transport that trusts the server's certificate alone.
func (s *server) pinned() string {
	return fmt.Sprintf("transport http {\ntls_trust_pool file \"%s\"\n}", filepath.ToSlash(certificate()))
}

// getTask sends a request to Caddy.
func getTask(t *testing.T, site, query string) (response *http.Response, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, site+"/task?"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+callerSecret)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err = client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(text)
}

// TestReportsThroughCaddy gets the report of a submission from Caddy, which outlives that of the Java server.
func TestReportsThroughCaddy(t *testing.T) {
	s := start(t, time.Second, 3*time.Second)
	site := startCaddy(t, s.upstreams("{env.UPSTREAM_SECRET}", s.pinned()))
	var bySubmission, byTask, report, ofNode string
	// Again if the server has deleted a report before the test could ask for it.
	testenv.Eventually(t, "both reports", func() bool {
		accepted := s.submit(t, "sample.txt", []byte("a small text"))
		bySubmission = fmt.Sprint("submitID=", accepted["ID"])
		var response *http.Response
		if response, report = getTask(t, site, bySubmission+"&wait=50"); response.StatusCode == http.StatusNotFound {
			return false
		}
		var document map[string]any
		if err := json.Unmarshal([]byte(report), &document); err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("status %d: %s (%v)", response.StatusCode, report, err)
		}
		if part(document, "result.file.hash") != accepted["sha256"] || part(document, "result.finalVerdict.verdict") != "UNKNOWN" {
			t.Errorf("the report is not that of the broker: %s", report)
		}
		byTask = fmt.Sprintf("appServerID=%s&taskID=%s", s.appServerID, part(document, "result.taskReference.ID"))
		if response, ofNode = getTask(t, site, byTask); response.StatusCode == http.StatusNotFound {
			return false
		}
		if response.StatusCode != http.StatusOK || strings.Contains(ofNode, "finalVerdict") {
			t.Fatalf("the report is not that of the node: status %d: %s", response.StatusCode, ofNode)
		}
		return true
	})

	for _, target := range []string{s.broker + "/task?" + bySubmission, s.node + "/task?" + byTask} {
		testenv.Eventually(t, "the deletion", func() bool { status, _ := s.get(t, target); return status == http.StatusNotFound })
	}
	for query, want := range map[string]string{bySubmission: report, byTask: ofNode} {
		response, kept := getTask(t, site, query)
		if kept != want || response.Header.Get("Cache-Status") != "fsbroker; hit" {
			t.Errorf("%s: status %d, %q: %s", query, response.StatusCode, response.Header.Get("Cache-Status"), kept)
		}
	}
	wantProblem(t, site, bySubmission+"&nocache", http.StatusNotFound, "unknown_submission")
}

// wantProblem checks that the response is a problem.
func wantProblem(t *testing.T, site, query string, status int, code string) {
	t.Helper()
	response, body := getTask(t, site, query)
	if response.StatusCode != status || !strings.Contains(body, fmt.Sprintf(`"code":%q`, code)) {
		t.Errorf("%s: status %d, want %d with %s: %s", query, response.StatusCode, status, code, body)
	}
}

// TestMistakes makes the mistakes of a first configuration. Each has a problem of its own.
func TestMistakes(t *testing.T) {
	s := start(t, time.Hour, time.Hour)
	overHTTP := strings.ReplaceAll(s.upstreams("{env.UPSTREAM_SECRET}", ""), "https://", "http://")
	for name, test := range map[string]struct{ upstreams, problem string }{
		"a wrong secret":                 {s.upstreams("wrong", s.pinned()), "rejected_request"},
		"the secret in the query":        {strings.ReplaceAll(s.upstreams("{env.UPSTREAM_SECRET}", s.pinned()), "secret_in header", "secret_in secret"), "rejected_request"},
		"a certificate that is not ours": {s.upstreams("{env.UPSTREAM_SECRET}", ""), "untrusted_certificate"},
		"another name":                   {s.upstreams("{env.UPSTREAM_SECRET}", strings.Replace(s.pinned(), "{\n", "{\ntls_server_name other\n", 1)), "untrusted_certificate"},
		"http":                           {overHTTP, "wrong_scheme"},
	} {
		t.Run(name, func(t *testing.T) {
			site := startCaddy(t, test.upstreams)
			for query, code := range map[string]string{
				"submitID=x": "broker_" + test.problem, "appServerID=" + s.appServerID + "&taskID=x": "node_" + test.problem,
			} {
				if test.problem == "wrong_scheme" { // found by a handshake, which a busy Java may not answer in time at first
					testenv.Eventually(t, code, func() bool {
						_, body := getTask(t, site, query)
						return strings.Contains(body, code)
					})
				}
				wantProblem(t, site, query, http.StatusBadGateway, code)
			}
		})
	}
}
