package fsbroker_test

import (
	"fmt"
	"net/http"
	"testing"
)

// options are those of a site with one node, named node-1.
func options(node *backend, more string) string {
	return fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		%s
	}`, node.URL, more)
}

func TestReportByPair(t *testing.T) {
	document := reportOf("t1", "SUCCESS", "SUCCESS")
	node := newBackend(t, says(http.StatusOK, document))
	s := startSite(t, options(node, ""))

	first := s.get("/task?appServerID=node-1&taskID=t1")
	first.wantStatus(t, http.StatusOK)
	if string(first.body) != document {
		t.Errorf("got %s", first.body)
	}
	first.wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")

	again := s.get("/task?appServerID=node-1&taskID=t1")
	again.wantStatus(t, http.StatusOK)
	if string(again.body) != document {
		t.Errorf("got %s", again.body)
	}
	again.wantHeader(t, "Cache-Status", "fsbroker; hit")
	node.wantQuestions(t, 1)
	s.wantNoSecretInLog()
}
