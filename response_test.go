package fsbroker_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
)

// vary is what each response has in Vary.
const vary = "Accept-Encoding, Authorization, Secret, X-Api-Key, Prefer"

// wantVary checks all values of Vary.
func (r reply) wantVary(t *testing.T, want ...string) {
	t.Helper()
	if got := r.header.Values("Vary"); !slices.Equal(got, want) {
		t.Errorf("status %d: Vary is %q, want %q", r.status, got, want)
	}
}

// A shared cache may merge requests for one URL that do not differ in what Vary names, so each response has it, whatever the
// status is.
func TestVary(t *testing.T) {
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		switch task := r.URL.Query().Get("taskID"); task {
		case "unknown":
			responds(http.StatusNotFound, "")(w, r)
		case "empty":
			responds(http.StatusNoContent, "")(w, r)
		case "broken":
			responds(http.StatusOK, "{")(w, r)
		case "running":
			responds(http.StatusOK, reportOf(task, "IN_PROGRESS"))(w, r)
		default:
			responds(http.StatusOK, reportOf(task, "SUCCESS"))(w, r)
		}
	})
	broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/file":
			w.Header().Add("Vary", "Accept-Language")
			w.Header().Add("Vary", "Cookie, Accept-Encoding")
		case "/reputation":
			w.Header().Set("Connection", "Vary")
			w.Header().Set("Vary", "Cookie")
			w.WriteHeader(http.StatusNotModified)
		case "/system-info":
			w.WriteHeader(http.StatusForbidden)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	s := startSite(t, proxied(broker.URL, "", "node node-1 "+node.URL))
	const task = "/task?appServerID=node-1&taskID="
	etag := s.get(task + "t1").header.Get("ETag")
	for _, test := range []struct {
		method, path string
		header       string
		status       int
		more         []string // further values
	}{
		{"GET", task + "t2", "", 200, nil},
		{"GET", task + "t2", "", 200, nil}, // from memory
		{"GET", task + "t2", "Accept-Encoding: gzip", 200, nil},
		{"HEAD", task + "t2", "", 200, nil},
		{"GET", task + "running&wait=1", "", 200, nil},
		{"GET", task + "empty", "", 204, nil},
		{"GET", task + "t1", "If-None-Match: " + etag, 304, nil},
		{"GET", task + "t1", `If-Match: "another"`, 412, nil},
		{"GET", "/task", "", 400, nil},
		{"GET", task + "t1", "Authorization: Bearer wrong", 401, nil},
		{"GET", task + "unknown", "", 404, nil},
		{"POST", task + "t1", "", 405, nil},
		{"GET", task + "broken", "", 502, nil},
		{"OPTIONS", "/task", "", 204, nil},
		{"OPTIONS", "/submit", "", 204, nil},
		{"GET", "/submit", "Authorization: Bearer wrong", 401, nil},
		{"TRACE", "/submit", "", 405, nil},
		{"GET", "/submit-result", "", 404, nil},
		{"GET", "/file", "", 200, []string{"Accept-Language", "Cookie, Accept-Encoding"}},
		{"GET", "/reputation", "", 304, nil},
		{"GET", "/system-info", "", 502, nil},
	} {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			header := []string{test.header}
			if !strings.HasPrefix(test.header, "Authorization") {
				header = append(header, bearer)
			}
			r := s.in(t).send(test.method, test.path, http.NoBody, slices.DeleteFunc(header, func(field string) bool { return field == "" })...)
			r.wantStatus(t, test.status)
			r.wantVary(t, append([]string{vary}, test.more...)...)
		})
	}
}

// What other handlers have in Vary is kept, and what they change in one response is changed in no other.
func TestVaryOfOtherHandlers(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, `
	@before query x=before
	header @before Vary Origin
	@after query x=after
	header @after {
		+Vary Origin
		defer
	}
	@changed query x=changed
	header @changed >Vary Accept-Encoding "Cookie"
`+options(node, ""))
	changed := strings.Replace(vary, "Accept-Encoding", "Cookie", 1)
	for range 2 {
		for x, want := range map[string][]string{"before": {"Origin", vary}, "after": {vary, "Origin"}, "changed": {changed}, "": {vary}} {
			s.get(pair+"&x="+x).wantVary(t, want...)
			s.get("/task?x="+x).wantVary(t, want...)
		}
		s.get(pair).wantVary(t, vary)
	}
}
