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

// when returns when garbage is collected.
func (r collectionsResult) when() string {
	if r.forced {
		return "one after the other"
	}
	return "as needed"
}

func (r collectionsResult) sample() sample {
	return sample{
		{"heap, MiB", inMiB(r.heap)},
		{"p50, ms", millis(r.percentile(50))},
		{"p99, ms", millis(r.percentile(99))},
		{"p99.9, ms", millis(r.percentile(99.9))},
		{"CPU of a hit, µs", micros(r.cpuPerReport())},
	}
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
	trials, err := ofBoth(ctx, h, results, "collections", 1, []keptReports{keptReports(h.options.many / 1000), keptReports(h.options.many)}, (*harness).collectionsOf)
	for _, rounds := range trials {
		results.collections = append(results.collections, rounds[0]...)
	}
	return err
}

// keptReports is a number of reports that a server keeps.
type keptReports int

func (k keptReports) String() string { return fmt.Sprintf("keeping %d reports", k) }

// collectionsResults are those of one server.
type collectionsResults []collectionsResult

func (all collectionsResults) sample() (s sample) {
	for _, r := range all {
		s = append(s, r.sample().of("collections "+r.when())...)
	}
	return s
}

func (h *harness) collectionsOf(ctx context.Context, kept keptReports) (all collectionsResults, err error) {
	s, err := manyReports.start(ctx, h)
	if err != nil {
		return nil, err
	}
	defer s.process.stop()
	reports := h.ownReports("small", "many", int(kept), 32)
	if _, err := reports.runAll(ctx, s); err != nil {
		return nil, err
	}
	for _, forced := range []bool{false, true} {
		r, err := h.hitsDuringCollections(ctx, s, reports, forced)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
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
		fmt.Fprintf(out, "| %d | %d | %s | %d |", c.kept, c.heap>>20, c.when(), len(c.collections))
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
