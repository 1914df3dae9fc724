package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// bodyReader reads the body of an answer. It calls grow with the memory that it needs so far, in bytes, before it takes
// more. Its error says why the answer cannot be used.
type bodyReader func(body io.Reader, grow func(held int64) error) error

// fetch sends a request and reads the answer. It returns the status, which is 200, 204 or 404, or a problem. The problem is
// problem.Left if ctx has ended. ctx must not be that of one caller, because the answer belongs to all callers that wait for it.
func (u *Upstream) fetch(ctx context.Context, path string, params url.Values, source healthSource, read bodyReader) (int, *problem.Problem) {
	if err := u.line.Acquire(ctx, 1); err != nil {
		return 0, problem.Left
	}
	defer u.line.Release(1)
	if down := u.Down(); down != nil {
		return 0, down
	}
	u.inFlight.Add(1)
	defer u.inFlight.Add(-1)
	r := u.exchange(ctx, u.Timeout, path, params, read)
	u.health.record(source, r)
	u.Metrics.countTimed(u.Origin, outcome(r.status, r.problem), time.Since(r.start))
	return r.status, r.problem
}

// exchange sends a request, even to an upstream that is down.
func (u *Upstream) exchange(ctx context.Context, timeout time.Duration, path string, params url.Values, read bodyReader) (r response) {
	r.start = time.Now()
	timed, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	timed, span := startSpan(timed, u.Origin, u.base.Hostname(), path)
	defer func() { endSpan(span, r) }()

	var dial dialTrace
	body := &answerBody{upstream: u, reservation: u.Reserve()}
	defer body.reservation.Release()
	r.status, r.cause = guard.Call(u.Logger, func() (int, error) {
		return u.roundTrip(u.request(httptrace.WithClientTrace(timed, dial.trace()), path, params), body, read)
	})
	if r.cause != nil && ctx.Err() != nil {
		r.status, r.problem = 0, problem.Left // whatever has arrived of the answer
		return r
	}
	r.dialFailed = dial.failed()
	u.judge(ctx, timeout, &r, &dial)
	if ce := u.Logger.Check(zap.DebugLevel, "fetched"); ce != nil {
		code := ""
		if r.problem != nil {
			code = r.problem.Code()
		}
		ce.Write(zap.String("path", path), zap.Int("status", r.status), zap.Int64("size", body.size),
			zap.Duration("duration", time.Since(r.start)), zap.String("problem", code))
	}
	return r
}

// request returns a request to the upstream, with its secret.
func (u *Upstream) request(ctx context.Context, path string, params url.Values) *http.Request {
	header := http.Header{"Accept": {"application/json"}, "User-Agent": {"caddy-fsbroker"}}
	if u.secret.Value != "" {
		if u.secret.InHeader {
			header["secret"] = []string{u.secret.Value} // spelled as it is documented
		}
		for _, name := range u.secret.Params {
			params.Set(name, u.secret.Value)
		}
	}
	injectSpan(ctx, header)
	target := *u.base
	target.Path += "/" + path
	target.RawQuery = params.Encode()
	req := &http.Request{Method: http.MethodGet, URL: &target, Header: header}
	return req.WithContext(transportContext(ctx))
}

// roundTrip sends req and reads the answer. It uses the transport directly: an http.Client would follow redirects with
// the secret in the query, and would put the URL into its errors. The status is 0 if there is no response.
func (u *Upstream) roundTrip(req *http.Request, body *answerBody, read bodyReader) (status int, err error) {
	resp, err := u.Transport.RoundTrip(req)
	if isContextError(err) && req.Context().Err() == nil {
		// net/http may offer a connection to a request while it cancels the one before, and fails both with the reason of that.
		resp, err = u.Transport.RoundTrip(req)
	}
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if u.base.Scheme == "http" && resp.StatusCode != http.StatusBadRequest {
		u.plain.Store(true)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.StatusCode, body.read(resp, read)
	}
	drain(resp)
	switch resp.StatusCode {
	case http.StatusNoContent, http.StatusNotFound:
		return resp.StatusCode, nil
	case http.StatusGone:
		return http.StatusNotFound, nil
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		p := u.problem(problem.Overloaded, fmt.Sprintf("answered with the status %d: it is overloaded"+problem.TryAgain, resp.StatusCode))
		p.RetryAfter = retryAfter(resp.Header, u.FailDuration)
		return resp.StatusCode, p
	case http.StatusUnauthorized, http.StatusForbidden:
		return resp.StatusCode, u.refusedSecret()
	case http.StatusBadRequest:
		return resp.StatusCode, u.rejectedRequest()
	}
	return resp.StatusCode, u.problem(problem.BadAnswer,
		fmt.Sprintf("answered with the unexpected status %d"+problem.TryAgain, resp.StatusCode))
}

// isContextError reports whether err is the error of a context, and not only like one, as the timeout of a dial is.
func isContextError(err error) bool {
	return err == context.Canceled || err == context.DeadlineExceeded //nolint:errorlint // on purpose
}

// maxRetryAfter bounds the Retry-After that is passed on.
const maxRetryAfter = time.Hour

// retryAfter returns the Retry-After of an upstream, in either of its forms (RFC 9110, section 10.2.3), or else the
// default.
func retryAfter(header http.Header, byDefault time.Duration) time.Duration {
	value := header.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 32); err == nil || errors.Is(err, strconv.ErrRange) { // which yields the largest
		return min(max(time.Duration(seconds)*time.Second, time.Second), maxRetryAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(time.Until(at), time.Second), maxRetryAfter)
	}
	return byDefault
}
