package fsbroker_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// A report of a submission comes from the broker's own /task. Its /submit-result only explains why there is none.
func TestSubmissions(t *testing.T) {
	ofBroker, ofNode := reportOf("of the broker", "SUCCESS"), reportOf("of the node", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, ofNode))
	broker := newBackend(t, nil)
	s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 200ms"))
	unused := func(http.ResponseWriter, *http.Request) { t.Error("/submit-result is asked, although /task answers") }
	unknown := responds(404, "")

	for name, test := range map[string]struct {
		task, submitResult http.HandlerFunc
		status             int
		want               string // the document, or the code
	}{
		"the broker has it":           {responds(200, ofBroker), unused, 200, ofBroker},
		"nothing to report yet":       {responds(204, ""), unused, 204, ""},
		"the broker refuses":          {responds(403, ""), unused, 502, "broker_refused_secret"},
		"the broker rejects":          {responds(400, ""), unused, 502, "broker_rejected_request"},
		"the broker fails":            {responds(500, ""), unused, 502, "broker_bad_answer"},
		"the broker redirects":        {responds(302, ""), unused, 502, "broker_bad_answer"},
		"the broker talks nonsense":   {responds(200, "<html>"), unused, 502, "broker_bad_answer"},
		"queued":                      {unknown, responds(200, `{"state":"QUEUED","positionInQueue":3}`), 204, ""},
		"queued, 204":                 {unknown, responds(204, ""), 204, ""},
		"failed":                      {unknown, responds(200, `{"state":"FAILED","appServerID":"node-1"}`), 404, "submission_failed"},
		"a task of a node":            {unknown, responds(200, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`), 200, ofNode},
		"a task of a node, in result": {unknown, responds(200, `{"state":"SUCCESS","appServerID":"node-1","result":{"scanTasks":[{"taskReference":{"ID":"t1"}}]}}`), 200, ofNode},
		"a task, its ID is a number":  {unknown, responds(200, `{"appServerID":"node-1","taskID":12}`), 200, ofNode},
		"a task of another node":      {unknown, responds(200, `{"state":"SUCCESS","appServerID":"node-9","taskID":"t1"}`), 404, "unknown_submission"},
		"unknown":                     {unknown, unknown, 404, "unknown_submission"},
		"no IDs":                      {unknown, responds(200, `{"state":"SUCCESS"}`), 404, "unknown_submission"},
		"as in the manual":            {unknown, responds(200, `{"processTime":1,"fileSize":2,"mediaType":{},"digests":{}}`), 404, "unknown_submission"},
		"unreadable":                  {unknown, responds(200, `<html>`), 404, "unknown_submission"},
		"empty":                       {unknown, responds(200, ``), 404, "unknown_submission"},
		"no explanation for now":      {unknown, responds(503, ""), 503, "broker_overloaded"},
		"the explanation is refused":  {unknown, responds(403, ""), 404, "unknown_submission"},
		"the explanation fails":       {unknown, responds(500, ""), 404, "unknown_submission"},
	} {
		t.Run(name, func(t *testing.T) {
			broker.setHandler(brokerResponds(test.task, test.submitResult))
			r := s.in(t).get("/task?all=1&submitID=" + url.QueryEscape(name))
			r.wantStatus(t, test.status)
			switch test.status {
			case 200:
				if string(r.body) != test.want {
					t.Errorf("got %s", r.body)
				}
			case 204:
				r.wantHeader(t, "Retry-After", "1")
			default:
				r.wantProblem(t, test.status, test.want)
			}
		})
	}
	for _, q := range broker.requests() {
		if q.Query().Get("submitID") == "" || q.Query().Get("serect") != brokerSecret || q.Query().Get("secret") != brokerSecret {
			t.Errorf("the broker got a request for %s", q)
		}
		if q.Path == "/task" && q.Query().Get("all") != "true" {
			t.Errorf("the broker is not asked for the complete report: %s", q)
		}
	}
	s.wantNoSecretInLog()
}

func TestLateExplanation(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newBackend(t, brokerResponds(responds(404, ""), func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		s := startSite(t, fmt.Sprintf("fsbroker_task {\n secret {env.CALLER_SECRET}\n %s\n}", brokerOption(broker)))
		s.get("/task?submitID=s1").wantProblem(t, 504, "broker_timeout")
	})
}

func TestSubmissionsAreKept(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		broker := newBackend(t, explains(`{"state":"QUEUED"}`))
		s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 1s"))
		const submitted = "/task?submitID=s1"

		s.get(submitted).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
		s.get(submitted).wantHeader(t, "Cache-Status", "fsbroker; hit")
		broker.wantRequests(t, 2) // its report, and why there is none
		s.get(submitted+"&nocache").wantStatus(t, http.StatusNoContent)
		broker.wantRequests(t, 4)

		broker.setHandler(explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
		s.getUntil(submitted, "the report", func(r reply) bool { return r.status != http.StatusNoContent }).wantStatus(t, http.StatusOK)
		broker.wantRequests(t, 6)
		node.wantRequests(t, 1)
		broker.setHandler(responds(http.StatusNotFound, ""))
		s.get(submitted).wantHeader(t, "Cache-Status", "fsbroker; hit")
		fresh := s.get(submitted + "&nocache")
		fresh.wantProblem(t, http.StatusNotFound, "unknown_submission")
		if !strings.Contains(string(fresh.body), "without nocache") {
			t.Errorf("the problem does not mention the kept report: %s", fresh.body)
		}

		// submitID wins over the pair, which is ignored.
		s.get("/task?submitID=s1&appServerID=node-7").wantStatus(t, http.StatusOK)
		// The pair finds the report that was fetched from the node.
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
		node.wantRequests(t, 1)
	})
}

// A report that is named by its node and task comes from the node, and else from the broker.
func TestPairs(t *testing.T) {
	ofBroker, ofNode := reportOf("of the broker", "SUCCESS"), reportOf("of the node", "SUCCESS")
	node, broker := newBackend(t, nil), newBackend(t, nil)
	s := startSite(t, options(node, brokerOption(broker)+"\npoll_interval 200ms"))
	has := func(document string) http.HandlerFunc { return responds(200, document) }
	unknown, fails, empty := responds(404, ""), responds(500, ""), responds(204, "")

	for name, test := range map[string]struct {
		node, broker http.HandlerFunc
		status       int
		want         string
	}{
		"the node has it":                   {has(ofNode), fails, 200, ofNode},
		"the node has nothing yet":          {empty, has(ofBroker), 204, ""},
		"the node has deleted it":           {unknown, has(ofBroker), 200, ofBroker},
		"the node fails":                    {fails, has(ofBroker), 200, ofBroker},
		"the node talks nonsense":           {has("<html>"), has(ofBroker), 200, ofBroker},
		"neither knows it":                  {unknown, unknown, 404, "unknown_task"},
		"the node fails, unknown":           {fails, unknown, 502, "node_bad_answer"},
		"unknown, the broker fails":         {unknown, responds(401, ""), 502, "broker_refused_secret"},
		"both fail":                         {fails, responds(401, ""), 502, "node_bad_answer"},
		"the broker has nothing to say yet": {unknown, empty, 204, ""},
	} {
		t.Run(name, func(t *testing.T) {
			node.setHandler(test.node)
			broker.setHandler(test.broker)
			r := s.in(t).get("/task?appServerID=node-1&taskID=" + url.QueryEscape(name))
			r.wantStatus(t, test.status)
			if test.status == 200 && string(r.body) != test.want {
				t.Errorf("got %s", r.body)
			}
			if test.status >= 400 {
				r.wantProblem(t, test.status, test.want)
			}
		})
	}

	broker.setHandler(has(ofBroker))
	before := len(node.requests())
	if r := s.get("/task?appServerID=node-2&taskID=t1"); string(r.body) != ofBroker {
		t.Errorf("a node that is not configured: status %d: %s", r.status, r.body)
	}
	node.wantRequests(t, before)
	s.get("/task?appServerID=node-2&taskID=t1&nocache").wantStatus(t, http.StatusOK)
	asked := broker.requests()
	for i, want := range []string{"", "true"} { // of the broker, which keeps reports itself
		q := asked[len(asked)-2+i].Query()
		if q.Get("appServerID") != "node-2" || q.Get("taskID") != "t1" || q.Get("nocache") != want {
			t.Errorf("the broker got a request for %s", q)
		}
	}
}

// A broker alone is a complete configuration.
func TestBrokerAlone(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	broker := newBackend(t, brokerResponds(responds(http.StatusOK, document), nil))
	s := startSite(t, fmt.Sprintf("fsbroker_task {\n secret {env.CALLER_SECRET}\n %s\n}", brokerOption(broker)))
	for _, query := range []string{"submitID=s1", "appServerID=any&taskID=t1"} {
		if r := s.get("/task?" + query); string(r.body) != document {
			t.Errorf("%s: status %d: %s", query, r.status, r.body)
		}
		s.get("/task?"+query).wantHeader(t, "Cache-Status", "fsbroker; hit")
	}
	broker.wantRequests(t, 2)
}
