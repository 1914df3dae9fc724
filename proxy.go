package fsbroker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/redact"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// proxy passes requests for the broker's other endpoints through to it, by means of Caddy's reverse_proxy handler.
type proxy struct {
	broker    *upstream.Upstream
	follows   bool // what is submitted is followed
	reverse   *reverseproxy.Handler
	endpoints []proxiedEndpoint
	logger    *zap.Logger
}

// proxiedEndpoint is an endpoint with the matcher that decides whether a request is for it.
type proxiedEndpoint struct {
	*endpoint
	matcher caddyhttp.MatchPath
}

// loadReverseProxy loads what passes requests through to a broker. It returns nil if nothing is passed through.
func loadReverseProxy(ctx caddy.Context, b *Broker, broker *upstream.Upstream) (*reverseproxy.Handler, error) {
	if b == nil || len(b.Proxy) == 0 {
		return nil, nil
	}
	if err := checkProxy(b.Proxy); err != nil {
		return nil, err
	}
	// The transport of the proxy connects by itself. The address is for the logs and metrics of reverse_proxy.
	config := reverseproxy.Handler{Upstreams: reverseproxy.UpstreamPool{{Dial: broker.Host()}}}
	mod, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", caddyconfig.JSON(&config, nil))
	if err != nil {
		return nil, fmt.Errorf("loading reverse_proxy: %w", err)
	}
	return mod.(*reverseproxy.Handler), nil
}

// newProxy returns a proxy for paths of the broker of a site. It is nil if reverse is.
func newProxy(reverse *reverseproxy.Handler, rs *resolver, b *Broker) *proxy {
	if reverse == nil {
		return nil
	}
	p := &proxy{broker: rs.broker, follows: rs.follower != nil, reverse: reverse, logger: rs.logger}
	reverse.Transport = &proxyTransport{rs.broker, rs.follower}
	for _, path := range b.Proxy {
		p.endpoints = append(p.endpoints, proxiedEndpoint{
			&endpoint{path, proxiedMethods}, caddyhttp.MatchPath{strings.ToLower(path)},
		})
	}
	return p
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
	if p.follows && isSubmit(out) {
		out.Header.Del("Accept-Encoding") // the answer must be read
	}
	if body, ok := r.Body.(*callerBody); ok {
		call.body = body
	}
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
		_, found := redact.Line([]byte(value))
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
	client   string        // the name of the caller
	body     upstream.Body // nil if there is none
	returned bool          // a response was written, instead of aborted
	broken   atomic.Bool   // the broker did not finish its response
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

// proxyTransport is the transport of reverse_proxy. It sends a copy of the request, so that reverse_proxy never has the
// broker's address and secret. Its errors are problems, or context.Canceled if the caller has left.
type proxyTransport struct {
	broker   *upstream.Upstream
	follower *harvest.Follower // of what is submitted; nil if nothing is followed
}

// RoundTrip implements http.RoundTripper.
func (t *proxyTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	call, _ := req.Context().Value(proxiedCallKey{}).(*proxiedCall)
	resp, p := t.broker.Pass(req, call.body)
	switch {
	case p != nil && p.Kind == problem.CallerLeft:
		return nil, context.Canceled
	case p != nil:
		return nil, p
	}
	cleanResponse(t.broker, resp)
	resp.Body = &proxiedBody{resp.Body, t.broker, call, &resp.Trailer}
	if t.follower != nil && isSubmit(req) {
		learn(req.Context(), t.follower, t.broker, call.client, resp)
	}
	return resp, nil
}

// cleanResponse takes the broker's secret and address out of a response's header.
func cleanResponse(broker *upstream.Upstream, resp *http.Response) {
	resp.Status = strconv.Itoa(resp.StatusCode) + " " + http.StatusText(resp.StatusCode)
	cleanLocation(broker, resp.Header)
	dropFields(resp.Header, func(value string) bool { return holdsSecret(broker, value) })
	resp.Header.Set("X-Content-Type-Options", "nosniff")
	if resp.Header.Get("Cache-Control") == "" {
		resp.Header.Set("Cache-Control", "no-store") // the caller's secret may be in a field that caches do not know
	}
}

// cleanLocation takes the secret out of the query of a redirect, and the broker's own address, so that the redirect leads
// to this site.
func cleanLocation(broker *upstream.Upstream, header http.Header) {
	value := header.Get("Location")
	if value == "" {
		return
	}
	location, err := url.Parse(value)
	if err != nil {
		header.Del("Location")
		return
	}
	broker.Localize(location)
	_, location.RawQuery = cutSecrets(location.RawQuery)
	header.Set("Location", location.String())
}

// holdsSecret reports whether a field of a response's header holds the broker's secret, or a parameter for one.
func holdsSecret(broker *upstream.Upstream, value string) bool {
	_, found := redact.Line([]byte(value))
	return found || broker.HoldsSecret(value)
}

// proxiedBody is the body of the broker's response.
type proxiedBody struct {
	io.ReadCloser
	broker  *upstream.Upstream
	call    *proxiedCall
	trailer *http.Header
}

// Read implements io.Reader.
func (b *proxiedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch {
	case errors.Is(err, io.EOF):
		dropFields(*b.trailer, func(value string) bool { return holdsSecret(b.broker, value) })
	case errors.Is(err, upstream.ErrBroken):
		b.call.broken.Store(true)
	}
	return n, err
}

// Close implements io.Closer. The rest of the request is not needed any more. Over HTTP/2, Go's transport waits for it.
func (b *proxiedBody) Close() error {
	if b.call.body != nil {
		_ = b.call.body.Close()
	}
	return b.ReadCloser.Close()
}

// Interface guard
var _ http.RoundTripper = (*proxyTransport)(nil)
