package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestPolls measures few callers. With the module, the node must receive one request per report and poll interval. With
// the proxy, it must receive all.
func TestPolls(t *testing.T) {
	const callers = 50
	h, err := newHarness(t.Context(), options{pollers: callers, polling: pollInterval, reports: filepath.Join("..", "..", "..", "shared", "reports")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var all results
	for _, l := range []pollLoad{
		{h.sizes[0], callers, false, module}, {size{name: "small"}, callers, true, module}, {h.sizes[0], callers, false, reverseProxy}, {size{name: "small"}, callers, true, reverseProxy},
	} {
		r, err := h.pollsOf(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		all.polls = append(all.polls, []pollResult{r})
		requests := len(r.took)
		switch {
		case l.everySecond && requests != 2*callers, !l.everySecond && requests < 10*callers:
			t.Errorf("%s polls %s: %d requests", l.contender.name, l.often(), requests)
		case l.contender == module && (r.asked < callers/2 || r.asked > 2*callers), l.contender == reverseProxy && r.asked != requests:
			t.Errorf("%s polls %s: the node received %d of %d requests", l.contender.name, l.often(), r.asked, requests)
		}
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	if !strings.Contains(out.String(), "\n| 15 KB | as fast as it can | fsbroker_task |") {
		t.Error("the table is missing")
	}
	t.Log(out.String())
}
