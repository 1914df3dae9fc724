package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// h2load makes the requests of the load with h2load, and checks all responses. It returns those that are complete, and the
// number of all, to which those that were stopped at the end add the part that arrived. This matters for large reports, of
// which few are complete.
func (h *harness) h2load(ctx context.Context, l load, r request, got answer) (all calls, responses float64, err error) {
	if _, err := exec.LookPath("h2load"); err != nil {
		return calls{}, 0, fmt.Errorf("h2load is required: install it (apt-get install wrk nghttp2-client nginx varnish): %w", err)
	}
	log := filepath.Join(h.dir, "h2load.log")
	if err := os.RemoveAll(log); err != nil { // h2load appends
		return calls{}, 0, err
	}
	args := []string{
		"--duration", strconv.Itoa(h.options.seconds), "--clients", strconv.Itoa(l.conns),
		"--max-concurrent-streams", strconv.Itoa(l.streams), "--log-file", log,
		"--threads", strconv.Itoa(min(l.conns, max(1, runtime.NumCPU()-h.options.serverCPUs))),
		"--header", ":method: " + r.method,
	}
	if l.protocol == h1 {
		args = append(args, "--h1")
	}
	for name, values := range r.header() {
		args = append(args, "--header", name+": "+values[0])
	}
	out, err := exec.CommandContext(ctx, "h2load", append(args, r.url)...).CombinedOutput() //nolint:gosec // the URL is that of a server that this program runs
	all.elapsed = time.Duration(h.options.seconds) * time.Second
	if err == nil {
		all.took, err = readH2loadLog(log, l.kind.status())
	}
	if err == nil {
		responses, err = l.parseH2load(string(out), len(all.took), got)
	}
	if err != nil {
		err = fmt.Errorf("h2load: %w\n%s", err, out)
	}
	return all, responses, err
}

// readH2loadLog returns how long the requests in a log of h2load took, sorted. A line has the time, the status, and the
// microseconds of a request.
func readH2loadLog(name string, status int) ([]time.Duration, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var took []time.Duration
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), "\t")
		if len(fields) != 3 || fields[1] != strconv.Itoa(status) {
			return nil, fmt.Errorf("a response has no status %d: %q", status, lines.Text())
		}
		micros, err := strconv.Atoi(fields[2])
		if err != nil {
			return nil, err
		}
		took = append(took, time.Duration(micros)*time.Microsecond)
	}
	slices.Sort(took)
	return took, lines.Err()
}

// h2loadResult matches what h2load prints.
var h2loadResult = regexp.MustCompile(`(?s)\nApplication protocol: (\S+)\n.*` +
	`\nrequests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded, 0 failed, 0 errored, 0 timeout\n.*` +
	`\((\d+)\) data\n`)

// parseH2load returns the number of responses that h2load printed, with the parts of those that were stopped. It checks
// the protocol, that no request failed, and the length of the bodies.
func (l load) parseH2load(out string, complete int, got answer) (responses float64, err error) {
	found := h2loadResult.FindStringSubmatch(out)
	if found == nil {
		return 0, errors.New("it printed no result, or a request failed")
	}
	protocol := map[protocol]string{h1: "http/1.1", h2: "h2"}[l.protocol]
	if l.protocol == h2 && !l.tls {
		protocol = "h2c"
	}
	if found[1] != protocol {
		return 0, fmt.Errorf("the protocol is not %s", protocol)
	}
	done, _ := strconv.Atoi(found[2])
	succeeded, _ := strconv.Atoi(found[3])
	if done != complete || succeeded != complete {
		return 0, fmt.Errorf("its log has %d responses", complete)
	}
	bytes, _ := strconv.ParseFloat(found[4], 64)
	if l.kind != hit {
		if bytes != 0 {
			return 0, errors.New("there are bodies")
		}
		return float64(complete), nil
	}
	responses = bytes / float64(len(got.body))
	if math.Abs(responses-float64(complete)) > float64(l.conns*l.streams) {
		return 0, fmt.Errorf("the bodies do not have %d bytes", len(got.body))
	}
	return responses, nil
}
