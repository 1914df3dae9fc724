package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
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
}

// perSecond returns the reports per second.
func (c calls) perSecond() float64 { return float64(len(c.took)) / c.elapsed.Seconds() }

// percentile returns how long the p-th percent of the reports took at most. It is 0 if there was none.
func (c calls) percentile(p float64) time.Duration {
	if len(c.took) == 0 {
		return 0
	}
	return c.took[int(float64(len(c.took)-1)*p/100)]
}

// checkEvery is the distance of the responses that are compared with the report, which takes time.
const checkEvery = 100

// run makes the requests of the plan to s.
func (p plan) run(ctx context.Context, s *server) (calls, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		next  atomic.Int64
		wg    sync.WaitGroup
		parts = make([]calls, p.callers)
		begin = time.Now()
	)
	for i := range parts {
		wg.Go(func() {
			c := &caller{address: s.Plain}
			defer c.close()
			defer context.AfterFunc(ctx, c.close)()
			for n := int(next.Add(1)) - 1; n < p.count && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
				p.pace(ctx, begin, n)
				if err := p.request(ctx, c, n, &parts[i]); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return merge(parts, time.Since(begin)), context.Cause(ctx)
}

// runAll is run for requests that must not fail.
func (p plan) runAll(ctx context.Context, s *server) (calls, error) {
	c, err := p.run(ctx, s)
	if err == nil && c.failed > 0 {
		err = fmt.Errorf("%d requests failed: %s", c.failed, c.failure)
	}
	return c, err
}

// pace waits until it is time for the n-th request.
func (p plan) pace(ctx context.Context, begin time.Time, n int) {
	if p.rate > 0 {
		_ = wait(ctx, time.Until(begin.Add(time.Duration(n)*time.Second/time.Duration(p.rate))))
	}
}

// request makes the n-th request and records the response.
func (p plan) request(ctx context.Context, c *caller, n int, into *calls) error {
	id := p.task(n)
	begin := time.Now()
	r, err := c.get(ctx, "/task?appServerID=node-1&taskID="+id)
	if err != nil {
		return err
	}
	if r.status != http.StatusOK {
		into.failed++
		into.failure = fmt.Sprintf("status %d: %.200s", r.status, r.body)
		return nil
	}
	into.took = append(into.took, time.Since(begin))
	if n%checkEvery != 0 {
		return nil
	}
	return check(r.response, p.want(id))
}

// check checks that a response, compressed or not, is the report.
func check(r response, want []byte) error {
	body, err := r.body, error(nil)
	if r.header.Get("Content-Encoding") != "" {
		body, err = gunzip(r)
	}
	if err == nil && !bytes.Equal(body, want) {
		err = errors.New("the response is not the report")
	}
	return err
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

// caller is a connection for requests, one after the other. It takes less CPU time than an http.Client.
type caller struct {
	address string

	mu   sync.Mutex // guards conn
	conn net.Conn
	in   *bufio.Reader
}

// reply is a response with its status.
type reply struct {
	status int
	response
}

// get requests a path.
func (c *caller) get(ctx context.Context, path string) (reply, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return reply{}, err
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nAccept-Encoding: gzip\r\n\r\n", path, c.address, secret)
	if err != nil {
		return reply{}, err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.Close {
		c.close()
	}
	return reply{resp.StatusCode, response{resp.Header, body}}, err
}

// connect returns the connection, with time left for a request.
func (c *caller) connect(ctx context.Context) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.address)
		if err != nil {
			return nil, err
		}
		c.conn, c.in = conn, bufio.NewReader(conn)
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
