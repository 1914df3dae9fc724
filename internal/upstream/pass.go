package upstream

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// detached ends with a context, but has none of its values. In the values, Caddy's transport would find what other handlers
// left for the caller. It would also pass on interim responses, with headers that may hold the secret.
type detached struct{ context.Context }

// Value implements context.Context.
func (detached) Value(any) any { return nil }

// Body is the body of a caller's request that is passed through. Its errors are problems of the caller.
type Body interface {
	io.ReadCloser

	// GiveUp ends all reads with a cause.
	GiveUp(cause error)

	// Refuse is called when the upstream has answered with an error, so it does not want the body. It keeps the rest from the
	// upstream.
	Refuse()

	// Late returns the problem of a body that did not arrive in time, or nil.
	Late() *problem.Problem
}

// Pass passes a caller's request through, whose body is nil if it has none. It adds the upstream's address and secret to a
// copy of the request. The caller gets every response as it is, except those that say that the upstream refuses its own secret,
// or speaks another protocol. The body of the response must be closed. The problem is problem.Left if the caller has left.
func (u *Upstream) Pass(req *http.Request, body Body) (*http.Response, *problem.Problem) {
	ctx := WithSpanOf(detached{req.Context()}, req.Context())
	ctx, span := startSpan(ctx, u.Origin, u.base.Hostname(), strings.TrimPrefix(req.URL.Path, "/"))
	u.inFlight.Add(1)
	a := &passedAnswer{upstream: u, span: span}
	a.outcome.start = time.Now()

	var dial dialTrace
	out := u.passedRequest(httptrace.WithClientTrace(ctx, dial.trace()), req)
	if body != nil {
		traced, stop := giveUpWithConnection(out.Context(), body)
		defer stop()
		out = out.WithContext(traced)
		out.Body = body // without the wrapper of reverse_proxy, which HTTP/2 reads and closes at the same time
	}
	resp, err := u.Transport.RoundTrip(out)
	a.outcome.cause, a.outcome.dialFailed = err, dial.failed()
	if err == nil {
		a.outcome.status = resp.StatusCode
		if body != nil && resp.StatusCode >= http.StatusBadRequest {
			body.Refuse()
		}
	} else if req.Context().Err() != nil {
		a.outcome.cause = leftOrLate(body)
	}
	u.judgePassed(ctx, &a.outcome, &dial)
	u.health.record(sourceOther, a.outcome)
	if p := a.outcome.problem; p != nil {
		if body != nil {
			_ = body.Close()
		}
		if resp != nil {
			drain(resp)
			_ = resp.Body.Close()
		}
		a.end()
		return nil, p
	}
	a.ReadCloser = resp.Body
	resp.Body = a
	return resp, nil
}

// leftOrLate returns why the context of a caller has ended: the caller has left, or its body did not arrive in time.
func leftOrLate(body Body) *problem.Problem {
	if body != nil {
		if late := body.Late(); late != nil {
			return late
		}
	}
	return problem.Left
}

// passedRequest returns a copy of a caller's request that goes to the broker, with its secret.
func (u *Upstream) passedRequest(ctx context.Context, req *http.Request) *http.Request {
	out := req.Clone(transportContext(ctx))
	out.URL.Scheme, out.URL.Host, out.URL.Path = u.base.Scheme, u.base.Host, u.base.Path+req.URL.Path
	out.Host, out.Trailer = "", nil
	injectSpan(ctx, out.Header)
	if u.secret.Value == "" {
		return out
	}
	if u.secret.InHeader {
		out.Header["secret"] = []string{u.secret.Value} // spelled as it is documented
	}
	for _, name := range u.secret.Params {
		if out.URL.RawQuery != "" {
			out.URL.RawQuery += "&"
		}
		out.URL.RawQuery += name + "=" + url.QueryEscape(u.secret.Value)
	}
	return out
}

// judgePassed sets the problem of an exchange for a caller, if there is one. Pass says which responses are problems.
func (u *Upstream) judgePassed(ctx context.Context, r *response, dial *dialTrace) {
	switch r.status {
	case 0:
	case http.StatusSwitchingProtocols:
		r.cause = u.problem(problem.BadAnswer, "switched to another protocol without being asked to: its operator must correct that")
	case http.StatusUnauthorized, http.StatusForbidden:
		r.cause = u.refusedSecret()
	case http.StatusBadRequest:
		r.cause = u.rejectedRequest() // perhaps by a TLS server
	default:
		u.plain.Store(u.base.Scheme == "http")
	}
	u.judge(ctx, 0, r, dial)
	if r.problem != nil && r.problem.Kind == problem.RejectedRequest {
		r.problem = nil
	}
}

// passedAnswer is the body of the broker's response. It counts the exchange when it is closed.
type passedAnswer struct {
	io.ReadCloser
	upstream *Upstream
	span     trace.Span
	outcome  response
	once     sync.Once
}

// ErrBroken is the error of reading a response that the broker did not finish. It does not repeat what the broker sent.
var ErrBroken = errors.New("the broker did not finish its response")

// Read implements io.Reader.
func (a *passedAnswer) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	switch {
	case err == nil, errors.Is(err, io.EOF):
	case errors.Is(err, context.Canceled):
		err = context.Canceled
	default:
		err = ErrBroken
	}
	return n, err
}

// Close implements io.Closer.
func (a *passedAnswer) Close() error {
	err := a.ReadCloser.Close()
	a.end()
	return err
}

// end counts the exchange, once.
func (a *passedAnswer) end() {
	a.once.Do(func() {
		a.upstream.inFlight.Add(-1)
		a.upstream.Metrics.count(a.upstream.Origin, outcome(a.outcome.status, a.outcome.problem))
		endSpan(a.span, a.outcome)
	})
}
