package main

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// flood is a load of callers that request one cached report, with or without a valid secret.
type flood struct {
	name          string
	query         string // is added to that of the report
	authorization string
	status        int
}

func (f flood) String() string { return f.name }

// floods are the ways to have no valid secret, after the hits that they are compared with.
var floods = []flood{
	{"a valid secret: hits", "", "Bearer " + secret, http.StatusOK},
	{"a wrong Bearer token", "", "Bearer wrong-secret", http.StatusUnauthorized},
	{"no secret", "", "", http.StatusUnauthorized},
	{"a wrong secret in the query", "&secret=wrong-secret", "", http.StatusUnauthorized},
}

type floodResult struct {
	flood
	measure
	peak int64 // resident memory of the server, in bytes
}

func (r floodResult) sample() sample {
	return append(r.measure.sample(), quantity{"peak resident memory, MiB", inMiB(r.peak)})
}

// unauthorized measures what floods cost the module. The server is restarted for each of them.
func (h *harness) unauthorized(ctx context.Context, _ []*contender, results *results) error {
	rounds, err := ofBoth(ctx, h, results, "unauthorized", h.options.rounds, floods, (*harness).floodWith)
	if err != nil {
		return err
	}
	for i, f := range floods {
		results.floods = append(results.floods, floodResult{
			flood: f,
			measure: measure{
				Requests: median(rounds[i], func(r floodResult) float64 { return r.Requests }),
				P50:      median(rounds[i], func(r floodResult) time.Duration { return r.P50 }),
				P99:      median(rounds[i], func(r floodResult) time.Duration { return r.P99 }),
				CPU:      median(rounds[i], func(r floodResult) time.Duration { return r.CPU }),
				Wire:     median(rounds[i], func(r floodResult) float64 { return r.Wire }),
			},
			peak: median(rounds[i], func(r floodResult) int64 { return r.peak }),
		})
	}
	return nil
}

// floodWith starts a server that has a report of 41 KB in its cache, and puts it under one flood.
func (h *harness) floodWith(ctx context.Context, f flood) (floodResult, error) {
	s, err := module.start(ctx, h)
	if err != nil {
		return floodResult{}, err
	}
	defer s.process.stop()
	l := load{size: h.sizes[1], gzip: true, conns: 32}
	if err := h.check(ctx, l, module, s); err != nil { // from now on, it is cached
		return floodResult{}, err
	}
	url := "http://" + s.Plain + "/task?" + nodeQuery("node-1", l.size.id()) + f.query
	header := []string{"Accept-Encoding: gzip"}
	if f.authorization != "" {
		header = append(header, "Authorization: "+f.authorization)
	}
	m, failed, err := h.wrk(ctx, s, l.conns, url, header...)
	if err != nil {
		return floodResult{}, err
	}
	// wrk takes every status from 400 on for an error.
	if share := failed / m.responses; (f.status == http.StatusOK) != (share == 0) || f.status != http.StatusOK && share != 1 {
		return floodResult{}, fmt.Errorf("%g of %g responses were errors", failed, m.responses)
	}
	return floodResult{flood: f, measure: m.measure, peak: s.process.memory("VmHWM")}, nil
}
