package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// plan is a number of requests, each for another report, that a number of callers make. Each caller has a connection of
// its own, and makes the next request when it has the response.
type plan struct {
	callers int
	count   int
	rate    int                    // requests per second of all callers together; 0: as many as they can make
	task    func(i int) string     // the ID of a request's task
	want    func(id string) []byte // the report of a task

	// query returns the n-th request, which is for that task.
	query func(n int, id string) query

	identity   bool // the callers do not accept gzip
	mayBePlain bool // a response need not be compressed although the callers accept gzip
	checkAll   bool // every response is compared with the report, not only some
}

// query is a request without its header and body.
type query struct {
	method string
	host   string // of the site; empty if it is the server's address
	target string // path and query
}

// from returns a plan that makes the requests of p from one on, and only some of them.
func (p plan) from(first, count int) plan {
	task, ask := p.task, p.query
	p.count, p.task = count, func(i int) string { return task(first + i) }
	p.query = func(n int, id string) query { return ask(first+n, id) }
	return p
}

// shuffled returns a plan that makes the requests of p in no order.
func (p plan) shuffled() plan {
	count, task := p.count, p.task
	p.task = func(i int) string { return task(i * 7919 % count) } // 7919 is a prime
	return p
}

// repeated returns a plan that makes the requests of p several times.
func (p plan) repeated(times int) plan {
	count, task := p.count, p.task
	p.count, p.task = count*times, func(i int) string { return task(i % count) }
	return p
}

// calls are the responses to the requests of a plan.
type calls struct {
	took    []time.Duration // for each report, sorted
	failed  int             // responses that were no report
	failure string          // one of these
	elapsed time.Duration
	cpu     time.Duration // CPU time of the server
}

// err returns an error if requests failed.
func (c calls) err() error {
	if c.failed == 0 {
		return nil
	}
	return fmt.Errorf("%d requests failed: %s", c.failed, c.failure)
}

// perSecond returns the reports per second.
func (c calls) perSecond() float64 { return float64(len(c.took)) / c.elapsed.Seconds() }

// cpuPerReport returns the CPU time of the server for each report.
func (c calls) cpuPerReport() time.Duration { return c.cpu / time.Duration(max(1, len(c.took))) }

// busy returns how many CPUs the server used. If it used less than it had, the callers or the storage were slower.
func (c calls) busy() float64 { return c.cpu.Seconds() / c.elapsed.Seconds() }

// percentile returns how long the p-th percent of the reports took at most. It is 0 if there was none.
func (c calls) percentile(p float64) time.Duration {
	if len(c.took) == 0 {
		return 0
	}
	return c.took[int(float64(len(c.took)-1)*p/100)]
}

// sample returns the quantities of calls that are made as fast as the server allows.
func (c calls) sample() sample {
	return sample{
		{"reports/s", c.perSecond()},
		{"p50, ms", millis(c.percentile(50))},
		{"p99, ms", millis(c.percentile(99))},
		{"CPU of a report, µs", micros(c.cpuPerReport())},
	}
}

// checkEvery is the distance of the responses that are compared with the report, which takes time.
const checkEvery = 100

// run makes the requests of the plan to s.
func (p plan) run(ctx context.Context, s *server) (calls, error) {
	all := newCallers(p.callers, s)
	defer all.close()
	return p.runWith(ctx, all)
}

// runAll is run for requests that must not fail.
func (p plan) runAll(ctx context.Context, s *server) (calls, error) {
	c, err := p.run(ctx, s)
	return c, errors.Join(err, c.err())
}

// runWith makes the requests of the plan. A caller that has its response makes the next one.
func (p plan) runWith(ctx context.Context, all callers) (calls, error) {
	var next atomic.Int64
	begin := time.Now()
	return all.each(ctx, func(ctx context.Context, _ int, c *caller, into *calls) error {
		for n := int(next.Add(1)) - 1; n < p.count && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
			p.pace(ctx, begin, n)
			if err := p.request(ctx, c, n, into); err != nil {
				return err
			}
		}
		return nil
	})
}

// poll makes each caller request a report of its own again and again for some time.
func (p plan) poll(ctx context.Context, all callers, lasts time.Duration) (calls, error) {
	task := p.task
	p.task = func(i int) string { return task(i % len(all)) }
	begin := time.Now()
	return all.each(ctx, func(ctx context.Context, i int, c *caller, into *calls) error {
		for n := i; max(p.due(n), time.Since(begin)) < lasts && ctx.Err() == nil; n += len(all) {
			p.pace(ctx, begin, n)
			if err := p.request(ctx, c, n, into); err != nil {
				return err
			}
		}
		return nil
	})
}

// due returns when it is time for the n-th request, from the beginning.
func (p plan) due(n int) time.Duration {
	if p.rate == 0 {
		return 0
	}
	return time.Duration(n) * time.Second / time.Duration(p.rate)
}

// pace waits until it is time for the n-th request.
func (p plan) pace(ctx context.Context, begin time.Time, n int) {
	if p.rate > 0 {
		_ = wait(ctx, time.Until(begin.Add(p.due(n))))
	}
}

// request makes the n-th request and records the response.
func (p plan) request(ctx context.Context, c *caller, n int, into *calls) error {
	id := p.task(n)
	begin := time.Now()
	r, err := c.send(ctx, p.query(n, id), !p.identity)
	if err != nil {
		return err
	}
	if r.status != http.StatusOK {
		into.failed++
		into.failure = fmt.Sprintf("status %d: %.200s", r.status, r.body)
		return nil
	}
	into.took = append(into.took, time.Since(begin))
	if n%checkEvery != 0 && !p.checkAll {
		return nil
	}
	return checkBody(r.encoding, r.body, p.want(id), !p.identity && (r.encoding != "" || !p.mayBePlain))
}

// merge combines what the callers recorded.
func merge(parts []calls, elapsed time.Duration) calls {
	all := calls{elapsed: elapsed}
	for _, c := range parts {
		all.took = append(all.took, c.took...)
		all.failed += c.failed
		if c.failure != "" {
			all.failure = c.failure
		}
	}
	slices.Sort(all.took)
	return all
}

// measuredCalls are calls, and what they cost others.
type measuredCalls struct {
	calls
	asked int // requests to the node
}

// measureCalls counts the requests to the node during the calls that run makes. None of them may fail.
func (h *harness) measureCalls(run func() (calls, error)) (measuredCalls, error) {
	asked := h.node.requests.Load()
	c, err := run()
	return measuredCalls{c, int(h.node.requests.Load() - asked)}, errors.Join(err, c.err())
}

// callers are connections to a server.
type callers []*caller

func newCallers(count int, s *server) callers {
	all := make(callers, count)
	for i := range all {
		all[i] = &caller{server: s}
	}
	return all
}

// close closes all connections.
func (all callers) close() {
	for _, c := range all {
		c.close()
	}
}

// each calls do for all callers at once, and merges what they record. An error ends all of them.
func (all callers) each(ctx context.Context, do func(ctx context.Context, i int, c *caller, into *calls) error) (calls, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	parts := make([]calls, len(all))
	process := all[0].server.process
	cpu, begin := process.cpu(), time.Now()
	for i, c := range all {
		wg.Go(func() {
			defer context.AfterFunc(ctx, c.close)()
			if err := do(ctx, i, c, &parts[i]); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	merged := merge(parts, time.Since(begin))
	merged.cpu = process.cpu() - cpu
	return merged, context.Cause(ctx)
}

// caller is a connection for requests, one after the other. It takes far less CPU time than an http.Client, so that the
// server is what is measured.
type caller struct {
	server *server
	out    []byte
	body   bytes.Buffer

	mu   sync.Mutex // guards conn
	conn net.Conn
	in   *bufio.Reader
}

// reply is a response to a caller.
type reply struct {
	status   int
	encoding string
	length   int64  // as the response says it; -1 if it does not
	body     []byte // valid until the next request
}

// checkBody checks that a body is the report, and is compressed if it must be.
func checkBody(encoding string, body, want []byte, gzipped bool) (err error) {
	switch {
	case gzipped:
		body, err = gunzip(encoding, body)
	case encoding != "":
		err = fmt.Errorf("the response has Content-Encoding %q, which was not accepted", encoding)
	}
	if err == nil && !bytes.Equal(body, want) {
		err = fmt.Errorf("the response of %d bytes is not the report", len(body))
	}
	return err
}

// send makes a request without a body.
func (c *caller) send(ctx context.Context, q query, gzipped bool) (reply, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return reply{}, err
	}
	var more string
	if gzipped {
		more = "Accept-Encoding: gzip\r\n"
	}
	if q.method != http.MethodGet {
		more += "Content-Length: 0\r\n"
	}
	c.out = fmt.Appendf(c.out[:0], "%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n%s\r\n",
		q.method, q.target, cmp.Or(q.host, c.server.Plain), secret, more)
	if _, err := conn.Write(c.out); err != nil {
		return reply{}, err
	}
	return c.read()
}

// read reads a response, which must have a Content-Length or be chunked. The servers write the names of header fields in
// their canonical form.
func (c *caller) read() (reply, error) {
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return reply{}, err
	}
	r := reply{length: -1}
	_, status, _ := bytes.Cut(line, []byte(" "))
	status, _, _ = bytes.Cut(bytes.TrimSpace(status), []byte(" "))
	if r.status, err = strconv.Atoi(string(status)); err != nil {
		return reply{}, fmt.Errorf("the response begins with %q", line)
	}
	chunked, closing := false, false
	for {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return reply{}, err
		}
		name, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte(": "))
		if !ok {
			break
		}
		switch string(name) {
		case "Content-Length":
			if r.length, err = strconv.ParseInt(string(value), 10, 64); err != nil {
				return reply{}, fmt.Errorf("the Content-Length is %q", value)
			}
		case "Content-Encoding":
			r.encoding = string(value)
		case "Transfer-Encoding":
			chunked = string(value) == "chunked"
		case "Connection":
			closing = string(value) == "close"
		}
	}
	c.body.Reset()
	switch {
	case chunked:
		if _, err = c.body.ReadFrom(httputil.NewChunkedReader(c.in)); err == nil {
			_, err = c.in.Discard(len("\r\n"))
		}
	case r.length < 0:
		err = errors.New("the response has no length")
	default:
		_, err = io.CopyN(&c.body, c.in, r.length)
	}
	if closing {
		c.close()
	}
	r.body = c.body.Bytes()
	return r, err
}

// connect returns the connection, with time left for a request.
func (c *caller) connect(ctx context.Context) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.server.Plain)
		if err != nil {
			return nil, err
		}
		c.conn, c.in = conn, bufio.NewReaderSize(conn, 64<<10)
	}
	return c.conn, c.conn.SetDeadline(time.Now().Add(time.Minute))
}

// close closes the connection. The next request makes another one.
func (c *caller) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}
