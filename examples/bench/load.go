package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// load describes the load on a contender: a number of keep-alive connections, each of which requests the same report
// again as soon as it has the response.
type load struct {
	size  size
	gzip  bool
	tls   bool
	conns int

	// The loads of the parts protocols and http3 have these too. The others are hits over HTTP/1.1, measured with wrk.
	protocol protocol
	streams  int // requests at a time on each connection
	kind     kind
}

func (l load) String() string {
	protocol, form := "HTTP", "identity"
	switch {
	case l.protocol != "" && l.tls:
		protocol = string(l.protocol) + ", TLS"
	case l.protocol != "":
		protocol = string(l.protocol)
	case l.tls:
		protocol = "HTTPS"
	}
	if l.gzip {
		form = "gzip"
	}
	text := fmt.Sprintf("%s, %s, %s, %d conn.", protocol, form, l.size.name, l.conns)
	if l.streams > 1 {
		text += fmt.Sprintf(" of %d streams", l.streams)
	}
	if l.kind != hit {
		text += ", " + l.kind.String()
	}
	return text
}

// representation returns a name for the report's size and encoding.
func (l load) representation() string {
	if l.gzip {
		return l.size.id() + "-gzip"
	}
	return l.size.id() + "-identity"
}

// supportedBy reports whether c can serve l.
func (l load) supportedBy(c *contender) bool {
	return (!l.tls || !c.noTLS) && (c.maxLen == 0 || len(l.size.document) <= c.maxLen) && l.protocol.supportedBy(c, l.tls) && l.kind.supportedBy(c)
}

// url returns the URL to request from c.
func (l load) url(c *contender, s *server) string { return l.urlOf(c, s, l.size.id()) }

// urlOf returns the URL to request from c for a task.
func (l load) urlOf(c *contender, s *server, task string) string {
	if l.tls {
		return "https://" + s.Secure + c.target(l, task)
	}
	return "http://" + s.Plain + c.target(l, task)
}

// connections are the numbers of concurrent callers: one, and many.
var connections = []int{1, 32}

// allLoads returns all loads, those with the largest reports last.
func allLoads(sizes []size) []load {
	var all []load
	for _, size := range sizes {
		for _, tls := range []bool{false, true} {
			for _, gzip := range []bool{false, true} {
				for _, conns := range connections {
					all = append(all, load{size: size, gzip: gzip, tls: tls, conns: conns})
				}
			}
		}
	}
	return all
}

// measure is the result of one round of a load on a contender.
type measure struct {
	Requests float64 // per second
	P50, P99 time.Duration
	CPU      time.Duration // per 10,000 responses
	Wire     float64       // bytes per response, including the header, before TLS
}

func (m measure) sample() sample {
	return sample{
		{"requests/s", m.Requests},
		{"p50, ms", millis(m.P50)},
		{"p99, ms", millis(m.P99)},
		{"CPU of a response, µs", micros(m.CPU) / 10_000},
	}
}

// script makes wrk print its results as JSON.
const script = `
done = function(summary, latency)
	local e = summary.errors
	io.write(string.format('RESULT {"Requests":%d,"Micros":%d,"Bytes":%d,"P50":%f,"P99":%f,"Errors":%d}\n',
		summary.requests, summary.duration, summary.bytes, latency:percentile(50), latency:percentile(99),
		e.connect + e.read + e.write + e.status + e.timeout))
end
`

// run puts c under the load and measures it.
func (l load) run(ctx context.Context, h *harness, c *contender, s *server) (m measure, err error) {
	if l.protocol == "" {
		m, err = l.runWrk(ctx, h, c, s)
	} else {
		m, err = l.runProtocol(ctx, h, c, s)
	}
	if err != nil {
		return measure{}, fmt.Errorf("%s, %s: %w", c.name, l, err)
	}
	return m, nil
}

// runWrk is run for a load without a protocol.
func (l load) runWrk(ctx context.Context, h *harness, c *contender, s *server) (measure, error) {
	var header []string
	if l.gzip {
		header = append(header, "Accept-Encoding: gzip")
	}
	m, failed, err := h.wrk(ctx, s, l.conns, l.url(c, s), header...)
	if err == nil && failed > 0 {
		err = fmt.Errorf("%g of %g requests failed", failed, m.responses)
	}
	return m.measure, err
}

// wrkResult is what wrk measured.
type wrkResult struct {
	measure
	responses float64
}

// wrk requests a URL of s from a number of connections. A response with a status from 400 on counts as failed.
func (h *harness) wrk(ctx context.Context, s *server, conns int, url string, header ...string) (m wrkResult, failed float64, err error) {
	args := []string{
		"-s", h.script, "-d", strconv.Itoa(h.options.seconds) + "s",
		"-c", strconv.Itoa(conns), "-t", strconv.Itoa(min(conns, 2)), "--timeout", "20s",
	}
	for _, field := range header {
		args = append(args, "-H", field)
	}
	if _, err := exec.LookPath("wrk"); err != nil {
		return wrkResult{}, 0, fmt.Errorf("wrk is required: install it (apt-get install wrk nghttp2-client nginx varnish): %w", err)
	}
	before := s.process.cpu()
	out, err := exec.CommandContext(ctx, "wrk", append(args, url)...).CombinedOutput() //nolint:gosec // the URL is that of a server that this program runs
	cpu := s.process.cpu() - before
	_, text, ok := strings.Cut(string(out), "RESULT ")
	if err == nil && !ok {
		err = errors.New("it printed no result")
	}
	if err != nil {
		return wrkResult{}, 0, fmt.Errorf("wrk: %w\n%s", err, out)
	}
	var r struct{ Requests, Micros, Bytes, P50, P99, Errors float64 }
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return wrkResult{}, 0, fmt.Errorf("wrk printed %q: %w", text, err)
	}
	if r.Requests == 0 {
		return wrkResult{}, 0, errors.New("there was no response")
	}
	return wrkResult{measure: measure{
		Requests: r.Requests / r.Micros * 1e6,
		P50:      time.Duration(r.P50 * float64(time.Microsecond)),
		P99:      time.Duration(r.P99 * float64(time.Microsecond)),
		CPU:      time.Duration(float64(cpu) / r.Requests * 10_000),
		Wire:     r.Bytes / r.Requests,
	}, responses: r.Requests}, r.Errors, nil
}
