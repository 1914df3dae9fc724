package main

import (
	"math"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// startGrowth starts a harness for small servers, of which some are quiet for that many seconds.
func startGrowth(t *testing.T, quiet int) *harness {
	t.Helper()
	o := options{
		seconds: 1, rounds: 1, quiet: quiet, grownNodes: 10, sites: 10,
		reports: filepath.Join("..", "..", "..", "shared", "reports"),
	}
	h, err := newHarness(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h
}

// value returns the value of a quantity at the largest number.
func (g *growth) value(t *testing.T, quantity, server string) float64 {
	t.Helper()
	i := slices.IndexFunc(g.series, func(s series) bool { return s.quantity == quantity && s.server == server })
	if i < 0 {
		t.Errorf("%s of %s is missing", quantity, server)
		return 0
	}
	return g.series[i].values[len(g.numbers)-1]
}

// printTables prints the tables.
func printTables(t *testing.T, h *harness, r *results) {
	t.Helper()
	var out strings.Builder
	r.print(t.Context(), &out, h)
	t.Log(out.String())
}

// TestGrowthNodes measures servers with few nodes. There must be health checks only if they are configured, which the part
// checks itself, and a series of metrics for each node.
func TestGrowthNodes(t *testing.T) {
	if _, err := exec.LookPath("wrk"); err != nil {
		t.Skip("wrk is not installed")
	}
	h := startGrowth(t, 1)
	var all results
	if err := h.growthNodes(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	g := all.growths[0]
	for _, s := range g.series {
		if s.quantity != "CPU while idle, ms/s" && slices.Min(s.values) <= 0 {
			t.Errorf("%s of %s is %v", s.quantity, s.server, s.values)
		}
	}
	i := slices.IndexFunc(g.series, func(s series) bool { return s.quantity == "metrics, KiB" })
	if s := g.series[i]; !slices.Equal(g.numbers, []int{1, 10}) || s.values[1] < s.values[0]+9 { // 16 lines of 60 bytes a node, at least
		t.Errorf("%v nodes have metrics of %v KiB", g.numbers, s.values)
	}
	printTables(t, h, &all)
}

// TestGrowthSites measures servers with few sites. Those with namespaces of their own must have the metrics of each.
func TestGrowthSites(t *testing.T) {
	if _, err := exec.LookPath("wrk"); err != nil {
		t.Skip("wrk is not installed")
	}
	h := startGrowth(t, 0)
	var all results
	if err := h.growthSites(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	g := &all.growths[0]
	floor, one, own := g.value(t, "metrics, KiB", "Caddy respond"), g.value(t, "metrics, KiB", "one namespace"), g.value(t, "metrics, KiB", "a namespace for each")
	if floor <= 0 || one <= floor || own <= one {
		t.Errorf("the metrics have %v, %v and %v KiB", floor, one, own)
	}
	for _, s := range g.series {
		if !strings.HasPrefix(s.quantity, "CPU") && slices.Min(s.values) <= 0 {
			t.Errorf("%s of %s is %v", s.quantity, s.server, s.values)
		}
	}
	printTables(t, h, &all)
}

func TestPowers(t *testing.T) {
	for _, test := range []struct {
		largest, count int
		want           []int
	}{{1000, 4, []int{1, 10, 100, 1000}}, {1000, 2, []int{100, 1000}}, {20, 4, []int{2, 20}}} {
		if got := powers(test.largest, test.count); !slices.Equal(got, test.want) {
			t.Errorf("%d: %v", test.largest, got)
		}
	}
}

func TestSlope(t *testing.T) {
	g := &growth{numbers: []int{1, 10, 100}}
	for _, test := range []struct {
		values      []float64
		whole, last float64
	}{{[]float64{5, 5, 5}, 0, 0}, {[]float64{5, 50, 500}, 1, 1}, {[]float64{1, 1, 100}, 1, 2}} {
		s := series{values: test.values}
		if whole, last := g.slope(s, 0, 2), g.slope(s, 1, 2); math.Abs(whole-test.whole)+math.Abs(last-test.last) > 1e-9 {
			t.Errorf("%v: %v, %v", test.values, whole, last)
		}
	}
}

// TestGrowthStored measures a storage with few reports. The part itself checks that each of them comes from the storage.
func TestGrowthStored(t *testing.T) {
	h := startGrowth(t, 0)
	h.options.grown, h.options.rounds = 2000, 2
	var all results
	if err := h.growthStored(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	g := &all.growths[0]
	if !slices.Equal(g.numbers, []int{2, 20, 200, 2000}) {
		t.Errorf("the numbers are %v", g.numbers)
	}
	for _, s := range g.series {
		if !strings.HasPrefix(s.quantity, "CPU") && slices.Min(s.values) <= 0 {
			t.Errorf("%s is %v", s.quantity, s.values)
		}
	}
	if isThere(filepath.Join(h.values, "grown")) {
		t.Error("the storage is still there")
	}
	printTables(t, h, &all)
}

// TestGrowthHarvest follows few submissions. The part itself checks that all are followed, noted, and found after a restart.
func TestGrowthHarvest(t *testing.T) {
	h := startGrowth(t, 3)
	h.options.pending = 50
	var all results
	if err := h.growthHarvest(t.Context(), nil, &all); err != nil {
		t.Fatal(err)
	}
	g := &all.growths[0]
	// The delay between two requests is 2 seconds at first.
	if asked := g.value(t, "requests to the broker/s", "harvest"); asked < 50/3.0/2 || asked > 50 {
		t.Errorf("the broker got %v requests a second", asked)
	}
	if ready := g.value(t, "after a restart, until all are followed, ms", "harvest"); ready <= 0 || ready > 10_000 {
		t.Errorf("the server followed all after %v ms", ready)
	}
	printTables(t, h, &all)
}
