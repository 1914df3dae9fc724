package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// maxPurge is how long a purge is repeated that does not delete everything.
const maxPurge = 2 * time.Minute

// purgeResult is how long it takes to purge everything.
type purgeResult struct {
	delay    time.Duration
	before   storedCount
	after    storedCount
	took     time.Duration
	requests int
	answer   string // the last one, if it was no success
}

// rate returns the values deleted per second.
func (r purgeResult) rate() float64 {
	return float64(r.before.values-r.after.values) / r.took.Seconds()
}

func (r purgeResult) sample() sample {
	return sample{{"values/s", r.rate()}, {"left", float64(r.after.values)}, {"requests", float64(r.requests)}}
}

// storagePurge measures how fast all stored reports are purged.
func (h *harness) storagePurge(ctx context.Context, _ []*contender, results *results) error {
	var err error
	results.purges, err = ofBoth(ctx, h, results, "storage purge", h.options.rounds, h.options.delays, (*harness).purgeOf)
	return err
}

// purgeOf purges a copy of a storage until nothing is left, or for maxPurge.
func (h *harness) purgeOf(ctx context.Context, delay time.Duration) (purgeResult, error) {
	folder, err := h.copyOfFilled(ctx, h.sizes[0])
	if err != nil {
		return purgeResult{}, err
	}
	defer os.RemoveAll(folder)
	s, err := withStorage(delay, folder).start(ctx, h)
	if err != nil {
		return purgeResult{}, err
	}
	defer s.process.stop()
	r := purgeResult{delay: delay}
	if r.before, err = countStored(folder); err != nil {
		return r, err
	}
	begin := time.Now()
	for next := new(int); next != nil && time.Since(begin) < maxPurge && err == nil; r.requests++ {
		next, r.answer, err = h.purge(ctx, s, *next)
	}
	r.took = time.Since(begin)
	found, countErr := countStored(folder)
	r.after = found
	return r, errors.Join(err, countErr)
}

// purge asks a server to purge everything, or to go on with that. It returns where to go on, or nil if all is done. If the
// request failed, answer is the status.
func (h *harness) purge(ctx context.Context, s *server, from int) (next *int, answer string, err error) {
	p, answer, err := h.remove(ctx, s, fmt.Sprintf("from=%d", from))
	if err != nil || answer == "" {
		return p.Next, "", err
	}
	return &from, answer, nil
}

// purged is what a purge has removed, and where to go on.
type purged struct {
	Memory, Storage int
	Next            *int
}

// remove asks a server to purge what a query says. If the request failed, answer is the status.
func (h *harness) remove(ctx context.Context, s *server, query string) (p purged, answer string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, "http://"+s.Admin+"/fsbroker/cache?"+query, nil)
	if err != nil {
		return p, "", err
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return p, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return p, "", err
	}
	if resp.StatusCode != http.StatusOK {
		progress.Printf("the purge was answered with status %d: %.200s", resp.StatusCode, body)
		return p, resp.Status, nil
	}
	return p, "", json.Unmarshal(body, &p)
}

// printPurges prints the medians of the rounds.
func (r *results) printPurges(out io.Writer) {
	fmt.Fprint(out, "\n**A purge of everything**\n\n"+
		"| an operation of the storage takes | values | left | time | values/s | requests | last answer |\n|--:|--:|--:|--:|--:|--:|---|\n")
	for _, rounds := range r.purges {
		last := rounds[len(rounds)-1]
		answer := last.answer
		if answer == "" {
			answer = "200 OK"
		}
		fmt.Fprintf(out, "| %s | %d | %d | %s | %.0f | %d | %s |\n", inMillis(last.delay), last.before.values,
			median(rounds, func(r purgeResult) int { return r.after.values }),
			inSeconds(median(rounds, func(r purgeResult) time.Duration { return r.took })),
			median(rounds, purgeResult.rate), median(rounds, func(r purgeResult) int { return r.requests }), answer)
	}
}
