package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestMisses measures few misses. The node must receive each request.
func TestMisses(t *testing.T) {
	const misses = 40
	h, err := newHarness(t.Context(), options{rounds: 1, misses: misses, reports: filepath.Join("..", "..", "..", "shared", "reports")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var all results
	if err := h.misses(t.Context(), []*contender{module, reverseProxy}, &all); err != nil {
		t.Fatal(err)
	}
	for _, rounds := range all.missLoads {
		want := misses
		if rounds[0].size.name == "220 KB" {
			want = misses * middling / len(rounds[0].document)
		}
		if r := rounds[0]; len(r.took) != want || r.asked != want || r.percentile(99) == 0 {
			t.Errorf("%s, %s: %d responses, %d requests to the node", r.size.name, r.contender.name, len(r.took), r.asked)
		}
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	for _, want := range []string{"\n| 15 KB | 1 | fsbroker_task | gzip |", "\n| 220 KB | 32 | Caddy reverse_proxy | identity |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	t.Log(out.String())
}
