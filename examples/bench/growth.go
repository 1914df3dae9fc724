package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
)

// quantity is something that was measured of a server, with its unit.
type quantity struct {
	name  string
	value float64
}

// sample has what was measured of one server.
type sample []quantity

// of returns s with what its quantities are of.
func (s sample) of(what string) (named sample) {
	for _, q := range s {
		named = append(named, quantity{what + ": " + q.name, q.value})
	}
	return named
}

func (s *sample) add(name string, value float64) { *s = append(*s, quantity{name, value}) }

func (s sample) sample() sample { return s }

// value returns the value of a quantity. It is not a number if that is missing.
func (s sample) value(name string) float64 {
	for _, q := range s {
		if q.name == name {
			return q.value
		}
	}
	return math.NaN()
}

// variant is a server that is measured at several sizes.
type variant struct {
	name   string
	sample func(h *harness, ctx context.Context, n int) (sample, error)
}

// growthTrial is a variant at one size.
type growthTrial struct {
	variant
	n int
}

func (t growthTrial) String() string { return fmt.Sprintf("%d, %s", t.n, t.name) }

// growth is how what servers take grows with a number.
type growth struct {
	title   string
	numbers []int
	series  []series
}

// series is one quantity of one variant, for each number.
type series struct {
	quantity, server string
	values           []float64
}

// powers returns a number and up to count-1 powers of ten below it, so that each is ten times the one before. The largest
// is the last.
func powers(largest, count int) (all []int) {
	for n := largest; n > 0 && len(all) < count; n /= 10 {
		all = append(all, n)
	}
	slices.Reverse(all)
	return all
}

// grow measures each variant at each number, in rounds.
func (h *harness) grow(ctx context.Context, results *results, title string, numbers []int, variants ...variant) error {
	var trials []growthTrial
	for _, n := range numbers {
		for _, v := range variants {
			trials = append(trials, growthTrial{v, n})
		}
	}
	rounds, err := ofBoth(ctx, h, results, title, h.options.rounds, trials, func(h *harness, ctx context.Context, t growthTrial) (sample, error) {
		return t.sample(h, ctx, t.n)
	})
	if err != nil {
		return err
	}
	g := growth{title: title, numbers: numbers}
	for k, v := range variants {
		var each [][]sample // of the numbers
		for i := k; i < len(rounds); i += len(variants) {
			each = append(each, rounds[i])
		}
		g.add(v.name, each)
	}
	results.growths = append(results.growths, g)
	return nil
}

// add adds the medians of the rounds of one variant. Its samples have the same quantities.
func (g *growth) add(server string, rounds [][]sample) {
	for i, q := range rounds[0][0] {
		one := series{quantity: q.name, server: server}
		for _, samples := range rounds {
			one.values = append(one.values, median(samples, func(s sample) float64 { return s[i].value }))
		}
		g.series = append(g.series, one)
	}
}

// ordered returns the series, those of the same quantity one after the other.
func (g *growth) ordered() []series {
	first := make(map[string]int)
	for i, s := range g.series {
		if _, ok := first[s.quantity]; !ok {
			first[s.quantity] = i
		}
	}
	all := slices.Clone(g.series)
	slices.SortStableFunc(all, func(a, b series) int { return cmp.Compare(first[a.quantity], first[b.quantity]) })
	return all
}

// slope returns the slope of the logarithms of values between two of the numbers. It is not finite if a value is 0.
func (g *growth) slope(s series, from, to int) float64 {
	return math.Log(s.values[to]/s.values[from]) / math.Log(float64(g.numbers[to])/float64(g.numbers[from]))
}

// printGrowths prints a table for each growth.
func (r *results) printGrowths(out io.Writer) {
	for _, g := range r.growths {
		g.print(out)
	}
	fmt.Fprint(out, "\nA slope is that of the logarithms: 0 is constant, 1 is linear. The first is that between the first number and the "+
		"last one, the second is that of the last step alone.\n")
}

func (g *growth) print(out io.Writer) {
	fmt.Fprintf(out, "\n**%s**\n\n| measure | server |", g.title)
	for _, n := range g.numbers {
		fmt.Fprintf(out, " %d |", n)
	}
	fmt.Fprint(out, " slope | slope of the last step |\n|---|---|", strings.Repeat("--:|", len(g.numbers)+2), "\n")
	last := len(g.numbers) - 1
	for _, s := range g.ordered() {
		fmt.Fprintf(out, "| %s | %s |", s.quantity, s.server)
		for _, v := range s.values {
			fmt.Fprintf(out, " %s |", significant(v))
		}
		for _, slope := range []float64{g.slope(s, 0, last), g.slope(s, max(0, last-1), last)} {
			if math.IsNaN(slope) || math.IsInf(slope, 0) {
				fmt.Fprint(out, " |")
			} else {
				fmt.Fprintf(out, " %.2f |", slope)
			}
		}
		fmt.Fprintln(out)
	}
}

// significant returns a number with three digits, or all before the point. It is empty if there is no number.
func significant(v float64) string {
	switch size := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return ""
	case size >= 100:
		return fmt.Sprintf("%.0f", v)
	case size >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// inThousandths returns a ratio. It is empty if there is no number.
func inThousandths(ratio float64) string {
	if math.IsNaN(ratio) || math.IsInf(ratio, 0) {
		return ""
	}
	return fmt.Sprintf("%.3f", ratio)
}

// cpuOfEach returns the CPU time of one of n, in microseconds. It is not a number if the clock is too coarse for it.
func cpuOfEach(cpu time.Duration, n float64) float64 {
	if cpu < 10*time.Second/ticks {
		return math.NaN()
	}
	return micros(cpu) / n
}

func inMiB(bytes int64) float64 { return float64(bytes) / (1 << 20) }

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// answer requests a URL several times. It returns the median of the times, and the last response.
func (h *harness) answer(ctx context.Context, url string) (time.Duration, response, error) {
	var took []time.Duration
	var r response
	for range 5 {
		begin := time.Now()
		var err error
		if r, err = h.get(ctx, url, false); err != nil {
			return 0, r, err
		}
		took = append(took, time.Since(begin))
	}
	return median(took, func(d time.Duration) time.Duration { return d }), r, nil
}

// addScrape measures a request for the metrics.
func (s *sample) addScrape(ctx context.Context, h *harness, of *server) error {
	took, r, err := h.answer(ctx, "http://"+of.Admin+"/metrics")
	s.add("metrics, KiB", float64(len(r.body))/(1<<10))
	s.add("request for the metrics, ms", millis(took))
	return err
}

// watch returns the CPU time that a server takes without requests, and how long that was measured.
func (h *harness) watch(ctx context.Context, s *server) (cpu, elapsed time.Duration, err error) {
	before, begin := s.process.cpu(), time.Now()
	err = wait(ctx, time.Duration(h.options.quiet)*time.Second)
	return s.process.cpu() - before, time.Since(begin), err
}
