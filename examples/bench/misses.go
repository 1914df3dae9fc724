package main

import (
	"context"
	"fmt"
	"io"
	"time"
)

// missLoad describes callers, each request of whom is for another finished report.
type missLoad struct {
	size
	callers int
	*contender
	gzip bool
}

func (l missLoad) String() string {
	return fmt.Sprintf("%s, %s, %d callers, %s", l.contender.name, l.size.name, l.callers, accepted(l.gzip))
}

type missLoadResult struct {
	missLoad
	measuredCalls
	ratio float64 // the module's CPU time per response divided by this contender's
}

// misses measures misses of usual reports, and the same requests to a proxy that keeps nothing.
func (h *harness) misses(ctx context.Context, participants []*contender, results *results) error {
	rounds, err := inRounds(ctx, "misses", h.options.rounds, h.allMissLoads(participants), h.missesOf)
	var ours []missLoadResult // of the same callers
	for _, theirs := range rounds {
		if theirs[0].contender == module {
			ours = theirs
		}
		for i := range theirs {
			theirs[i].ratio = float64(ours[i].cpuPerReport()) / float64(theirs[i].cpuPerReport())
		}
	}
	results.missLoads = rounds
	compareContenders(results, "misses", rounds)
	return err
}

// allMissLoads returns the loads for the usual sizes of reports. For each size and number of callers, the module is first.
func (h *harness) allMissLoads(participants []*contender) []missLoad {
	var all []missLoad
	for _, size := range h.sizes[:3] {
		for _, callers := range connections {
			for _, c := range participants {
				switch {
				case c.isModule():
					all = append(all, missLoad{size, callers, c, true})
				case c == reverseProxy:
					all = append(all, missLoad{size, callers, c, true}, missLoad{size, callers, c, false})
				}
			}
		}
	}
	return all
}

// missesOf puts a server that has just started under a load.
func (h *harness) missesOf(ctx context.Context, l missLoad) (missLoadResult, error) {
	s, err := l.contender.start(ctx, h)
	if err != nil {
		return missLoadResult{}, err
	}
	defer s.process.stop()
	if err := h.check(ctx, load{size: l.size, gzip: l.gzip}, l.contender, s); err != nil {
		return missLoadResult{}, err
	}
	count := max(1, h.options.misses*min(len(l.document), middling)/len(l.document))
	if _, err := h.missPlan(l, "warm", max(1, count/10)).runAll(ctx, s); err != nil {
		return missLoadResult{}, err
	}
	m, err := h.measureCalls(func() (calls, error) { return h.missPlan(l, "miss", count).run(ctx, s) })
	if err == nil && (m.asked != count || len(m.took) != count) {
		err = fmt.Errorf("the node received %d requests for %d reports, and callers %d", m.asked, count, len(m.took))
	}
	return missLoadResult{missLoad: l, measuredCalls: m}, err
}

// missPlan returns a plan that requests each of a number of reports once.
func (h *harness) missPlan(l missLoad, name string, count int) plan {
	p := h.ownReports(l.size.id(), name, count, l.callers)
	p.identity = !l.gzip
	p.query = l.request(load{gzip: l.gzip})
	return p
}

// printMissLoads prints the medians of the rounds.
func (r *results) printMissLoads(out io.Writer) {
	fmt.Fprint(out, "\n**Misses: each request is for another report, HTTP**\n\n"+
		"| report | callers | server | caller accepts | responses/s | p50 | p99 | CPU µs per response | the module's CPU time is … times as much |\n"+
		"|---|--:|---|---|--:|--:|--:|--:|--:|\n")
	for _, rounds := range r.missLoads {
		l := rounds[0]
		fmt.Fprintf(out, "| %s | %d | %s | %s | %.0f | %s | %s | %d | %.2f |\n",
			l.size.name, l.callers, l.contender.name, accepted(l.gzip),
			median(rounds, func(r missLoadResult) float64 { return r.perSecond() }),
			short(median(rounds, func(r missLoadResult) time.Duration { return r.percentile(50) })),
			short(median(rounds, func(r missLoadResult) time.Duration { return r.percentile(99) })),
			median(rounds, func(r missLoadResult) time.Duration { return r.cpuPerReport() }).Microseconds(),
			median(rounds, func(r missLoadResult) float64 { return r.ratio }))
	}
}
