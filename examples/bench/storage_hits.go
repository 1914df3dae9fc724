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

// hitsResult is how fast the reports come from the storage, and then from memory.
type hitsResult struct {
	hitsTrial
	cold, warm calls
	ratio      float64 // of the rates
}

// warmRounds is how often each report is requested again. Hits in memory are so fast that once would not take long enough.
const warmRounds = 5

// storageHits measures how fast a server that has just started responds with stored reports, each of which is requested
// once, and how fast it responds with the same reports again. The node does not know them any more.
func (h *harness) storageHits(ctx context.Context, _ []*contender, results *results) error {
	folder, err := h.filled(ctx)
	if err != nil {
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
	rounds := make([][]hitsResult, len(trials))
	for round := range h.options.rounds {
		for i, t := range trials {
			progress.Printf("stored reports, %s, %d callers, round %d of %d", t.delay, t.callers, round+1, h.options.rounds)
			r, err := h.hitsOf(ctx, t, folder)
			if err != nil {
				return err
			}
			rounds[i] = append(rounds[i], r)
		}
	}
	results.hits = rounds
	return nil
}

// hitsOf starts a server with stored reports, and requests each of them, and then again.
func (h *harness) hitsOf(ctx context.Context, t hitsTrial, folder string) (hitsResult, error) {
	s, err := withStorage(t.delay, folder).start(ctx, h)
	if err != nil {
		return hitsResult{}, err
	}
	defer s.process.stop()
	r := hitsResult{hitsTrial: t}
	if r.cold, err = h.stored(t.callers).run(ctx, s); err != nil {
		return r, err
	}
	if r.cold.failed > 0 {
		progress.Printf("%d requests failed: %s", r.cold.failed, r.cold.failure)
	}
	r.warm, err = h.stored(t.callers).repeated(warmRounds).run(ctx, s)
	r.ratio = r.cold.perSecond() / r.warm.perSecond()
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
		fmt.Fprintf(out, " %.2f |\n", median(rounds, func(r hitsResult) float64 { return r.ratio }))
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
