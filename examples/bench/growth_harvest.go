package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const pendingMetric = "caddy_fsbroker_harvest_pending"

// growthHarvest measures servers that follow few and many submissions, none of which is ever finished.
func (h *harness) growthHarvest(ctx context.Context, _ []*contender, results *results) error {
	return h.grow(ctx, results, "Growth: pending submissions, storage file_system", powers(h.options.pending, 4),
		variant{"harvest", (*harness).pendingOf})
}

// submissions returns a plan that submits files. It is answered with submissions that are never finished.
func submissions(count int) plan {
	return plan{
		callers: 32, count: count, want: acceptance, identity: true,
		task: func(i int) string { return pending + "-" + strconv.Itoa(i) },
		query: func(_ int, id string) query {
			return query{method: http.MethodPost, target: "/submit?submitName=" + id}
		},
	}
}

// pendingOf starts a server, submits n files and measures what it costs to follow them. Then it restarts the server.
func (h *harness) pendingOf(ctx context.Context, n int) (all sample, err error) {
	folder, err := os.MkdirTemp(h.values, "harvest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(folder)
	c := inFileSystem(filepath.Join(folder, "storage"), "broker {{.Node}} {\nproxy\n}\nharvest")
	s, err := c.start(ctx, h)
	if err != nil {
		return nil, err
	}
	defer func() { s.process.stop() }()
	before, err := h.memoryUsed(ctx, c, s)
	if err != nil {
		return nil, err
	}
	if err := h.sampleSubmissions(ctx, s, n, &all); err != nil {
		return nil, err
	}
	if err := h.sampleQuestions(ctx, s, &all); err != nil {
		return nil, err
	}
	after, err := h.memoryUsed(ctx, c, s)
	if err != nil {
		return nil, err
	}
	all.add("heap, MiB", inMiB(after))
	all.add("heap per submission, KiB", float64(after-before)/(1<<10)/float64(n))
	if err := errors.Join(all.addScrape(ctx, h, s), h.sampleList(ctx, s, n, &all)); err != nil {
		return nil, err
	}
	if err := s.restart(ctx); err != nil {
		return nil, err
	}
	err = h.waitUntilPending(ctx, s, n)
	all.add("after a restart, until all are followed, ms", millis(time.Since(s.process.began)))
	return all, err
}

// sampleSubmissions submits files, all of which must then be followed.
func (h *harness) sampleSubmissions(ctx context.Context, s *server, n int, into *sample) error {
	c, err := submissions(n).runAll(ctx, s)
	if err != nil {
		return err
	}
	into.add("submissions/s", c.perSecond())
	into.add("p99 of a submission, ms", millis(c.percentile(99)))
	into.add("CPU of a submission, µs", cpuOfEach(c.cpu, float64(n)))
	m, err := h.metrics(ctx, s)
	if err != nil {
		return err
	}
	if int(m[pendingMetric]) != n {
		return fmt.Errorf("%.0f of %d submissions are followed", m[pendingMetric], n)
	}
	_, err = reportsOf(submissions(1)).runAll(ctx, s)
	return err
}

// reportsOf returns a plan that requests the reports of submissions.
func reportsOf(p plan) plan {
	p.want = func(string) []byte { return []byte(pendingReport) }
	p.query = func(_ int, id string) query {
		return query{method: http.MethodGet, target: "/task?submitID=" + id}
	}
	return p
}

// sampleQuestions measures the requests to the broker. The server has had time before to ask for each submission less often.
func (h *harness) sampleQuestions(ctx context.Context, s *server, into *sample) error {
	if _, _, err := h.watch(ctx, s); err != nil {
		return err
	}
	asked := h.node.requests.Load()
	cpu, elapsed, err := h.watch(ctx, s)
	questions := float64(h.node.requests.Load() - asked)
	into.add("requests to the broker/s", questions/elapsed.Seconds())
	into.add("CPU meanwhile, ms/s", millis(cpu)/elapsed.Seconds())
	into.add("CPU per request to the broker, µs", cpuOfEach(cpu, questions))
	return err
}

// pendingSubmission is a submission in the list of those that are followed.
type pendingSubmission struct {
	Noted   bool
	Problem string `json:"last_problem"`
}

// sampleList asks for the list of what is pending. All must be noted, and no request for one may have failed.
func (h *harness) sampleList(ctx context.Context, s *server, n int, into *sample) error {
	took, r, err := h.answer(ctx, "http://"+s.Admin+"/fsbroker/harvest")
	if err != nil {
		return err
	}
	into.add("GET /fsbroker/harvest, ms", millis(took))
	var lists map[string][]pendingSubmission
	if err := json.Unmarshal(r.body, &lists); err != nil {
		return err
	}
	list := lists["default"]
	if len(list) != n {
		return fmt.Errorf("%d of %d submissions are in the list", len(list), n)
	}
	for _, p := range list {
		if !p.Noted || p.Problem != "" {
			return fmt.Errorf("a submission is noted: %v, and its last problem is %q", p.Noted, p.Problem)
		}
	}
	return nil
}

// waitUntilPending waits until a server follows n submissions.
func (h *harness) waitUntilPending(ctx context.Context, s *server, n int) error {
	for begin := time.Now(); time.Since(begin) < maxAdoption; {
		m, err := h.metrics(ctx, s)
		if err != nil || int(m[pendingMetric]) == n {
			return err
		}
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("after a restart, the server does not follow %d submissions within %s", n, maxAdoption)
}

// maxAdoption is how long a server may take to find what it has followed before.
const maxAdoption = 2 * time.Minute
