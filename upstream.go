package fsbroker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// The roles of upstreams, in codes, details and logs.
const (
	roleNode   = "node"
	roleBroker = "broker"
)

// upstream is a node or the broker.
type upstream struct {
	role    string // roleNode or roleBroker
	name    string // a node's application server ID
	base    *url.URL
	address string      // base as a string, for keys
	secret  *url.Values // a pointer, so printing an upstream does not print its secret

	// identity differs for upstreams that must not share an answer: with another address, secret or limits.
	identity task.Key

	upstreamOptions
	health   health
	inFlight atomic.Int64
}

// upstreamOptions are the options that the upstreams of a handler have in common.
type upstreamOptions struct {
	transport http.RoundTripper
	timeout   time.Duration // of one request, including the body of the answer
	maxAnswer int64         // bytes
	logger    *zap.Logger
}

// problem returns a problem of the upstream. Its detail begins with the upstream's role.
func (u *upstream) problem(kind problemKind, detail string) *problem {
	return &problem{kind: kind, role: u.role, detail: "the " + u.role + " " + detail}
}

// down returns a 503 problem while the last dial failure is recent, so callers fail fast.
func (u *upstream) down(now time.Time) *problem {
	left := u.health.downFor(now)
	if left == 0 {
		return nil
	}
	down := u.problem(problemDown, "could not be connected to a moment ago: try again after Retry-After")
	down.retryAfter = left
	return down
}

// bodyReader reads the body of an answer. Its error says why the answer cannot be used.
type bodyReader func(body io.Reader) error

// fetch sends a request and reads the answer. It returns the status, which is 200, 204 or 404. ctx belongs to the fetch
// and not to a caller: the transport reads values from it, and the answer belongs to all callers that wait for it. An
// error that is not a *problem means that ctx has ended.
func (u *upstream) fetch(ctx context.Context, path string, params url.Values, budget *reservation, read bodyReader) (status int, err error) {
	start := time.Now()
	if down := u.down(start); down != nil {
		return 0, down
	}
	u.inFlight.Add(1)
	defer u.inFlight.Add(-1)
	r, err := u.exchange(ctx, u.timeout, path, params, budget, read)
	if err == nil {
		u.health.record(sourceRequest, r)
		if r.problem != nil {
			err = r.problem
		}
	}
	countFetch(u.role, u.name, fetchOutcome(r.status, err), time.Since(start))
	if err != nil {
		return 0, err
	}
	return r.status, nil
}

// fetchOutcome returns the outcome of a fetch, for metrics.
func fetchOutcome(status int, err error) string {
	if p, ok := errors.AsType[*problem](err); ok {
		return p.reason()
	}
	switch {
	case err != nil:
		return "abandoned"
	case status == http.StatusNoContent:
		return "nothing_yet"
	case status == http.StatusNotFound:
		return "unknown"
	}
	return "answered"
}

// exchange sends a request, even to an upstream that is down. An error means that ctx has ended.
func (u *upstream) exchange(ctx context.Context, timeout time.Duration, path string, params url.Values, budget *reservation, read bodyReader) (response, error) {
	start := time.Now()
	timed, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var dial dialTrace
	body := &answerBody{upstream: u, budget: budget}
	status, err := u.roundTrip(u.request(httptrace.WithClientTrace(timed, dial.trace()), path, params), body, read)
	if err != nil && ctx.Err() != nil {
		return response{}, context.Cause(ctx)
	}
	r := response{status: status, problem: u.diagnose(err, &dial), cause: err, dialFailed: dial.failed()}
	if ce := u.logger.Check(zap.DebugLevel, "fetched"); ce != nil {
		code := ""
		if r.problem != nil {
			code = r.problem.code()
		}
		ce.Write(zap.String("path", path), zap.Int("status", status), zap.Int64("size", body.size),
			zap.Duration("duration", time.Since(start)), zap.String("problem", code))
	}
	return r, nil
}

// request returns a request to the upstream, with its secret.
func (u *upstream) request(ctx context.Context, path string, params url.Values) *http.Request {
	maps.Copy(params, *u.secret)
	target := *u.base
	target.Path += "/" + path
	target.RawQuery = params.Encode()
	// Caddy's transport reads these two from the context, where it would find a caller's.
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any))
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	req := &http.Request{
		Method: http.MethodGet,
		URL:    &target,
		Header: http.Header{"Accept": {"application/json"}, "User-Agent": {"caddy-fsbroker"}},
	}
	return req.WithContext(ctx)
}

// diagnose returns the problem that an error of roundTrip means.
func (u *upstream) diagnose(err error, dial *dialTrace) *problem {
	if err == nil {
		return nil
	}
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	timeout, dialFailed := isTimeout(err), dial.failed()
	if dialFailed {
		u.health.recordDial(false)
	}
	switch {
	case dialFailed && timeout:
		return u.problem(problemTimeout, "could not be connected to in time: try again later")
	case dialFailed:
		return u.problem(problemUnreachable, "could not be connected to: try again later; its operator finds the cause in the log")
	case timeout:
		return u.problem(problemTimeout, "did not answer in time: try again later")
	}
	return u.problem(problemBadAnswer, "did not finish its answer: try again later")
}

// roundTrip sends req and reads the answer. It uses the transport directly: an http.Client would follow redirects with
// the secret in the query, and would put the URL into its errors.
func (u *upstream) roundTrip(req *http.Request, body *answerBody, read bodyReader) (status int, err error) {
	resp, err := u.transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	u.health.recordDial(true)
	if resp.StatusCode == http.StatusOK {
		return resp.StatusCode, body.read(resp, read)
	}
	drain(resp.Body)
	switch resp.StatusCode {
	case http.StatusNoContent, http.StatusNotFound:
		return resp.StatusCode, nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return resp.StatusCode, u.problem(problemRefusedSecret, "refused the secret that is configured for it: its operator must correct the secret")
	}
	return resp.StatusCode, u.problem(problemBadAnswer,
		fmt.Sprintf("answered with the unexpected status %d: try again later", resp.StatusCode))
}

// answerBody reads the body of an answer, within the upstream's limit, which counts inflated bytes, and within the read
// budget.
type answerBody struct {
	upstream *upstream
	budget   *reservation
	body     io.Reader
	size     int64
	err      error // the first error of reading the body
}

// read reads the body of resp. An error of reading the body takes precedence over an error of read.
func (b *answerBody) read(resp *http.Response, read bodyReader) error {
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return b.upstream.problem(problemBadAnswer, "sent a content encoding that it was not asked for: its operator must correct that")
	}
	if err := b.grow(resp.ContentLength); err != nil {
		return err
	}
	b.body = resp.Body
	if err := read(b); b.err == nil {
		return err
	}
	return b.err
}

// Read implements io.Reader.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	b.size += int64(n)
	if limit := b.grow(b.size); limit != nil {
		err = limit
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// grow makes room for size bytes in all.
func (b *answerBody) grow(size int64) error {
	if size > b.upstream.maxAnswer {
		return b.upstream.problem(problemAnswerTooLarge,
			fmt.Sprintf("sent more than %d bytes: its operator may raise max_report", b.upstream.maxAnswer))
	}
	if !b.budget.grow(size) {
		return &problem{
			kind: problemBusy, retryAfter: time.Second,
			detail: "the answers that are being read use up the memory for them: try again after Retry-After",
		}
	}
	return nil
}

// drain reads a part of an unwanted body, so that the connection can be reused.
func drain(body io.Reader) { _, _ = io.CopyN(io.Discard, body, 4<<10) }

// isTimeout reports whether err is a timeout.
func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || (errors.As(err, &timeout) && timeout.Timeout())
}

// dialTrace records whether a request got a connection. The transport's error does not say so if the time is up first.
type dialTrace struct{ dialing, connected atomic.Bool }

func (d *dialTrace) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn: func(string) { // once for every attempt
			d.dialing.Store(false)
			d.connected.Store(false)
		},
		DNSStart:     func(httptrace.DNSStartInfo) { d.dialing.Store(true) },
		ConnectStart: func(string, string) { d.dialing.Store(true) },
		GotConn:      func(httptrace.GotConnInfo) { d.connected.Store(true) },
	}
}

// failed reports whether connecting was attempted, including name resolution and TLS, and failed.
func (d *dialTrace) failed() bool { return d.dialing.Load() && !d.connected.Load() }
