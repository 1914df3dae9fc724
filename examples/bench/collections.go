package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// collectionsResult is how long hits take while the server keeps a number of small reports and collects garbage.
type collectionsResult struct {
	kept   int
	forced bool // one collection follows the other
	heap   int64
	calls
	collections []collection
}

// collection is a garbage collection of the server.
type collection struct {
	took  time.Duration
	pause time.Duration // the longer of its two, during which the program stands still
}

// manyReports is the module with room for many small reports. It logs its collections.
var manyReports = &contender{
	name: "fsbroker_task, many reports",
	env:  []string{"GODEBUG=gctrace=1"},
	config: caddyConfig("many", "", `
	fsbroker_task {
		secret bench {{.Secret}}
		node node-1 {{.Node}} {{.Secret}}
		cache {
			max_size 4GiB
		}
	}`),
}

// collections measures hits while a server keeps few and many small reports, when it collects garbage as it needs to, and
// when one collection follows the other.
func (h *harness) collections(ctx context.Context, _ []*contender, results *results) error {
	for _, kept := range []int{h.options.many / 1000, h.options.many} {
		if err := h.collectionsOf(ctx, kept, results); err != nil {
			return err
		}
	}
	return nil
}

func (h *harness) collectionsOf(ctx context.Context, kept int, results *results) error {
	s, err := manyReports.start(ctx, h)
	if err != nil {
		return err
	}
	defer s.process.stop()
	progress.Printf("collections, keeping %d reports", kept)
	reports := h.ownReports("small", "many", kept, 32)
	if _, err := reports.runAll(ctx, s); err != nil {
		return err
	}
	for _, forced := range []bool{false, true} {
		progress.Printf("collections, %d reports, forced: %v", kept, forced)
		r, err := h.hitsDuringCollections(ctx, s, reports, forced)
		if err != nil {
			return err
		}
		results.collections = append(results.collections, r)
	}
	return nil
}

// hitsPerSecond are few enough for the server to be idle most of the time, so a hit takes long only if something holds it up.
const hitsPerSecond = 500

// hitsDuringCollections requests reports that are kept, in no order.
func (h *harness) hitsDuringCollections(ctx context.Context, s *server, reports plan, forced bool) (collectionsResult, error) {
	r := collectionsResult{kept: reports.count, forced: forced}
	var err error
	if r.heap, err = h.memoryUsed(ctx, manyReports, s); err != nil {
		return r, err
	}
	log, err := os.ReadFile(s.process.log)
	if err != nil {
		return r, err
	}
	hits := reports.shuffled()
	hits.count, hits.rate = hitsPerSecond*h.options.seconds*h.options.rounds, hitsPerSecond
	asked := h.node.requests.Load()
	collecting, done := context.WithCancel(ctx)
	defer done()
	collected := make(chan error, 1)
	go func() { collected <- h.collect(collecting, s, forced) }()
	r.calls, err = hits.runAll(ctx, s)
	done()
	if err = errors.Join(err, <-collected); err != nil {
		return r, err
	}
	if n := h.node.requests.Load() - asked; n > 0 {
		return r, fmt.Errorf("%d requests were no hits: the server does not keep %d reports", n, r.kept)
	}
	after, err := os.ReadFile(s.process.log)
	r.collections = parseCollections(after[len(log):])
	return r, err
}

// collect forces one collection after the other until ctx ends.
func (h *harness) collect(ctx context.Context, s *server, forced bool) error {
	for forced && ctx.Err() == nil {
		if _, err := h.memoryUsed(context.WithoutCancel(ctx), manyReports, s); err != nil {
			return err
		}
	}
	return nil
}

// parseCollections returns the collections in a log. See gctrace in the documentation of Go's package runtime.
func parseCollections(log []byte) (all []collection) {
	for lines := bufio.NewScanner(bytes.NewReader(log)); lines.Scan(); {
		_, clock, ok := strings.Cut(lines.Text(), "%: ")
		clock, _, isClock := strings.Cut(clock, " ms clock")
		phases := strings.Split(clock, "+")
		if !ok || !isClock || len(phases) != 3 {
			continue
		}
		var took [3]time.Duration
		for i, phase := range phases {
			millis, _ := strconv.ParseFloat(phase, 64)
			took[i] = time.Duration(millis * float64(time.Millisecond))
		}
		all = append(all, collection{took: took[0] + took[1] + took[2], pause: max(took[0], took[2])})
	}
	return all
}

// printCollections prints the percentiles of the hits, and the longest collections.
func (r *results) printCollections(out io.Writer) {
	fmt.Fprintf(out, "\n**Hits while the server keeps small reports and collects garbage, %d a second, 32 conn.**\n\n"+
		"| reports kept | heap, MiB | collections | how many | median | longest | longest pause | p50 | p99 | p99.9 | longest hit |\n"+
		"|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|\n", hitsPerSecond)
	for _, c := range r.collections {
		when := "as needed"
		if c.forced {
			when = "one after the other"
		}
		fmt.Fprintf(out, "| %d | %d | %s | %d |", c.kept, c.heap>>20, when, len(c.collections))
		if len(c.collections) == 0 {
			fmt.Fprint(out, " | | |")
		} else {
			took := func(c collection) time.Duration { return c.took }
			longest := slices.MaxFunc(c.collections, func(a, b collection) int { return int(a.took - b.took) })
			pause := slices.MaxFunc(c.collections, func(a, b collection) int { return int(a.pause - b.pause) })
			fmt.Fprintf(out, " %s | %s | %s |", short(median(c.collections, took)), short(longest.took), short(pause.pause))
		}
		fmt.Fprintf(out, " %s | %s | %s | %s |\n", short(c.percentile(50)), short(c.percentile(99)), short(c.percentile(99.9)), short(c.percentile(100)))
	}
}
