package archive

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

var (
	simSeeds = flag.Int("sim.seeds", len(storagetest.Kinds), "number of seeds that TestSimulation runs, from 1 on")
	simSeed  = flag.Uint64("sim.seed", 0, "the seed that TestSimulation runs")
	simHours = flag.Float64("sim.hours", 4, "hours that TestSimulation simulates for each seed")
	simTrace = flag.String("sim.trace", "", "file that TestSimulation writes what happens to")
)

// TestSimulation simulates several instances that use one storage. The storage is slow, fails, hangs and does half of what
// it is asked to, instances crash and stop, and clocks step. What was stored must be there.
//
// A run depends on nothing but its seed. CONTRIBUTING.md has the commands.
func TestSimulation(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes some seconds")
	}
	seeds := make([]uint64, *simSeeds)
	for i := range seeds {
		seeds[i] = uint64(i) + 1
	}
	if *simSeed > 0 {
		seeds = []uint64{*simSeed}
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	for _, seed := range seeds {
		tr := new(trace)
		if *simTrace != "" {
			file, err := os.Create(*simTrace)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			tr.out = func(line string) { fmt.Fprintln(file, line) }
		}
		began := time.Now()
		violations := simulate(t, seed, time.Duration(*simHours*float64(time.Hour)), tr)
		t.Logf("seed %d, %g hours in %s, %s", seed, *simHours, time.Since(began).Round(time.Millisecond), tr.summary)
		for _, v := range violations {
			t.Errorf("seed %d: %s", seed, v)
		}
		if len(violations) > 0 {
			t.Fatalf("run it again: go test ./internal/archive -run '^TestSimulation$' -sim.seed %d -sim.hours %g", seed, *simHours)
		}
	}
}

// A seed always gives the same run.
func TestSimulationCanBeReplayed(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a few seconds")
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	seed := max(*simSeed, 1)
	run := func() []string {
		tr := &trace{keep: true}
		simulate(t, seed, time.Duration(*simHours*float64(time.Hour)), tr)
		slices.Sort(tr.lines) // those of one instant may come in any order
		return tr.lines
	}
	first, second := run(), run()
	for i := range min(len(first), len(second)) {
		if first[i] != second[i] {
			t.Fatalf("the runs differ after %d lines:\n%s\n\n%s", i,
				strings.Join(first[max(0, i-5):min(len(first), i+5)], "\n"), strings.Join(second[max(0, i-5):min(len(second), i+5)], "\n"))
		}
	}
	if len(first) != len(second) {
		t.Errorf("the runs have %d and %d lines", len(first), len(second))
	}
}
