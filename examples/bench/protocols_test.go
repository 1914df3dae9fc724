package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestProtocols measures one size over each protocol. What h2load measures and what it cannot must both have results.
func TestProtocols(t *testing.T) {
	if _, err := exec.LookPath("h2load"); err != nil {
		t.Skip("h2load is not installed")
	}
	o := options{
		seconds: 1, rounds: 1, reports: filepath.Join("..", "..", "..", "shared", "reports"),
		peers: regexp.MustCompile("^bare"), parts: regexp.MustCompile("^(protocols|http3)$"),
		loads: regexp.MustCompile("HTTP/1.1, TLS, gzip, 41 KB, 1 conn., HEAD|HTTP/2, TLS, gzip, 41 KB, 1 conn. of|" +
			"HTTP/2, gzip, 41 KB, 32 conn., 304|HTTP/3, TLS, gzip, 41 KB, 1 conn"),
	}
	var out strings.Builder
	if err := run(t.Context(), o, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"\n| HTTP/1.1, TLS, gzip, 41 KB, 1 conn., HEAD | ", "\n| HTTP/2, TLS, gzip, 41 KB, 1 conn. of 32 streams | ",
		"\n| HTTP/2, gzip, 41 KB, 32 conn., 304 | ", "\n| HTTP/3, TLS, gzip, 41 KB, 1 conn. | ",
		"\n| hits | 0.97 | 2 | ", "\n| 304s | 1.00 | 1 | ", "\n| HEADs | 1.00 | 1 | ",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	t.Log(out.String())
}

// TestBareHeader compares the header of the bare handler with that of the module, for each kind of request.
func TestBareHeader(t *testing.T) {
	h, err := newHarness(t.Context(), options{reports: filepath.Join("..", "..", "..", "shared", "reports")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	servers, err := h.startAll(t.Context(), []*contender{module, bareHandler})
	defer servers.stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []kind{hit, notModified, head} {
		l := load{size: h.sizes[1], gzip: true, protocol: h1, kind: k}
		var names [2][]string
		for i, c := range []*contender{module, bareHandler} {
			r, _, err := l.prepare(t.Context(), c, servers.of(c))
			if err != nil {
				t.Fatalf("%s, %s: %v", c.name, k, err)
			}
			a, err := r.send(t.Context(), h.client)
			if err != nil {
				t.Fatal(err)
			}
			names[i] = slices.Sorted(maps.Keys(a.header))
		}
		if !slices.Equal(names[0], names[1]) {
			t.Errorf("%s: the bare handler sends %q, the module %q", k, names[1], names[0])
		}
	}
}

// TestParseH2load has results of h2load that must not count.
func TestParseH2load(t *testing.T) {
	const out = "\nApplication protocol: h2\n\nfinished in 1.00s, 10.00 req/s, 1B/s\n" +
		"requests: 10 total, 11 started, 10 done, 10 succeeded, 0 failed, 0 errored, 0 timeout\n" +
		"traffic: 1B (1) total, 1B (1) headers (space savings 95.71%), 1B (1003) data\n"
	l, got := load{protocol: h2, tls: true, conns: 1, streams: 1}, answer{response: response{body: make([]byte, 100)}}
	if n, err := l.parseH2load(out, 10, got); err != nil || n != 10.03 {
		t.Errorf("%v responses, %v", n, err)
	}
	for _, change := range [][2]string{
		{": h2\n", ": http/1.1\n"}, {" 0 failed", " 1 failed"}, {"0 errored", "1 errored"}, {"0 timeout", "1 timeout"},
		{"10 succeeded", "9 succeeded"}, {"10 done", "11 done"}, {"(1003)", "(899)"}, {"(1003)", "(1101)"},
	} {
		if _, err := l.parseH2load(strings.Replace(out, change[0], change[1], 1), 10, got); err == nil {
			t.Errorf("with %q, there is no error", change[1])
		}
	}
	if _, err := l.parseH2load(out, 9, got); err == nil {
		t.Error("there is no error although a response is missing in the log")
	}
}

// TestReadH2loadLog has a status that is not the expected one.
func TestReadH2loadLog(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte("1795929561392301\t200\t1398\n1795929561392323\t200\t140\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []time.Duration{140 * time.Microsecond, 1398 * time.Microsecond}
	if took, err := readH2loadLog(log, 200); err != nil || !slices.Equal(took, want) {
		t.Errorf("%v, %v", took, err)
	}
	if _, err := readH2loadLog(log, 304); err == nil {
		t.Error("there is no error")
	}
}
