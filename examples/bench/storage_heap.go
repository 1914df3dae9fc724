package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// heapRun is the memory of a server through which many reports go, at one delay of the storage.
type heapRun struct {
	delay   time.Duration
	steps   []heapStep
	elapsed time.Duration
	written float64 // reports that were stored
	refused float64 // how often there was no room for one
}

// heapStep is the most memory while a tenth of the reports went through, in bytes.
type heapStep struct {
	reports        int // until then
	heap, resident int64
}

// perSecond returns how many reports went through.
func (r heapRun) perSecond() float64 {
	return float64(r.steps[len(r.steps)-1].reports) / r.elapsed.Seconds()
}

// storedPerSecond returns how many reports were stored.
func (r heapRun) storedPerSecond() float64 { return r.written / r.elapsed.Seconds() }

func (r heapRun) sample() sample {
	var most heapStep
	for _, s := range r.steps {
		most.heap, most.resident = max(most.heap, s.heap), max(most.resident, s.resident)
	}
	return sample{
		{"most heap, MiB", inMiB(most.heap)},
		{"most resident memory, MiB", inMiB(most.resident)},
		{"reports/s", r.perSecond()},
		{"stored/s", r.storedPerSecond()},
		{"no room for", r.refused},
	}
}

// smallReport is a finished report that is as short as possible.
const smallReport = `{"processTime":1,"result":{"finalVerdict":{"verdict":"BENIGN","threatLevel":0,"confidence":1},` +
	`"taskReference":{"name":"transform-file","additionalInfo":{"submitName":"file.png","submitTime":1723037247064,` +
	digest + `0000000000000000000000000000000000000000000000000000000000000000"}},` +
	`"ID":"37c43f9c-79c3-440e-9ac5-7279695d0c9a","state":"SUCCESS","opcount":1,"processTime":1},"subtaskReferences":[]}}`

// storageHeap measures the memory of a server while many small reports go through it. The storage keeps nothing,
// because it is a part of the server.
func (h *harness) storageHeap(ctx context.Context, _ []*contender, results *results) error {
	delays := h.options.delays
	trials, err := ofBoth(ctx, h, results, "storage heap", 1, slices.Compact([]time.Duration{delays[0], delays[len(delays)-1]}), (*harness).heapOf)
	for _, rounds := range trials {
		results.through = append(results.through, rounds[0])
	}
	return err
}

func (h *harness) heapOf(ctx context.Context, delay time.Duration) (heapRun, error) {
	s, err := withStorage(delay, "").start(ctx, h)
	if err != nil {
		return heapRun{}, err
	}
	defer s.process.stop()
	r := heapRun{delay: delay}
	step := h.options.through / 10
	for i := range 10 {
		progress.Printf("memory, %s, %d of %d reports", delay, i*step, h.options.through)
		m, took, err := h.stepOf(ctx, s, h.ownReports("small", fmt.Sprintf("through%d-", i), step, 32))
		if err != nil {
			return r, err
		}
		m.reports = (i + 1) * step
		r.steps, r.elapsed = append(r.steps, m), r.elapsed+took
	}
	m, err := h.metrics(ctx, s)
	r.written, r.refused = m[writesMetric], m[refusedMetric]
	return r, err
}

// stepOf makes the requests of a plan and looks at the memory of the server meanwhile.
func (h *harness) stepOf(ctx context.Context, s *server, p plan) (heapStep, time.Duration, error) {
	watching, done := context.WithCancel(ctx)
	defer done()
	var most heapStep
	watched := make(chan error, 1)
	go func() { watched <- h.watchMemory(watching, s, &most) }()
	c, err := p.runAll(ctx, s)
	done()
	return most, c.elapsed, errors.Join(err, <-watched)
}

// watchMemory keeps the most memory of a server in most until ctx ends. It looks at least once.
func (h *harness) watchMemory(ctx context.Context, s *server, most *heapStep) error {
	for {
		m, err := h.metrics(context.WithoutCancel(ctx), s)
		if err != nil {
			return err
		}
		most.heap = max(most.heap, int64(m[heapMetric]))
		most.resident = max(most.resident, s.process.memory("VmRSS"))
		if wait(ctx, 200*time.Millisecond) != nil {
			return nil //nolint:nilerr // it has looked for long enough
		}
	}
}

// printThrough prints the memory after each tenth of the reports.
func (r *results) printThrough(out io.Writer) {
	fmt.Fprint(out, "\n**The most memory while small reports go through, 32 conn., max_size 256 MiB, in MiB**\n\n| reports |")
	for _, run := range r.through {
		fmt.Fprintf(out, " heap at %s | resident |", inMillis(run.delay))
	}
	fmt.Fprint(out, "\n|--:|")
	for range r.through {
		fmt.Fprint(out, "--:|--:|")
	}
	for i := range r.through[0].steps {
		fmt.Fprintf(out, "\n| %d |", r.through[0].steps[i].reports)
		for _, run := range r.through {
			fmt.Fprintf(out, " %d | %d |", run.steps[i].heap>>20, run.steps[i].resident>>20)
		}
	}
	fmt.Fprint(out, "\n\n| an operation of the storage takes | reports/s | stored/s | no room for |\n|--:|--:|--:|--:|\n")
	for _, run := range r.through {
		fmt.Fprintf(out, "| %s | %.0f | %.0f | %.0f |\n", inMillis(run.delay), run.perSecond(), run.storedPerSecond(), run.refused)
	}
}
