package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestRestart restarts servers with few reports. All must be found again.
func TestRestart(t *testing.T) {
	const stored = 100
	o := options{rounds: 1, stored: stored, reports: filepath.Join("..", "..", "..", "shared", "reports")}
	h, err := newHarness(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var participants []*contender
	for _, c := range contenders {
		if c.installed() {
			participants = append(participants, c)
		}
	}
	var all results
	if err := h.restart(t.Context(), participants, &all); err != nil {
		t.Fatal(err)
	}
	for _, rounds := range all.restarts {
		r := rounds[0]
		if len(r.cold.took) != stored || len(r.warm.took) != stored*warmRounds || r.rate == 0 {
			t.Errorf("%s, %s, %s: %d reports after the restart, %d again, ratio %v", r.contender.name, r.place, r.load, len(r.cold.took), len(r.warm.took), r.rate)
		}
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	for _, want := range []string{"| memory | HTTP, gzip, 15 KB, 32 conn. | fsbroker_task |", "| disk | HTTP, identity, 41 KB, 32 conn. | fsbroker_task |", "| memory | HTTP, gzip, 41 KB, 32 conn. | bare Caddy handler |", "| after a restart, 0.5 of"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	t.Log(out.String())
}
