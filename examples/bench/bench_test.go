package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func TestMain(m *testing.M) {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	os.Exit(m.Run())
}

// TestRun does a run that is as short as possible. Every server must start, return the report, and appear in the
// tables.
func TestRun(t *testing.T) {
	if _, err := exec.LookPath("wrk"); err != nil {
		t.Skip("wrk is not installed")
	}
	o := options{
		seconds: 1, rounds: 1, kept: 20, reports: filepath.Join("..", "..", "..", "shared", "reports"),
		peers: regexp.MustCompile("."), loads: regexp.MustCompile("gzip, 15 KB, 32"), parts: regexp.MustCompile("^(load|unauthorized|memory|cold|miss|compression)$"),
	}
	var out strings.Builder
	if err := run(t.Context(), o, &out); err != nil {
		t.Fatal(err)
	}
	for _, c := range contenders {
		if c.installed() && !strings.Contains(out.String(), "\n| "+c.name+" | ") {
			t.Errorf("%s is missing", c.name)
		}
	}
	for _, want := range []string{"**HTTP, gzip, 15 KB, 32 conn.**", "\n| a wrong Bearer token |", "| fsbroker_task | 200 | 1 | 0 |", "| fsbroker_task | 50 MiB | gzip |", "| 0.95 of a bare handler in Caddy |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	t.Log(out.String())
}

// TestStorage measures the storage with few reports. All must be stored, found again after a restart, and purged.
func TestStorage(t *testing.T) {
	const stored = 100
	o := options{
		rounds: 1, stored: stored, through: 1000, delays: []time.Duration{0, 2 * time.Millisecond},
		reports: filepath.Join("..", "..", "..", "shared", "reports"),
	}
	h, err := newHarness(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var all results
	for _, p := range h.parts() {
		if !strings.HasPrefix(p.name, "storage") {
			continue
		}
		if err := p.run(t.Context(), nil, &all); err != nil {
			t.Fatalf("%s: %v", p.name, err)
		}
	}
	for _, rounds := range all.hits {
		if r := rounds[0]; len(r.cold.took) != stored || len(r.warm.took) != stored*warmRounds {
			t.Errorf("%s, %d callers: %d hits in the storage, %d in memory", r.delay, r.callers, len(r.cold.took), len(r.warm.took))
		} else if r.cold.took[0] < r.delay {
			t.Errorf("a report was read from the storage in %s, but an operation takes %s", r.cold.took[0], r.delay)
		}
	}
	for _, rounds := range all.writes {
		if r := rounds[0]; len(r.took) == 0 || r.refused != 0 || r.stop.lost != 0 || r.stop.stored.documents != len(r.took) {
			t.Errorf("%s: %d reports, %+v", r.writesTrial, len(r.took), r.stop)
		}
	}
	for _, rounds := range all.stops {
		if r := rounds[0]; r.queued < stored*9/10 || r.lost != 0 || r.stored.documents < r.queued {
			t.Errorf("%+v", r)
		}
	}
	for _, rounds := range all.purges {
		if r := rounds[0]; r.before.documents != stored || r.before.values != 2*stored || r.after.values != 0 || r.answer != "" {
			t.Errorf("%+v", r)
		}
	}
	for _, rounds := range all.sweeps {
		if r := rounds[0]; r.before.values != 2*stored || r.after.values != 0 || r.perSecond() == 0 {
			t.Errorf("%+v", r)
		}
	}
	for _, r := range all.through {
		if last := r.steps[len(r.steps)-1]; last.reports != 1000 || last.heap == 0 || last.resident < last.heap || r.written == 0 {
			t.Errorf("%+v", r)
		}
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	for _, want := range []string{"| 2 ms | 300 |", "| 0 ms | 600 a second | ", "\n| 1000 | "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	t.Log(out.String())
}

func TestMedian(t *testing.T) {
	if got := median([]float64{5, 1, 3}, func(f float64) float64 { return f }); got != 3 {
		t.Errorf("the median is %v", got)
	}
}

func TestMadeReports(t *testing.T) {
	all, err := sizes(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range all {
		if want := wantedSizes[i].bytes; len(s.document) < want*97/100 || len(s.document) > want*103/100 || s.real {
			t.Errorf("%s has %d bytes", s.name, len(s.document))
		}
		var gzipped bytes.Buffer
		zw := gzip.NewWriter(&gzipped)
		if _, err := zw.Write(s.document); err != nil || zw.Close() != nil {
			t.Fatal(err)
		}
		// Real reports compress to 0.21 to 0.31 of their size.
		if ratio := float64(gzipped.Len()) / float64(len(s.document)); ratio < 0.21 || ratio > 0.31 || !json.Valid(s.document) {
			t.Errorf("%s shrinks to %.2f, and is JSON: %v", s.name, ratio, json.Valid(s.document))
		}
	}
}

// TestCollections measures collections with few reports, all of which the server must keep.
func TestCollections(t *testing.T) {
	o := options{seconds: 1, rounds: 1, many: 1000, reports: filepath.Join("..", "..", "..", "shared", "reports")}
	h, err := newHarness(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var all results
	if err := h.collections(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	for _, r := range all.collections {
		if len(r.took) != hitsPerSecond || r.forced && len(r.collections) == 0 || r.heap == 0 {
			t.Errorf("%d reports, forced: %v: %d hits, %d collections, %d bytes", r.kept, r.forced, len(r.took), len(r.collections), r.heap)
		}
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	if !strings.Contains(out.String(), "\n| 1000 | ") {
		t.Error("the table is missing")
	}
	t.Log(out.String())
}

func TestParseCollections(t *testing.T) {
	got := parseCollections([]byte("{\"level\":\"info\"}\n" +
		"gc 7 @2.104s 0%: 0.5+28+0.25 ms clock, 1+0.3/9.1/26+0.5 ms cpu, 84->85->42 MB, 86 MB goal, 0 MB stacks, 0 MB globals, 2 P (forced)\n"))
	want := []collection{{took: 28750 * time.Microsecond, pause: 500 * time.Microsecond}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
