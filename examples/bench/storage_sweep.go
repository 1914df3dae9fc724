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

// maxSweep is the longest wait for a sweep. If the retention is a second, the sweep begins within a few seconds.
const maxSweep = 2 * time.Minute

// sweepResult is how long it takes to sweep a storage in which everything is older than the retention.
type sweepResult struct {
	delay  time.Duration
	before storedCount
	after  storedCount
	swept  int // values
	took   time.Duration
}

// perSecond returns the values swept per second.
func (r sweepResult) perSecond() float64 {
	if r.took == 0 {
		return 0
	}
	return float64(r.swept) / r.took.Seconds()
}

func (r sweepResult) sample() sample {
	return sample{{"values deleted/s", r.perSecond()}, {"left", float64(r.after.values)}}
}

// storageSweep measures how fast stored reports are deleted when their retention is over.
func (h *harness) storageSweep(ctx context.Context, _ []*contender, results *results) error {
	var err error
	results.sweeps, err = ofBoth(ctx, h, results, "storage sweep", h.options.rounds, h.options.delays, (*harness).sweepOf)
	return err
}

// sweepOf starts a server with a retention of a second on a copy of a storage, and waits until all is swept.
func (h *harness) sweepOf(ctx context.Context, delay time.Duration) (sweepResult, error) {
	folder, err := h.copyOfFilled(ctx, h.sizes[0])
	if err != nil {
		return sweepResult{}, err
	}
	defer os.RemoveAll(folder)
	r := sweepResult{delay: delay}
	if r.before, err = countStored(folder); err != nil {
		return r, err
	}
	s, err := withStorage(delay, folder, "retention 1s").start(ctx, h)
	if err != nil {
		return r, err
	}
	defer s.process.stop()
	if err := h.waitForSweep(ctx, s, &r); err != nil {
		return r, err
	}
	r.after, err = countStored(folder)
	return r, err
}

// copyOfFilled copies the storage that filled returns to a new folder. The copy does not say that another instance uses it:
// its retention would count.
func (h *harness) copyOfFilled(ctx context.Context, size size) (string, error) {
	folder, err := h.filled(ctx, size)
	if err != nil {
		return "", err
	}
	parent, err := os.MkdirTemp(h.values, "copy-")
	if err != nil {
		return "", err
	}
	other := filepath.Join(parent, "storage")
	return other, errors.Join(os.CopyFS(other, os.DirFS(folder)), os.RemoveAll(filepath.Join(other, "fsbroker_task", "default", "instances")))
}

// waitForSweep waits until all values are swept, or for maxSweep, and records how fast that was.
func (h *harness) waitForSweep(ctx context.Context, s *server, r *sweepResult) error {
	begin := time.Now()
	idle := begin // the last time when nothing had been swept
	for r.swept < r.before.values && time.Since(begin) < maxSweep {
		if err := wait(ctx, 20*time.Millisecond); err != nil {
			return err
		}
		m, err := h.metrics(ctx, s)
		if err != nil {
			return err
		}
		switch swept := int(m[sweptMetric]); {
		case swept == 0:
			idle = time.Now()
		case swept > r.swept:
			r.swept, r.took = swept, time.Since(idle)
		}
	}
	return nil
}

// printSweeps prints the medians of the rounds.
func (r *results) printSweeps(out io.Writer) {
	fmt.Fprint(out, "\n**A sweep of a storage in which everything is too old**\n\n"+
		"| an operation of the storage takes | values | left | values deleted/s |\n|--:|--:|--:|--:|\n")
	for _, rounds := range r.sweeps {
		fmt.Fprintf(out, "| %s | %d | %d | %.0f |\n", inMillis(rounds[0].delay), rounds[0].before.values,
			median(rounds, func(r sweepResult) int { return r.after.values }), median(rounds, sweepResult.perSecond))
	}
}
