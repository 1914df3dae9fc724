package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestInstructions counts the instructions of hits and of misses. The module does more for a hit than the bare handler, which
// hashes nothing, and much more for a miss.
func TestInstructions(t *testing.T) {
	if _, err := exec.LookPath("valgrind"); err != nil {
		t.Skip("valgrind is not installed")
	}
	h, err := newHarness(t.Context(), options{
		reports: filepath.Join("..", "..", "..", "shared", "reports"), loads: regexp.MustCompile("HTTP/2, gzip, 15 KB, 1 conn.$|15 KB, 1 conn., miss$"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	var all results
	if err := h.countInstructions(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	if len(all.instructions) != 3 {
		t.Fatalf("%+v", all.instructions)
	}
	ours, missed, bare := all.instructions[0], all.instructions[1], all.instructions[2]
	if bare.all < 10_000 || ours.all < bare.all || missed.all < 5*ours.all {
		t.Errorf("module %+v, misses %+v, bare handler %+v", ours.instructions, missed.instructions, bare.instructions)
	}
	var out strings.Builder
	all.printInstructions(&out)
	for _, want := range []string{
		fmt.Sprintf("\n| HTTP/2, gzip, 15 KB, 1 conn. | %.0f | %.0f | ", ours.all, bare.all),
		fmt.Sprintf("\n| HTTP/1.1, gzip, 15 KB, 1 conn., miss | %.0f |  |", missed.all),
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in %s", want, out.String())
		}
	}
}

func TestParseDump(t *testing.T) {
	const dump = `version: 1
positions: line
events: Ir

fl=(1) server.go
fn=(1) main.serve
10 2000
+2 3000
cfi=(2) block.s
cfn=(2) crypto/sha256.block
calls=1000 5
* 7000

fn=(3) main.f[go.shape.struct { a = b }]
8 9000
cfn=(1)
calls=1 2
+1 3000
jump=1 +5

fl=(2)
fn=(2)
5 6000
calls=1 9
6 500
+1 1000

totals: 12000
`
	got, err := parseDump(strings.NewReader(dump), 1000)
	if want := (instructions{all: 12, sum: 7}); err != nil || got != want {
		t.Errorf("%+v, error %v, want %+v", got, err, want)
	}
	if _, err := parseDump(strings.NewReader(dump[:100]), 1000); err == nil {
		t.Error("a file without totals is no error")
	}
}
