package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const (
	grownHits    = 5000 // stored reports that are requested after a start
	grownNew     = 2000 // reports that are stored to measure that
	grownLookups = 100  // files that are asked for by their digest
)

// growthStored measures servers with few and many stored reports. All numbers use the same storage, to which reports are
// added. So those that are stored to measure that come last, and only once for each number.
func (h *harness) growthStored(ctx context.Context, _ []*contender, results *results) error {
	const title = "Growth: stored reports of 400 bytes, storage file_system"
	for _, on := range h.both() {
		defer os.RemoveAll(on.grownFolder())
	}
	g := growth{title: title, numbers: powers(h.options.grown, 4)}
	var reads, writes [][]sample
	stored := 0
	for _, n := range g.numbers {
		for _, on := range h.both() {
			progress.Printf("%s: storing %d, %s", title, n, on.module.name)
			if err := on.storeUntil(ctx, stored, n); err != nil {
				return fmt.Errorf("%s: %w", on.module.name, err)
			}
		}
		trials := []storedNumber{storedNumber(n)}
		read, err := ofBoth(ctx, h, results, title, h.options.rounds, trials, (*harness).readsOf)
		if err != nil {
			return err
		}
		write, err := ofBoth(ctx, h, results, title, 1, trials, (*harness).newOf)
		if err != nil {
			return err
		}
		reads, writes = append(reads, read...), append(writes, write...)
		stored = n + newAt(n)
	}
	g.add("fsbroker_task", reads)
	g.add("fsbroker_task", writes)
	results.growths = append(results.growths, g)
	return nil
}

// storedNumber is a number of stored reports.
type storedNumber int

func (n storedNumber) String() string { return strconv.Itoa(int(n)) }

// newAt returns how many new reports are stored when there are n. They must be fewer than are added until the next number.
func newAt(n int) int { return min(grownNew, 2*n) }

// grown returns a plan that requests the reports of growthStored, in their order.
func (h *harness) grown(count int) plan { return h.ownReports("small", "grown", count, 32) }

// grownFolder returns the folder of the storage of growthStored.
func (h *harness) grownFolder() string { return filepath.Join(h.values, "grown") }

// startGrown starts a server with the storage of growthStored.
func (h *harness) startGrown(ctx context.Context) (*server, error) {
	return inFileSystem(h.grownFolder(), nodeOption).start(ctx, h)
}

// storeUntil stores reports until there are n, and counts them.
func (h *harness) storeUntil(ctx context.Context, stored, n int) error {
	s, err := h.startGrown(ctx)
	if err != nil {
		return err
	}
	err = h.fill(ctx, s, h.grown(n).from(stored, n-stored))
	s.process.stop()
	if err != nil {
		return err
	}
	found, err := countStored(h.grownFolder())
	if err == nil && found.documents != n {
		err = fmt.Errorf("%d of %d reports are stored", found.documents, n)
	}
	return err
}

// readsOf starts a server with n stored reports, and measures what takes none away and adds none.
func (h *harness) readsOf(ctx context.Context, stored storedNumber) (sample, error) {
	n := int(stored)
	s, err := h.startGrown(ctx)
	if err != nil {
		return nil, err
	}
	defer s.process.stop()
	asked := h.node.requests.Load()
	var all sample
	all.add("start, ms", millis(s.process.listening))
	if err := h.sampleFirst(ctx, s, n, &all); err != nil {
		return nil, err
	}
	heap, err := h.memoryUsed(ctx, module, s)
	if err != nil {
		return nil, err
	}
	all.add("heap after the start, MiB", inMiB(heap))
	err = errors.Join(h.sampleColdHits(ctx, s, n, &all), h.sampleLookups(ctx, s, n, &all))
	if err != nil {
		return nil, err
	}
	if n := h.node.requests.Load() - asked; n > 0 {
		return nil, fmt.Errorf("the node got %d requests for reports that are stored", n)
	}
	took, _, err := h.answer(ctx, "http://"+s.Admin+"/fsbroker/cache")
	if err != nil {
		return nil, err
	}
	all.add("GET /fsbroker/cache, ms", millis(took))
	if err := h.samplePurge(ctx, s, &all); err != nil {
		return nil, err
	}
	heap, err = h.memoryUsed(ctx, module, s)
	all.add("heap after the requests, MiB", inMiB(heap))
	return all, err
}

// sampleFirst requests a stored report of a server that has just started.
func (h *harness) sampleFirst(ctx context.Context, s *server, n int, into *sample) error {
	c, err := h.grown(n).shuffled().from(0, 1).runAll(ctx, s)
	into.add("first stored report, ms", millis(c.percentile(50)))
	return err
}

// sampleColdHits requests stored reports, each once, but not that of sampleFirst.
func (h *harness) sampleColdHits(ctx context.Context, s *server, n int, into *sample) error {
	count := min(grownHits, n-1)
	c, err := h.grown(n).shuffled().from(1, count).runAll(ctx, s)
	if err != nil {
		return err
	}
	into.add("stored reports/s", c.perSecond())
	into.add("p99 of a stored report, ms", millis(c.percentile(99)))
	into.add("CPU of a stored report, µs", micros(c.cpuPerReport()))
	return nil
}

// sampleLookups asks for reports by the digests of their files, one after the other.
func (h *harness) sampleLookups(ctx context.Context, s *server, n int, into *sample) error {
	p := h.grown(min(grownLookups, n))
	task := p.task
	p.callers, p.task = 1, func(i int) string { return task(n - 1 - i) }
	p.query = func(_ int, id string) query {
		return query{method: http.MethodGet, target: fmt.Sprintf("/task?sha256=%x", fileOf(id))}
	}
	c, err := p.runAll(ctx, s)
	into.add("by file digest, median, ms", millis(c.percentile(50)))
	return err
}

// samplePurge stores a report and purges it by its task.
func (h *harness) samplePurge(ctx context.Context, s *server, into *sample) error {
	p := h.ownReports("small", "purged", 1, 1)
	if err := h.fill(ctx, s, p); err != nil {
		return err
	}
	begin := time.Now()
	removed, answer, err := h.remove(ctx, s, nodeQuery("node-1", p.task(0)))
	into.add("purge of a task, ms", millis(time.Since(begin)))
	if err == nil && (answer != "" || removed.Memory != 1 || removed.Storage != 1 || removed.Next != nil) {
		err = fmt.Errorf("the purge of a task was answered with %q and %+v", answer, removed)
	}
	return err
}

// newOf starts a server with n stored reports, and stores others.
func (h *harness) newOf(ctx context.Context, stored storedNumber) (sample, error) {
	n := int(stored)
	s, err := h.startGrown(ctx)
	if err != nil {
		return nil, err
	}
	defer s.process.stop()
	count := newAt(n)
	begin, before := time.Now(), s.process.cpu()
	if err := h.fill(ctx, s, h.grown(n+count).from(n, count)); err != nil {
		return nil, err
	}
	elapsed, cpu := time.Since(begin), s.process.cpu()-before
	m, err := h.metrics(ctx, s)
	if err == nil && int(m[writesMetric]) != count {
		err = fmt.Errorf("%.0f of %d new reports were stored", m[writesMetric], count)
	}
	var all sample
	all.add("new reports stored/s", float64(count)/elapsed.Seconds())
	all.add("CPU of a new report, µs", micros(cpu)/float64(count))
	return all, err
}
