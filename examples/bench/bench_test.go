package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

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
		peers: regexp.MustCompile("."), loads: regexp.MustCompile("gzip, 15 KB, 32"), parts: regexp.MustCompile("."),
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
