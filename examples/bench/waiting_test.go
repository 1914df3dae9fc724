package main

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWaiting measures few callers that wait. All must get the report once it is finished, and the node is asked once for
// each report in a poll interval.
func TestWaiting(t *testing.T) {
	const waiters = 3000
	o := options{rounds: 1, waiters: waiters, poll: 100 * time.Millisecond, reports: filepath.Join("..", "..", "..", "shared", "reports")}
	h, err := newHarness(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var all results
	if err := h.waiting(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	for _, w := range all.waiting {
		r := w.rounds[0]
		if most := float64(w.reports) / o.poll.Seconds() * 1.5; w != w.floor && r.questions == 0 || r.questions > most {
			t.Errorf("%s, %d callers for %d reports: %.1f requests to the node per second", w.name, w.callers, w.reports, r.questions)
		}
		if w == w.floor && r.questions != 0 {
			t.Errorf("%s: %.1f requests to the node per second", w.name, r.questions)
		}
		if r.each.heap <= 0 || r.each.stacks <= 0 || r.each.resident <= 0 || r.joined <= 0 {
			t.Errorf("%s: %+v", w.name, r)
		}
		if r.first <= 0 || r.last < r.first || r.fromNode <= 0 || r.fromNode > r.last {
			t.Errorf("%s: %+v", w.name, r)
		}
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	for _, want := range []string{"\n| fsbroker_task | HTTP/2 | 3000 | 1 |", "\n| bare Caddy handler | HTTP/2 | 300 | 300 |", "\n| fsbroker_task | HTTP/1.1 | 300 | 1 |"} {
		if strings.Count(out.String(), want) != 2 {
			t.Errorf("%q is not in both tables", want)
		}
	}
	t.Log(out.String())
}

// TestWaitingFails checks that an answer that is not the finished report fails a trial.
func TestWaitingFails(t *testing.T) {
	h, err := newHarness(t.Context(), options{poll: 100 * time.Millisecond, reports: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	h.node.forgets.Store(true)
	for _, http2 := range []bool{true, false} {
		trial := waitingTrial{http2: http2, callers: 10, reports: 1}
		if _, err := h.waitOn(t.Context(), h.waitingServers()[0], trial); err == nil || !strings.Contains(err.Error(), "status 404") {
			t.Errorf("%s: the node knows no task, but the error is %v", trial.protocol(), err)
		}
	}
	h.node.forgets.Store(false)
	for _, body := range []string{pendingReport, strings.Repeat("x", 2*len(pendingReport))} {
		callers := &waitingCallers{task: func(int) string { return "late-15KB" }, want: h.node.document}
		r := reply{status: http.StatusOK, encoding: "gzip", length: int64(len(body)), body: []byte(body)}
		if err := callers.answer(0, r); err == nil {
			t.Errorf("%.20s… is taken for the report", body)
		}
	}
}
