package fsbroker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// proxy passes requests for the broker's other endpoints through to it, by means of Caddy's reverse_proxy handler.
type proxy struct {
	broker    *upstream
	reverse   *reverseproxy.Handler
	endpoints []proxiedEndpoint
	logger    *zap.Logger
}

// proxiedEndpoint is an endpoint with the matcher that decides whether a request is for it.
type proxiedEndpoint struct {
	*endpoint
	matcher caddyhttp.MatchPath
}

// newProxy returns a proxy for paths of the broker of a namespace.
func newProxy(ctx caddy.Context, rs *resolver, paths []string, logger *zap.Logger) (*proxy, error) {
	broker := rs.broker
	if err := checkProxy(paths); err != nil {
		return nil, err
	}
	// The transport below connects by itself. The address is for the logs and metrics of reverse_proxy.
	config := reverseproxy.Handler{Upstreams: reverseproxy.UpstreamPool{{Dial: broker.base.Host}}}
	mod, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", caddyconfig.JSON(&config, nil))
	if err != nil {
		return nil, fmt.Errorf("loading reverse_proxy: %w", err)
	}
	p := &proxy{broker: broker, reverse: mod.(*reverseproxy.Handler), logger: logger}
	p.reverse.Transport = &proxyTransport{broker, rs.follower}
	for _, path := range paths {
		p.endpoints = append(p.endpoints, proxiedEndpoint{
			&endpoint{path, proxiedMethods}, caddyhttp.MatchPath{strings.ToLower(path)},
		})
	}
	return p, nil
}

// match returns the endpoint that a request is for. A request that is for none that is passed through is for /task,
// whatever its path is: the handler's matcher decides that. p is nil if nothing is passed through.
func (p *proxy) match(r *http.Request) *endpoint {
	if p != nil {
		for _, e := range p.endpoints {
			if e.matcher.Match(r) {
				return e.endpoint
			}
		}
	}
	return taskEndpoint
}

// bypassStatus returns the field of RFC 9211 for a problem with a request that the cache is not for.
func bypassStatus(p *problem.Problem) string {
	if p.Requested() {
		return "fsbroker; fwd=bypass; detail=" + p.Code()
	}
	return "fsbroker; detail=" + p.Code()
}

// serve passes a request on, without the caller's secret and with the rest of its query. A problem means that there is no
// response yet.
func (p *proxy) serve(w caddyhttp.ResponseRecorder, r *http.Request, e *endpoint, rawQuery string, call *proxiedCall) *problem.Problem {
	out := r.WithContext(context.WithValue(r.Context(), proxiedCallKey{}, call))
	out.URL = &url.URL{Path: e.path, RawQuery: rawQuery}
	out.RequestURI = out.URL.RequestURI() // reverse_proxy logs it
	out.Header = withoutSecrets(r.Header)
	call.body, _ = r.Body.(*callerBody)
	err := p.reverse.ServeHTTP(w, out, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
	if err == nil || w.Status() != 0 {
		return nil
	}
	if problem, ok := errors.AsType[*problem.Problem](err); ok {
		return problem
	}
	p.logger.Error("reverse_proxy refused a request", zap.Error(err))
	return &problem.Problem{Kind: problem.Internal, Detail: "the request could not be passed on: its operator finds the cause in the log"}
}

// withoutSecrets returns a copy of a request's header without the fields that callers present a secret in, whatever
// secret they hold, and without those that repeat one in a URL, such as Referer. A response must not switch protocols:
// what goes through a tunnel has no endpoint.
func withoutSecrets(header http.Header) http.Header {
	header = header.Clone()
	header.Del("Authorization")
	header.Del("Upgrade")
	for _, name := range secretHeaders {
		header.Del(name)
	}
	dropFields(header, func(value string) bool {
		_, found := redact([]byte(value))
		return found
	})
	return header
}

// dropFields deletes the fields of a header that have a value for which unwanted returns true.
func dropFields(header http.Header, unwanted func(value string) bool) {
	for name, values := range header {
		if slices.ContainsFunc(values, unwanted) {
			delete(header, name)
		}
	}
}

// proxiedCall is a request that is passed to the broker.
type proxiedCall struct {
	client   string      // the name of the caller
	body     *callerBody // nil if there is none
	returned bool        // a response was written, instead of aborted
	broken   atomic.Bool // the broker did not finish its response
}

// proxiedCallKey is the context key of a proxiedCall.
type proxiedCallKey struct{}

// status returns the status that a response counts with. It may have been aborted after it began.
func (c *proxiedCall) status(written int, undelivered bool) int {
	switch {
	case c.broken.Load():
		return http.StatusBadGateway
	case !c.returned || undelivered:
		return problem.StatusCallerLeft
	}
	return written
}

// detached is the end of a context without its values. Caddy's transport would find there what other handlers left for
// the caller. It would also pass on interim responses, with headers that may hold the secret.
type detached struct{ context.Context }

// Value implements context.Context.
func (detached) Value(any) any { return nil }

// proxyTransport is the transport of reverse_proxy. It adds the broker's address and secret to a copy of the request, so
// that reverse_proxy never has them. Its errors are problems, or context.Canceled if the caller has left.
type proxyTransport struct {
	broker   *upstream
	follower *harvest.Follower // of what is submitted; nil if nothing is followed
}

// RoundTrip implements http.RoundTripper.
func (t *proxyTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	u, start := t.broker, time.Now()
	ctx := withSpanOf(detached{req.Context()}, req.Context())
	ctx, span := startSpan(ctx, u.origin, u.base.Hostname(), strings.TrimPrefix(req.URL.Path, "/"))
	u.inFlight.Add(1)
	call, _ := req.Context().Value(proxiedCallKey{}).(*proxiedCall)
	a := &proxiedAnswer{upstream: u, call: call, span: span}

	var dial dialTrace
	out := u.proxiedRequest(httptrace.WithClientTrace(ctx, dial.trace()), req)
	if call.body != nil {
		traced, stop := giveUpWithConnection(out.Context(), call.body)
		defer stop()
		out = out.WithContext(traced)
		out.Body = call.body // without the wrapper of reverse_proxy, which HTTP/2 reads and closes at the same time
	}
	learns := t.follower != nil && isSubmit(req)
	if learns {
		out.Header.Del("Accept-Encoding") // the answer must be read
	}
	resp, err := u.transport.RoundTrip(out)
	if err != nil && req.Context().Err() != nil {
		late := call.body.late()
		if late == nil {
			a.end(context.Canceled)
			return nil, context.Canceled
		}
		err = late
	}
	a.outcome = response{start: start, cause: err, dialFailed: dial.failed()}
	if err == nil {
		a.outcome.status = resp.StatusCode
		if call.body != nil && resp.StatusCode >= http.StatusBadRequest {
			call.body.refuse()
		}
	}
	u.judgeProxied(ctx, &a.outcome, &dial)
	u.health.record(sourceOther, a.outcome)
	if p := a.outcome.problem; p != nil {
		_ = call.body.Close()
		if resp != nil {
			drain(resp)
			_ = resp.Body.Close()
		}
		a.end(p)
		return nil, p
	}
	u.cleanResponse(resp)
	a.ReadCloser, a.trailer = resp.Body, &resp.Trailer
	resp.Body = a
	if learns {
		learn(req.Context(), t.follower, t.broker, call.client, resp)
	}
	return resp, nil
}

// proxiedRequest returns a copy of a caller's request that goes to the broker, with its secret.
func (u *upstream) proxiedRequest(ctx context.Context, req *http.Request) *http.Request {
	out := req.Clone(upstreamContext(ctx))
	out.URL.Scheme, out.URL.Host, out.URL.Path = u.base.Scheme, u.base.Host, u.base.Path+req.URL.Path
	out.Host, out.Trailer = "", nil
	injectSpan(ctx, out.Header)
	if u.secret.value == "" {
		return out
	}
	if u.secret.inHeader {
		out.Header["secret"] = []string{u.secret.value} // spelled as it is documented
	}
	for _, name := range u.secret.params {
		if out.URL.RawQuery != "" {
			out.URL.RawQuery += "&"
		}
		out.URL.RawQuery += name + "=" + url.QueryEscape(u.secret.value)
	}
	return out
}

// judgeProxied sets the problem of an exchange for a caller, if there is one. The caller gets every response as it is,
// except those that say that the broker refuses its own secret, or speaks another protocol.
func (u *upstream) judgeProxied(ctx context.Context, r *response, dial *dialTrace) {
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

// cleanResponse takes the broker's secret and address out of a response's header.
func (u *upstream) cleanResponse(resp *http.Response) {
	resp.Status = strconv.Itoa(resp.StatusCode) + " " + http.StatusText(resp.StatusCode)
	u.cleanLocation(resp.Header)
	dropFields(resp.Header, u.holdsSecret)
	resp.Header.Set("X-Content-Type-Options", "nosniff")
	if resp.Header.Get("Cache-Control") == "" {
		resp.Header.Set("Cache-Control", "no-store") // the caller's secret may be in a field that caches do not know
	}
}

// cleanLocation takes the secret out of the query of a redirect, and the broker's own address, so that the redirect leads
// to this site.
func (u *upstream) cleanLocation(header http.Header) {
	value := header.Get("Location")
	if value == "" {
		return
	}
	location, err := url.Parse(value)
	if err != nil {
		header.Del("Location")
		return
	}
	if strings.EqualFold(location.Host, u.base.Host) {
		location.Scheme, location.Host, location.User = "", "", nil
	}
	if location.Host == "" && u.base.Path != "" {
		if path, ok := strings.CutPrefix(location.Path, u.base.Path+"/"); ok {
			location.Path, location.RawPath = "/"+path, ""
		}
	}
	_, location.RawQuery = cutSecrets(location.RawQuery)
	header.Set("Location", location.String())
}

// minSecret is the length from which on a secret is recognized where it stands alone. A shorter one may be a part of any
// text.
const minSecret = 8

// holdsSecret reports whether a field of a response's header holds the secret, or a parameter for one.
func (u *upstream) holdsSecret(value string) bool {
	if _, found := redact([]byte(value)); found {
		return true
	}
	secret := u.secret.value
	if len(secret) < minSecret {
		return false
	}
	decoded, _ := url.PathUnescape(value)
	return strings.Contains(value, secret) || strings.Contains(value, url.QueryEscape(secret)) || strings.Contains(decoded, secret)
}

// proxiedAnswer is the body of the broker's response. Its errors do not repeat what the broker sent.
type proxiedAnswer struct {
	io.ReadCloser
	upstream *upstream
	call     *proxiedCall
	span     trace.Span
	outcome  response
	trailer  *http.Header
	once     sync.Once
}

var errBrokenAnswer = errors.New("the broker did not finish its response")

// Read implements io.Reader.
func (a *proxiedAnswer) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		dropFields(*a.trailer, a.upstream.holdsSecret)
	case errors.Is(err, context.Canceled):
		err = context.Canceled
	default:
		a.call.broken.Store(true)
		err = errBrokenAnswer
	}
	return n, err
}

// Close implements io.Closer. The rest of the request is not needed any more. Over HTTP/2, Go's transport waits for it.
func (a *proxiedAnswer) Close() error {
	_ = a.call.body.Close()
	err := a.ReadCloser.Close()
	a.end(nil)
	return err
}

// end counts the exchange, once.
func (a *proxiedAnswer) end(err error) {
	a.once.Do(func() {
		u := a.upstream
		u.inFlight.Add(-1)
		countProxied(u.role, u.name, fetchOutcome(a.outcome.status, err))
		endSpan(a.span, a.outcome, err)
	})
}

// Interface guards
var (
	_ http.RoundTripper = (*proxyTransport)(nil)
)
