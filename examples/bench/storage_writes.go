package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// writesTrial is one number of callers, or rate of requests, at one delay of the storage.
type writesTrial struct {
	delay   time.Duration
	callers int
	rate    int
}

func (t writesTrial) String() string { return fmt.Sprintf("%s, %s", t.delay, t.requests()) }

// requests returns how many callers there are, or how many requests.
func (t writesTrial) requests() string {
	if t.rate > 0 {
		return fmt.Sprintf("%d a second", t.rate)
	}
	return fmt.Sprintf("%d callers", t.callers)
}

// writesResult is what became of reports that were fetched for the first time.
type writesResult struct {
	writesTrial
	calls
	written int     // reports that were stored when the last one was fetched
	refused float64 // reports for which there was no room, until then
	stop    stopResult
}

// storedPerSecond returns how many reports were stored while callers requested them.
func (r writesResult) storedPerSecond() float64 { return float64(r.written) / r.elapsed.Seconds() }

func (r writesResult) sample() sample {
	all := append(r.calls.sample(), quantity{"stored/s", r.storedPerSecond()}, quantity{"no room for", r.refused})
	return append(all, r.stop.sample().of("stop")...)
}

// stopResult is what a stopped server left behind.
type stopResult struct {
	delay  time.Duration
	queued int // reports, before
	took   time.Duration
	stored storedCount
	lost   int // reports
}

func (r stopResult) sample() sample {
	return sample{{"time, ms", millis(r.took)}, {"reports lost", float64(r.lost)}}
}

// storageWrites measures how fast finished reports are stored that callers request for the first time, and how many are
// lost when the server is stopped right after that.
func (h *harness) storageWrites(ctx context.Context, _ []*contender, results *results) error {
	var trials []writesTrial
	for _, delay := range h.options.delays {
		trials = append(trials, writesTrial{delay, 300, 600}, writesTrial{delay, 32, 0}, writesTrial{delay, 300, 0})
	}
	var err error
	results.writes, err = ofBoth(ctx, h, results, "storage writes", h.options.rounds, trials, (*harness).writesOf)
	return err
}

// writesOf requests new reports of a server with an empty storage, and stops it.
func (h *harness) writesOf(ctx context.Context, t writesTrial) (writesResult, error) {
	s, folder, err := h.startEmpty(ctx, t.delay)
	if err != nil {
		return writesResult{}, err
	}
	defer os.RemoveAll(folder)
	p := h.ownReports(h.sizes[0].id(), "new", 2*h.options.stored, t.callers)
	if p.rate = t.rate; t.rate > 0 {
		p.count = h.options.stored / 2
	}
	r := writesResult{writesTrial: t}
	r.calls, err = p.runAll(ctx, s)
	m, metricsErr := h.metrics(ctx, s)
	r.written, r.refused = int(m[writesMetric]), m[refusedMetric]
	stop, stopErr := h.stopAndCount(ctx, s, t.delay, folder, p.count)
	r.stop = stop
	return r, errors.Join(err, metricsErr, stopErr)
}

// startEmpty starts a server with an empty storage in a new folder.
func (h *harness) startEmpty(ctx context.Context, delay time.Duration) (s *server, folder string, err error) {
	parent, err := os.MkdirTemp(h.values, "new-")
	if err != nil {
		return nil, "", err
	}
	folder = filepath.Join(parent, "storage")
	s, err = withStorage(delay, folder).start(ctx, h)
	return s, folder, err
}

// stopAndCount stops a server, and counts how many of the reports that it has fetched are stored.
func (h *harness) stopAndCount(ctx context.Context, s *server, delay time.Duration, folder string, fetched int) (stopResult, error) {
	queued, err := h.queued(ctx, s)
	r := stopResult{delay: delay, queued: queued}
	err = errors.Join(err, removeIfThere(holdFile(folder)))
	begin := time.Now()
	s.process.stop()
	r.took = time.Since(begin)
	found, countErr := countStored(folder)
	r.stored, r.lost = found, fetched-found.documents
	return r, errors.Join(err, countErr)
}

func removeIfThere(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// storageStop measures how long a server takes to stop, and what it loses, when many reports wait to be stored. The
// storage has held them back until then.
func (h *harness) storageStop(ctx context.Context, _ []*contender, results *results) error {
	var err error
	results.stops, err = ofBoth(ctx, h, results, "storage stop", h.options.rounds, h.options.delays, (*harness).stopOf)
	return err
}

// stopOf fills the queue of a server to its storage, and stops it.
func (h *harness) stopOf(ctx context.Context, delay time.Duration) (stopResult, error) {
	s, folder, err := h.startEmpty(ctx, delay)
	if err != nil {
		return stopResult{}, err
	}
	defer os.RemoveAll(folder)
	if err := os.WriteFile(holdFile(folder), nil, 0o600); err != nil {
		s.process.stop()
		return stopResult{}, err
	}
	fetched, err := h.fillQueue(ctx, s)
	r, stopErr := h.stopAndCount(ctx, s, delay, folder, fetched)
	return r, errors.Join(err, stopErr)
}

// fillQueue requests new reports until the queue to the storage has as many as there are to be, and returns how many
// it requested.
func (h *harness) fillQueue(ctx context.Context, s *server) (fetched int, err error) {
	step := max(1, h.options.stored/50)
	for {
		queued, err := h.queued(ctx, s)
		if err != nil || queued+step > h.options.stored {
			return fetched, err
		}
		p := h.ownReports(h.sizes[0].id(), fmt.Sprintf("new%d-", fetched), step, 32)
		if _, err := p.runAll(ctx, s); err != nil {
			return fetched, err
		}
		fetched += step
	}
}

// printWrites prints the medians of the rounds.
func (r *results) printWrites(out io.Writer) {
	fmt.Fprint(out, "\n**New reports, stored while callers request them, and a stop right after that**\n\n"+
		"| an operation of the storage takes | requests | reports/s | stored/s | no room for | queued at the end | time to stop | lost |\n"+
		"|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, rounds := range r.writes {
		fmt.Fprintf(out, "| %s | %s | %.0f | %.0f | %.0f | %d | %s | %d of %d |\n",
			inMillis(rounds[0].delay), rounds[0].requests(),
			median(rounds, func(r writesResult) float64 { return r.perSecond() }),
			median(rounds, writesResult.storedPerSecond),
			median(rounds, func(r writesResult) float64 { return r.refused }),
			median(rounds, func(r writesResult) int { return r.stop.queued }),
			inSeconds(median(rounds, func(r writesResult) time.Duration { return r.stop.took })),
			median(rounds, func(r writesResult) int { return r.stop.lost }), len(rounds[0].took))
	}
}

// printStops prints the medians of the rounds.
func (r *results) printStops(out io.Writer) {
	fmt.Fprint(out, "\n**A stop while many reports wait to be stored**\n\n"+
		"| an operation of the storage takes | reports queued | time to stop | stored/s | lost |\n"+
		"|--:|--:|--:|--:|--:|\n")
	for _, rounds := range r.stops {
		fmt.Fprintf(out, "| %s | %d | %s | %.0f | %d |\n", inMillis(rounds[0].delay),
			median(rounds, func(r stopResult) int { return r.queued }),
			inSeconds(median(rounds, func(r stopResult) time.Duration { return r.took })),
			median(rounds, func(r stopResult) float64 { return float64(r.stored.documents) / r.took.Seconds() }),
			median(rounds, func(r stopResult) int { return r.lost }))
	}
}

func inSeconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
