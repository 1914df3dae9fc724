package fsbroker_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	document := reportOf("t1", "SUCCESS", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, ""))

	first := s.get(pair)
	first.wantStatus(t, http.StatusOK)
	first.wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
	first.wantHeader(t, "Age", "")

	again := s.getUntil(pair, "an age", func(r reply) bool { return r.header.Get("Age") > "0" })
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
		r.wantHeader(t, "Vary", vary)
		r.wantHeader(t, "Content-Encoding", "")
		r.wantHeader(t, "ETag", first.header.Get("ETag"))
	}

	node.wantRequests(t, 1)
	request := node.requests()[0]
	if request.Path != "/task" {
		t.Errorf("the node got a request for %s", request.Path)
	}
	want := url.Values{"taskID": {"t1"}, "all": {"false"}, "serect": {nodeSecret}, "secret": {nodeSecret}}
	if got := request.Query(); got.Encode() != want.Encode() {
		t.Errorf("the node got the query %v, want %v", got, want)
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
			node := newBackend(t, responds(http.StatusOK, document))
			s := startSite(t, options(node, ""))
			for _, accept := range []string{"identity", "gzip", "identity", "gzip"} {
				r := s.get(pair, "Accept-Encoding: "+accept)
				r.wantStatus(t, http.StatusOK)
				if got := r.plain(t); got != document {
					t.Errorf("%s: got %.200q", accept, got)
				}
			}
			node.wantRequests(t, 1)
		})
	}
}

func TestMethods(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, ""))
	bearer := "Authorization: Bearer " + callerSecret

	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "BREW"} {
		r := s.do(t.Context(), method, pair, bearer)
		r.wantProblem(t, 405, "method_not_allowed")
		r.wantHeader(t, "Allow", "GET, HEAD, OPTIONS")
	}
	node.wantRequests(t, 0)

	for range 2 { // from the node, then from the cache
		head := s.do(t.Context(), http.MethodHead, pair, bearer)
		head.wantStatus(t, http.StatusOK)
		head.wantHeader(t, "Content-Length", fmt.Sprint(len(document)))
		head.wantHeader(t, "Content-Type", "application/json")
		if len(head.body) > 0 {
			t.Errorf("the response to HEAD has the body %q", head.body)
		}
	}
	node.wantRequests(t, 1)
	get := s.get(pair)
	get.wantHeader(t, "ETag", s.do(t.Context(), http.MethodHead, pair, bearer).header.Get("ETag"))

	head := s.do(t.Context(), http.MethodHead, "/task", bearer)
	head.wantStatus(t, http.StatusBadRequest)
	if len(head.body) > 0 || head.header.Get("Content-Length") == "0" {
		t.Errorf("the response to HEAD has the body %q, length %s", head.body, head.header.Get("Content-Length"))
	}
}

func TestBadQueries(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, responds(http.StatusNotFound, ""))
	s := startSite(t, options(node, brokerOption(broker)))

	someFile := "sha256=" + strings.Repeat("0", 64)
	s.get("/task?"+someFile, "Cache-Control: no-cache").wantProblem(t, http.StatusBadRequest, "conflicting_parameter")
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
		"sha256=":                                          "malformed_parameter",
		"sha256=" + strings.Repeat("0", 63):                "malformed_parameter",
		"sha256=" + strings.Repeat("0", 66):                "malformed_parameter",
		"sha256=" + strings.Repeat("g", 64):                "malformed_parameter",
		someFile + "&" + someFile:                          "repeated_parameter",
		someFile + "&submitID=a":                           "conflicting_parameter",
		someFile + "&appServerID=a":                        "conflicting_parameter",
		someFile + "&taskID=":                              "conflicting_parameter",
		someFile + "&nocache=0":                            "conflicting_parameter",
		someFile + "&wait=0":                               "conflicting_parameter",
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
	node.wantRequests(t, 0)
	broker.wantRequests(t, 0)

	s.get("/task?appServerID=node-2&taskID=t1").wantProblem(t, http.StatusNotFound, "unknown_task")
	s.get("/task?appServerID=node-1&taskID=t1&_=123&_=456").wantStatus(t, http.StatusOK)
}

func TestBooleans(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	for value, want := range map[string]string{
		"": "false", "&all": "true", "&all=": "true",
		"&all=true": "true", "&all=TRUE": "true", "&all=1": "true", "&all=Yes": "true", "&all=on": "true",
		"&all=false": "false", "&all=False": "false", "&all=0": "false", "&all=no": "false", "&all=OFF": "false",
	} {
		s.get(pair+"&nocache"+value).wantStatus(t, http.StatusOK)
		requests := node.requests()
		if got := requests[len(requests)-1].Query().Get("all"); got != want {
			t.Errorf("%q: the node got a request with all=%s", value, got)
		}
	}
	before := len(node.requests())
	for _, kept := range []string{"&nocache=false", "&nocache=0", "&nocache=No", "&nocache=off"} {
		s.get(pair+kept).wantHeader(t, "Cache-Status", "fsbroker; hit")
	}
	node.wantRequests(t, before)
}

func TestAllIsAnotherReport(t *testing.T) {
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		responds(http.StatusOK, fmt.Sprintf(`{"result":{"all":%s}}`, r.URL.Query().Get("all")))(w, r)
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
	node.wantRequests(t, 2)
}

func TestUnfinishedReport(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")))
		s := startSite(t, options(node, "poll_interval 1s"))

		for i, want := range []string{"fsbroker; fwd=uri-miss; stored", "fsbroker; hit", "fsbroker; hit"} {
			r := s.get(pair)
			r.wantStatus(t, http.StatusOK)
			r.wantHeader(t, "Cache-Status", want)
			r.wantHeader(t, "Cache-Control", "no-store")
			r.wantHeader(t, "Retry-After", "1")
			if i == 2 {
				s.get(pair, "If-None-Match: "+r.header.Get("ETag")).wantStatus(t, http.StatusNotModified)
			}
		}
		node.wantRequests(t, 1)

		refreshed := func(r reply) bool { return r.header.Get("Cache-Status") != "fsbroker; hit" }
		node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS", "IN_PROGRESS")))
		s.getUntil(pair, "a second request", refreshed).wantHeader(t, "Cache-Control", "no-store")
		node.wantRequests(t, 2)

		node.setHandler(responds(http.StatusOK, reportOf("t1", "success_partial", "FAILED")))
		s.getUntil(pair, "a third request", refreshed).wantHeader(t, "Cache-Control", "private, no-cache")
		node.setHandler(responds(http.StatusNotFound, ""))
		time.Sleep(1100 * time.Millisecond) // a finished report outlives the poll interval
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
		node.wantRequests(t, 3)
	})
}

func TestNothingToReportYet(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusNoContent, ""))
		s := startSite(t, options(node, "poll_interval 1500ms"))
		for _, want := range []string{"fsbroker; fwd=uri-miss; stored", "fsbroker; hit"} {
			r := s.get(pair)
			r.wantStatus(t, http.StatusNoContent)
			r.wantHeader(t, "Retry-After", "2")
			r.wantHeader(t, "Cache-Control", "no-store")
			r.wantHeader(t, "Cache-Status", want)
			r.wantHeader(t, "ETag", "")
		}
		node.wantRequests(t, 1)
	})
}

func TestTooLargeToBeKept(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, dense(100<<10)))
	s := startSite(t, options(node, "cache {\n max_size 10KiB\n }"))
	for range 2 {
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss")
	}
	node.wantRequests(t, 2)
}

func TestReportsExpire(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		const ttl = 300 * time.Millisecond
		s := startSite(t, options(node, fmt.Sprintf("cache {\n ttl %s\n }", ttl)))
		start := time.Now()
		s.get(pair)
		s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
		expired := s.getUntil(pair, "the report to expire", func(r reply) bool { return r.header.Get("Cache-Status") != "fsbroker; hit" })
		expired.wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
		if took := time.Since(start); took < ttl {
			t.Errorf("the report expired after %s", took)
		}
		node.wantRequests(t, 2)
	})
}

func TestConditionalRequests(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	plain := s.get(pair).header.Get("ETag")
	packed := s.get(pair, "Accept-Encoding: gzip").header.Get("ETag")
	if plain == packed || plain == "" || packed == "" {
		t.Fatalf("the two representations have the ETags %s and %s", plain, packed)
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
		"the other encoding's":    {[]string{"If-None-Match: " + packed}, 200, plain},
		"compressed":              {[]string{"If-None-Match: " + packed, "Accept-Encoding: gzip"}, 304, packed},
		"compressed, the other's": {[]string{"If-None-Match: " + plain, "Accept-Encoding: gzip"}, 200, packed},
	} {
		t.Run(name, func(t *testing.T) {
			r := s.in(t).get(pair, test.header...)
			r.wantStatus(t, test.status)
			r.wantHeader(t, "ETag", test.etag)
			r.wantHeader(t, "Cache-Control", "private, no-cache")
			r.wantHeader(t, "Vary", vary)
			r.wantHeader(t, "Cache-Status", "fsbroker; hit")
			if test.status == 304 && len(r.body) > 0 {
				t.Errorf("the response with 304 has the body %q", r.body)
			}
		})
	}
	node.wantRequests(t, 1)

	fresh := s.get(pair+"&nocache", "If-None-Match: "+plain)
	fresh.wantStatus(t, http.StatusNotModified)
	node.wantRequests(t, 2)
}

func TestEncodings(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, responds(http.StatusOK, document))
	s := startSite(t, options(node, "")+"\nencode zstd gzip")
	for accept, want := range map[string]string{
		"gzip": "gzip", "GZIP": "gzip", "br, gzip;q=0.5": "gzip", "*": "gzip", "deflate,gzip": "gzip",
		"identity": "", "gzip;q=0": "", "gzip; q=0.0, *": "", "*;q=0": "", "br": "",
		"zstd": "zstd", // from Caddy's encode, since this module has no zstd
	} {
		r := s.get(pair, "Accept-Encoding: "+accept)
		r.wantStatus(t, http.StatusOK)
		r.wantHeader(t, "Content-Encoding", want)
		if got := r.header.Values("Vary"); len(got) != 1 || got[0] != vary {
			t.Errorf("%s: Vary: %q", accept, got)
		}
		if want != "zstd" && r.plain(t) != document {
			t.Errorf("%s: got %q", accept, r.body)
		}
	}
}

func TestNocache(t *testing.T) {
	first, second := reportOf("t1", "SUCCESS"), reportOf("t1", "SUCCESS", "FAILED")
	node := newBackend(t, responds(http.StatusOK, first))
	s := startSite(t, options(node, ""))
	s.get(pair).wantStatus(t, http.StatusOK)

	node.setHandler(responds(http.StatusOK, second))
	if got := s.get(pair); string(got.body) != first {
		t.Errorf("without nocache: %s", got.body)
	}
	fresh := s.get(pair + "&nocache=true")
	fresh.wantHeader(t, "Cache-Status", "fsbroker; fwd=request; stored")
	if string(fresh.body) != second {
		t.Errorf("with nocache: %s", fresh.body)
	}
	if got := s.get(pair); string(got.body) != second {
		t.Errorf("nocache did not replace the kept report: %s", got.body)
	}

	// A response that is worse than the kept report is passed on, and does not replace it.
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		status  int
		code    string
	}{
		"forgotten":  {responds(http.StatusNotFound, ""), 404, "unknown_task"},
		"broken":     {responds(http.StatusOK, "{"), 502, "node_bad_answer"},
		"failing":    {responds(http.StatusInternalServerError, ""), 502, "node_bad_answer"},
		"refusing":   {responds(http.StatusUnauthorized, ""), 502, "node_refused_secret"},
		"unfinished": {responds(http.StatusOK, reportOf("t1", "IN_PROGRESS")), 200, ""},
		"empty":      {responds(http.StatusNoContent, ""), 204, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			node.setHandler(test.handler)
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
	node.setHandler(responds(http.StatusNotFound, ""))
	if r := s.get("/task?appServerID=node-1&taskID=t2&nocache"); strings.Contains(string(r.body), "without nocache") {
		t.Errorf("nothing is kept, but: %s", r.body)
	}
}

func TestErrorsAreNotKept(t *testing.T) {
	node := newBackend(t, responds(http.StatusNotFound, ""))
	s := startSite(t, options(node, ""))
	s.get(pair).wantProblem(t, 404, "unknown_task")
	s.get(pair).wantProblem(t, 404, "unknown_task")
	node.setHandler(responds(http.StatusBadGateway, ""))
	s.get(pair).wantProblem(t, 502, "node_bad_answer")
	node.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s.get(pair).wantStatus(t, http.StatusOK)
	node.wantRequests(t, 4)
}

func TestWithoutBroker(t *testing.T) {
	node := newBackend(t, nil)
	s := startSite(t, options(node, ""))
	s.get("/task?submitID=s1").wantProblem(t, http.StatusBadRequest, "no_broker")
	s.get("/task?appServerID=node-2&taskID=t1").wantProblem(t, http.StatusNotFound, "unknown_node")
}
