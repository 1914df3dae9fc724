package main

import (
	"context"
	"fmt"
	"io"
	"time"
)

// hitsTrial is one number of callers at one delay of the storage.
type hitsTrial struct {
	delay   time.Duration
	callers int
}

func (t hitsTrial) String() string { return fmt.Sprintf("%s, %d callers", t.delay, t.callers) }

// hitsResult is how fast the reports come from the storage, and then from memory.
type hitsResult struct {
	hitsTrial
	restarted
}

// restarted is how fast a server that has just started responds with stored reports, and then with the same again.
type restarted struct {
	cold, warm calls
}

func (r restarted) sample() sample {
	return append(r.cold.sample().of("from the storage"), r.warm.sample().of("again")...)
}

// ratio returns the ratio of the rates.
func (r restarted) ratio() float64 { return r.cold.perSecond() / r.warm.perSecond() }

// warmRounds is how often each report is requested again. Hits in memory are so fast that once would not take long enough.
const warmRounds = 5

// storageHits measures how fast a server that has just started responds with stored reports, each of which is requested
// once, and how fast it responds with the same reports again. The node does not know them any more.
func (h *harness) storageHits(ctx context.Context, _ []*contender, results *results) error {
	if err := h.fillBoth(ctx, h.sizes[0]); err != nil {
		return err
	}
	h.node.forgets.Store(true)
	defer h.node.forgets.Store(false)
	var trials []hitsTrial
	for _, delay := range h.options.delays {
		for _, callers := range []int{32, 300} {
			trials = append(trials, hitsTrial{delay, callers})
		}
	}
	var err error
	results.hits, err = ofBoth(ctx, h, results, "storage hits", h.options.rounds, trials, (*harness).hitsOf)
	return err
}

// hitsOf measures a trial once.
func (h *harness) hitsOf(ctx context.Context, t hitsTrial) (hitsResult, error) {
	folder, err := h.filled(ctx, h.sizes[0])
	if err != nil {
		return hitsResult{}, err
	}
	r, err := h.restarted(ctx, withStorage(t.delay, folder), h.stored(h.sizes[0], t.callers))
	return hitsResult{t, r}, err
}

// restarted starts a contender with stored reports, and requests each of them, and then again.
func (h *harness) restarted(ctx context.Context, c *contender, p plan) (r restarted, err error) {
	s, err := c.start(ctx, h)
	if err != nil {
		return r, err
	}
	defer s.process.stop()
	if r.cold, err = p.run(ctx, s); err != nil {
		return r, err
	}
	if err := r.cold.err(); err != nil {
		progress.Print(err)
	}
	r.warm, err = p.repeated(warmRounds).run(ctx, s)
	return r, err
}

// printHits prints the medians of the rounds.
func (r *results) printHits(out io.Writer) {
	fmt.Fprint(out, "\n**Stored reports after a start, and the same reports again from memory, HTTP, gzip**\n\n"+
		"| an operation of the storage takes | callers | from the storage, reports/s | p50 | p99 | failed | from memory, reports/s | p50 | p99 | failed | of the rate from memory |\n"+
		"|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, rounds := range r.hits {
		fmt.Fprintf(out, "| %s | %d |", inMillis(rounds[0].delay), rounds[0].callers)
		printCalls(out, rounds, func(r hitsResult) calls { return r.cold })
		printCalls(out, rounds, func(r hitsResult) calls { return r.warm })
		fmt.Fprintf(out, " %.2f |\n", median(rounds, func(r hitsResult) float64 { return r.ratio() }))
	}
}

// printCalls prints the columns of the medians of what of returns.
func printCalls(out io.Writer, rounds []hitsResult, of func(hitsResult) calls) {
	fmt.Fprintf(out, " %.0f | %s | %s | %d |",
		median(rounds, func(r hitsResult) float64 { return of(r).perSecond() }),
		short(median(rounds, func(r hitsResult) time.Duration { return of(r).percentile(50) })),
		short(median(rounds, func(r hitsResult) time.Duration { return of(r).percentile(99) })),
		median(rounds, func(r hitsResult) int { return of(r).failed }))
}

func inMillis(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
