package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"time"
)

// pollLoad describes callers, each of whom polls for an unfinished report of its own.
type pollLoad struct {
	size
	callers     int
	everySecond bool // each caller polls once a second; otherwise as fast as it can
	*contender
}

// often returns how often each caller polls.
func (l pollLoad) often() string {
	if l.everySecond {
		return "once a second"
	}
	return "as fast as it can"
}

func (l pollLoad) String() string {
	return fmt.Sprintf("%s, %s, each caller %s", l.contender.name, l.size.name, l.often())
}

type pollResult struct {
	pollLoad
	measuredCalls
}

func (r pollResult) sample() sample {
	return append(r.calls.sample(), quantity{"requests to the node/s", float64(r.asked) / r.elapsed.Seconds()})
}

const (
	// pollDelay is how long the node takes for an unfinished report.
	pollDelay = 5 * time.Millisecond

	// pollInterval is the module's default.
	pollInterval = 2 * time.Second
)

// polls measures callers who poll for unfinished reports, with the module and with a proxy that asks the node each time.
func (h *harness) polls(ctx context.Context, participants []*contender, results *results) error {
	var err error
	results.polls, err = inRounds(ctx, "polls", h.options.rounds, h.allPollLoads(participants), h.pollsOf)
	compareContenders(results, "polls", results.polls)
	return err
}

// allPollLoads returns the loads for small reports, and those of 15 KB.
func (h *harness) allPollLoads(participants []*contender) []pollLoad {
	var all []pollLoad
	for _, size := range []size{{name: "small", document: []byte(smallReport)}, h.sizes[0]} {
		for _, everySecond := range []bool{false, true} {
			for _, c := range participants {
				if c.isModule() || c == reverseProxy {
					all = append(all, pollLoad{size, h.options.pollers, everySecond, c})
				}
			}
		}
	}
	return all
}

// pollsOf puts a server that has just started under a load. Before, each report is requested once. These requests are
// spread over the poll interval, so the module asks the node as evenly afterwards.
func (h *harness) pollsOf(ctx context.Context, l pollLoad) (pollResult, error) {
	s, err := l.contender.start(ctx, h)
	if err != nil {
		return pollResult{}, err
	}
	defer s.process.stop()
	h.node.delay.Store(int64(pollDelay))
	defer h.node.delay.Store(0)
	p := h.ownReports(unfinished+l.size.id(), "", l.callers, l.callers)
	p.mayBePlain = true // Caddy's encode leaves small responses as they are
	p.query = l.request(load{gzip: true})
	all := newCallers(l.callers, s)
	defer all.close()

	first := p
	first.checkAll = true
	first.rate = max(1, l.callers/int(pollInterval.Seconds()))
	if c, err := first.runWith(ctx, all); err != nil || c.failed > 0 {
		return pollResult{}, cmp.Or(err, c.err())
	}
	if l.everySecond {
		p.rate = l.callers
	}
	m, err := h.measureCalls(func() (calls, error) { return p.poll(ctx, all, h.options.polling) })
	return pollResult{l, m}, err
}

// printPolls prints the medians of the rounds.
func (r *results) printPolls(out io.Writer) {
	fmt.Fprintf(out, "\n**Polls for unfinished reports, %d callers, each for another report, HTTP, gzip, a node that takes %s**\n\n"+
		"| report | each caller polls | server | requests/s | requests to the node/s | p50 | p99 | CPU s per 10,000 responses | CPU, %% of a core |\n"+
		"|---|---|---|--:|--:|--:|--:|--:|--:|\n", r.polls[0][0].callers, inMillis(pollDelay))
	for _, rounds := range r.polls {
		l := rounds[0]
		fmt.Fprintf(out, "| %s | %s | %s | %.0f | %.0f | %s | %s | %.2f | %.0f |\n",
			l.size.name, l.often(), l.contender.name,
			median(rounds, func(r pollResult) float64 { return r.perSecond() }),
			median(rounds, func(r pollResult) float64 { return float64(r.asked) / r.elapsed.Seconds() }),
			short(median(rounds, func(r pollResult) time.Duration { return r.percentile(50) })),
			short(median(rounds, func(r pollResult) time.Duration { return r.percentile(99) })),
			10_000*median(rounds, func(r pollResult) time.Duration { return r.cpuPerReport() }).Seconds(),
			100*median(rounds, func(r pollResult) float64 { return r.busy() }))
	}
}
