package main

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// results are the results of a run.
type results struct {
	loads        []loadResult
	floods       []floodResult
	memory       []memoryResult
	cold         []coldResult
	misses       []missResult
	missLoads    [][]missLoadResult // with the rounds of each trial
	polls        [][]pollResult     // with the rounds of each trial
	compression  []compressionResult
	collections  []collectionsResult
	protocols    []loadResult
	instructions []instructionsResult
	waiting      []*waitingRounds

	// Of the storage, with the rounds of each trial.
	hits    [][]hitsResult
	writes  [][]writesResult
	stops   [][]stopResult
	purges  [][]purgeResult
	sweeps  [][]sweepResult
	through []heapRun

	restarts [][]restartResult // the rounds of each trial
	growths  []growth

	comparisons []comparison // of the module of today and the one before
}

type loadResult struct {
	load
	*contender
	measure
	ratio    float64 // the module's requests per second divided by this contender's
	cpuRatio float64 // this contender's CPU time per response divided by the module's
}

type memoryResult struct {
	*contender
	size
	bytes float64 // per report
}

func (r memoryResult) String() string { return r.contender.name + ", " + r.size.name }

func (r memoryResult) sample() sample { return sample{{"bytes per report", r.bytes}} }

type coldResult struct {
	*contender
	callers, requests, failed int
}

func (r coldResult) String() string {
	return fmt.Sprintf("%s, %d callers", r.contender.name, r.callers)
}

func (r coldResult) sample() sample {
	return sample{{"requests to the node", float64(r.requests)}, {"failed callers", float64(r.failed)}}
}

type missResult struct {
	*contender
	mib  int
	gzip bool

	first, took time.Duration // until the first byte of the body, and until the last
	peak        int64
}

func (r missResult) String() string {
	return fmt.Sprintf("%s, %d MiB, %s", r.contender.name, r.mib, accepted(r.gzip))
}

func (r missResult) sample() sample {
	return sample{
		{"time to the first byte, ms", millis(r.first)},
		{"whole time, ms", millis(r.took)},
		{"peak memory, MiB", inMiB(r.peak)},
	}
}

type compressionResult struct {
	size
	way   string
	bytes int
	took  time.Duration
}

// print prints the tables, and whether the goals were met.
func (r *results) print(ctx context.Context, out io.Writer, h *harness) {
	fmt.Fprintf(out, "Measured on %s with %s, %s.\n", time.Now().Format(time.DateOnly), versions(ctx), h.options)
	for _, s := range h.sizes {
		kind := "generated"
		if s.real {
			kind = "real"
		}
		fmt.Fprintf(out, "%s: %d bytes, %s. ", s.name, len(s.document), kind)
	}
	if h.before != nil {
		fmt.Fprintf(out, "\n%s: %s", h.before.module.name, h.before.commit)
	}
	fmt.Fprint(out, "\n\n")
	for _, table := range []struct {
		rows  int
		print func(io.Writer)
	}{
		{len(r.loads), r.printSummary}, {len(r.loads), r.printLoads}, {len(r.floods), r.printFloods},
		{len(r.memory), r.printMemory}, {len(r.cold), r.printCold}, {len(r.misses), r.printMisses},
		{len(r.missLoads), r.printMissLoads}, {len(r.polls), r.printPolls},
		{len(r.compression), r.printCompression}, {len(r.collections), r.printCollections}, {len(r.waiting), r.printWaiting},
		{len(r.loads), r.printGoals},
		{len(r.protocols), r.printProtocols}, {len(r.protocols), r.printProtocolGoals}, {len(r.protocols), r.printProtocolLoads},
		{len(r.instructions), r.printInstructions},
		{len(r.hits), r.printHits}, {len(r.writes), r.printWrites}, {len(r.stops), r.printStops},
		{len(r.purges), r.printPurges}, {len(r.sweeps), r.printSweeps},
		{len(r.through), r.printThrough}, {len(r.restarts), r.printRestarts},
		{len(r.growths), r.printGrowths}, {len(r.comparisons), r.printComparisons},
	} {
		if table.rows > 0 {
			table.print(out)
		}
	}
}

// printSummary prints how many times as fast as each other contender the module is, for the loads with many callers.
func (r *results) printSummary(out io.Writer) {
	others := peersOf(r.loads)
	fmt.Fprint(out, "**How many times as fast the module is**\n\n| load | requests/s |")
	for _, c := range others {
		fmt.Fprintf(out, " %s |", c.name)
	}
	fmt.Fprint(out, "\n|---|--:|", strings.Repeat("--:|", len(others)), "\n")
	for _, ours := range r.loads {
		if ours.contender != module || ours.conns == 1 {
			continue
		}
		fmt.Fprintf(out, "| %s | %.0f |", ours.load, ours.Requests)
		for _, c := range others {
			ratio := ""
			if theirs := find(r.loads, ours.load, c); theirs != nil {
				ratio = fmt.Sprintf("%.2f", theirs.ratio)
			}
			fmt.Fprintf(out, " %s |", ratio)
		}
		fmt.Fprintln(out)
	}
}

// peersOf returns the contenders that the module is compared with.
func peersOf(all []loadResult) (peers []*contender) {
	for _, l := range all {
		if l.contender != module && !slices.Contains(peers, l.contender) {
			peers = append(peers, l.contender)
		}
	}
	return peers
}

// find returns the result of c under a load, or nil if there is none.
func find(all []loadResult, under load, c *contender) *loadResult {
	for i, l := range all {
		if l.contender == c && l.load.String() == under.String() {
			return &all[i]
		}
	}
	return nil
}

func (r *results) printLoads(out io.Writer) {
	var last string
	for _, l := range r.loads {
		if name := l.load.String(); name != last {
			last = name
			fmt.Fprintf(out, "\n**%s**\n\n| | requests/s | p50 | p99 | CPU s per 10,000 responses | bytes per response | the module is … times as fast |\n|---|--:|--:|--:|--:|--:|--:|\n", name)
		}
		fmt.Fprintf(out, "| %s | %.0f | %s | %s | %.2f | %.0f | %.2f |\n", l.contender.name, l.Requests, short(l.P50), short(l.P99), l.CPU.Seconds(), l.Wire, l.ratio)
	}
}

func short(d time.Duration) string {
	if d < time.Millisecond {
		return fmt.Sprintf("%d µs", d.Microseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// printFloods prints what callers without a valid secret cost, compared with hits.
func (r *results) printFloods(out io.Writer) {
	hits := r.floods[0]
	fmt.Fprint(out, "\n**Callers without a valid secret, HTTP, 32 conn.**\n\n| requests with | requests/s | p50 | p99 | CPU µs per request | of a hit's | bytes per response | peak resident memory, MiB |\n|---|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, f := range r.floods {
		fmt.Fprintf(out, "| %s | %.0f | %s | %s | %.1f | %.2f | %.0f | %d |\n", f.name, f.Requests, short(f.P50), short(f.P99),
			float64(f.CPU.Microseconds())/10_000, float64(f.CPU)/float64(hits.CPU), f.Wire, f.peak>>20)
	}
}

func (r *results) printMemory(out io.Writer) {
	fmt.Fprint(out, "\n**Memory per cached report, for clients that accept gzip**\n\n| | report | bytes | per byte of the report |\n|---|---|--:|--:|\n")
	for _, m := range r.memory {
		fmt.Fprintf(out, "| %s | %s | %.0f | %.2f |\n", m.contender.name, m.size.name, m.bytes, m.bytes/float64(len(m.document)))
	}
}

func (r *results) printCold(out io.Writer) {
	fmt.Fprint(out, "\n**Concurrent callers for an uncached report**\n\n| | callers | requests to the node | failed callers |\n|---|--:|--:|--:|\n")
	for _, c := range r.cold {
		fmt.Fprintf(out, "| %s | %d | %d | %d |\n", c.contender.name, c.callers, c.requests, c.failed)
	}
}

func (r *results) printMisses(out io.Writer) {
	fmt.Fprint(out, "\n**A cache miss**\n\n"+
		"| | report | caller accepts | time to the first byte | whole time | ms per MiB | peak memory, MiB per MiB |\n"+
		"|---|--:|---|--:|--:|--:|--:|\n")
	for _, m := range r.misses {
		fmt.Fprintf(out, "| %s | %d MiB | %s | %s | %s | %.1f | %.2f |\n", m.contender.name, m.mib, accepted(m.gzip), short(m.first),
			short(m.took), m.took.Seconds()*1000/float64(m.mib), float64(m.peak)/float64(m.mib<<20))
	}
}

// accepted returns the encoding that a caller accepts.
func accepted(gzip bool) string {
	if gzip {
		return "gzip"
	}
	return "identity"
}

func (r *results) printCompression(out io.Writer) {
	fmt.Fprint(out, "\n**Ways to compress a report**\n\n| report | compressed with | bytes | per byte of the report | time |\n|---|---|--:|--:|--:|\n")
	for _, f := range r.compression {
		fmt.Fprintf(out, "| %s | %s | %d | %.3f | %s |\n", f.size.name, f.way, f.bytes, float64(f.bytes)/float64(len(f.document)), short(f.took))
	}
}

// goal is a performance goal of the module.
type goal struct {
	text    string
	peer    string
	minimum float64 // ratio
	of      func(load) bool
}

func upTo(bytes int) func(load) bool {
	return func(l load) bool { return len(l.size.document) <= bytes }
}

func and(a, b func(load) bool) func(load) bool { return func(l load) bool { return a(l) && b(l) } }

func tlsGzip(l load) bool      { return l.tls && l.gzip }
func httpGzip(l load) bool     { return !l.tls && l.gzip }
func httpIdentity(l load) bool { return !l.tls && !l.gzip }
func from(bytes int) func(load) bool {
	return func(l load) bool { return len(l.size.document) >= bytes }
}

const (
	small, middling, large, huge = 20_000, 60_000, 300_000, 1 << 20 // limits between the report sizes
)

var goals = []goal{
	{"0.95 of a bare handler in Caddy", bareHandler.name, 0.95, func(load) bool { return true }},
	{"HTTPS, gzip: 3 times nginx (level 6, as here) at 15 KB", "nginx, level 6", 3, and(tlsGzip, upTo(small))},
	{"HTTPS, gzip: 6 times nginx (level 6) at 41 KB", "nginx, level 6", 6, and(tlsGzip, and(from(small), upTo(middling)))},
	{"HTTPS, gzip: 30 times nginx (level 6) from 220 KB on", "nginx, level 6", 30, and(tlsGzip, from(middling))},
	{"20 times cache-handler up to 220 KB", "Caddy cache-handler", 20, upTo(large)},
	{"3 times cache-handler at 2 MiB", "Caddy cache-handler", 3, from(large)},
	{"gzip: 4 times file_server and encode from 41 KB on", "Caddy file_server", 4, and(func(l load) bool { return l.gzip }, from(small))},
	{"HTTP, identity: 0.6 of nginx up to 220 KB", "nginx", 0.6, and(httpIdentity, upTo(large))},
	{"HTTP, identity: ahead of nginx from 1 MiB on", "nginx", 1, and(httpIdentity, from(huge))},
	{"HTTP, identity: ahead of Varnish", "Varnish", 1, httpIdentity},
	{"HTTP, gzip: 0.55 of Varnish", "Varnish", 0.55, httpGzip},
}

// printGoals prints whether the goals were met with one caller and with many. Each row is the worst result among the
// loads of the goal, and the result of the bare handler under the same load. The difference is due to the module.
func (r *results) printGoals(out io.Writer) {
	fmt.Fprint(out, "\n**Goals**\n\n| goal | worst result | bare handler | load | |\n|---|--:|--:|---|---|\n")
	for _, g := range goals {
		for _, conns := range connections {
			worst := r.worst(g, conns)
			if worst == nil {
				continue
			}
			bare := ""
			if floor := find(r.loads, worst.load, bareHandler); floor != nil {
				bare = fmt.Sprintf("%.2f", worst.ratio/floor.ratio)
			}
			fmt.Fprintf(out, "| %s | %.2f | %s | %s | %s |\n", g.text, worst.ratio, bare, worst.load, verdict(worst.ratio >= g.minimum))
		}
	}
	for _, m := range r.memory {
		if each := m.bytes / float64(len(m.document)); m.contender == module {
			fmt.Fprintf(out, "| at most 0.35 bytes of memory per byte of a report | %.2f | | %s | %s |\n", each, m.size.name, verdict(each <= 0.35))
		}
	}
	for _, c := range r.cold {
		if c.contender == module {
			fmt.Fprintf(out, "| 1 request to the node for %d callers | %d | | | %s |\n", c.callers, c.requests, verdict(c.requests == 1 && c.failed == 0))
		}
	}
}

// worst returns the worst result for the goal, or nil if there is none.
func (r *results) worst(g goal, conns int) *loadResult {
	var worst *loadResult
	for i, l := range r.loads {
		if l.contender.name == g.peer && l.conns == conns && g.of(l.load) && (worst == nil || l.ratio < worst.ratio) {
			worst = &r.loads[i]
		}
	}
	return worst
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "**missed**"
}

// versions returns the names and versions of the measured software.
func versions(ctx context.Context) string {
	names := []string{runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			switch dep.Path {
			case "github.com/caddyserver/caddy/v2", "github.com/caddyserver/cache-handler":
				names = append(names, dep.Path+" "+dep.Version)
			}
		}
	}
	for _, command := range [][]string{{"nginx", "-v"}, {"varnishd", "-V"}, {"wrk", "-v"}, {"h2load", "--version"}, {"valgrind", "--version"}} {
		out, _ := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput() //nolint:gosec // it is one of these
		line, _, _ := strings.Cut(string(out), "\n")
		line = strings.TrimPrefix(line, "nginx version: ")
		line, _, _ = strings.Cut(line, " revision")
		line, _, _ = strings.Cut(line, " [")
		if line != "" {
			names = append(names, strings.NewReplacer("(", "", ")", "").Replace(line))
		}
	}
	return strings.Join(names, ", ")
}
