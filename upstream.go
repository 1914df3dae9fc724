package fsbroker

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// upstream is a node or the broker.
type upstream struct {
	origin
	base   *url.URL
	secret *upstreamSecret // a pointer, so printing an upstream does not print its secret

	// identity differs for upstreams that must not share an answer: with another address, secret or limits.
	identity task.Key

	source task.Source // of a node's reports: it begins their keys

	upstreamOptions
	line     *semaphore.Weighted // bounds the requests in flight; first come, first served
	health   health
	share    budget.Share // of the memory for answers
	plain    atomic.Bool  // it has answered plain HTTP, so it does not speak TLS
	probe    tlsProbe
	warnings limiter // of local errors
	inFlight atomic.Int64
}

// maxInFlight bounds the requests to an upstream that are in flight. Others wait in line. There is one for each report that
// callers ask for, so the line is fair among reports, however many callers one has.
const maxInFlight = 64

// upstreamOptions are the options that the upstreams of a handler have in common.
type upstreamOptions struct {
	transport http.RoundTripper
	budget    *budget.Budget // for the answers
	timeout   time.Duration  // of one request, including the body of the answer
	maxAnswer int64          // bytes
	logger    *zap.Logger
}

// upstreamSecret is the secret that an upstream requires, and where it takes it.
type upstreamSecret struct {
	value    string   // empty if the upstream requires none
	inHeader bool     // in the header field "secret"
	params   []string // in these query parameters
}

// problem returns a problem of the upstream. Its detail begins with the upstream's role. Callers may try again when the
// upstream is asked again after it could not be connected to, unless the problem says another time.
func (u *upstream) problem(kind problem.Kind, detail string) *problem.Problem {
	p := &problem.Problem{Kind: kind, Role: u.role, Detail: "the " + u.role.String() + " " + detail}
	if kind == problem.BadAnswer || p.IsPassing() {
		p.RetryAfter = u.health.failDuration
	}
	return p
}

// refusedSecret returns the problem of an upstream that answers 401 or 403.
func (u *upstream) refusedSecret() *problem.Problem {
	return u.problem(problem.RefusedSecret, "refused the secret that is configured for it: its operator must correct secret or secret_in")
}

// rejectedRequest returns the problem of an upstream that answers 400.
func (u *upstream) rejectedRequest() *problem.Problem {
	return u.problem(problem.RejectedRequest,
		"answered with the status 400: perhaps it refused the secret that is configured for it, or does not accept the IDs: check the IDs; its operator checks secret and secret_in")
}

// down returns a problem while the last dial failure is recent, so callers fail fast. It is that failure again if an operator
// must end it, so that every caller reads how, and 503 otherwise.
func (u *upstream) down(now time.Time) *problem.Problem {
	left, cause := u.health.downFor(now)
	if left == 0 {
		return nil
	}
	down := u.problem(problem.Down, "could not be connected to a moment ago"+problem.TryAgain)
	if cause != nil && (cause.Kind == problem.UntrustedCertificate || cause.Kind == problem.WrongScheme) {
		*down = *cause
		down.Earlier = true
	}
	down.RetryAfter = left
	return down
}

// bodyReader reads the body of an answer. It calls grow with the memory that it needs so far, in bytes, before it takes
// more. Its error says why the answer cannot be used.
type bodyReader func(body io.Reader, grow func(held int64) error) error

// fetch sends a request and reads the answer. It returns the status, which is 200, 204 or 404. ctx belongs to the fetch
// and not to a caller: the transport reads values from it, and the answer belongs to all callers that wait for it. An
// error that is not a *problem.Problem means that ctx has ended.
func (u *upstream) fetch(ctx context.Context, path string, params url.Values, source healthSource, read bodyReader) (status int, err error) {
	if err := u.line.Acquire(ctx, 1); err != nil {
		return 0, context.Cause(ctx)
	}
	defer u.line.Release(1)
	start := time.Now()
	if down := u.down(start); down != nil {
		return 0, down
	}
	u.inFlight.Add(1)
	defer u.inFlight.Add(-1)
	r, err := u.exchange(ctx, u.timeout, path, params, read)
	if err == nil {
		u.health.record(source, r)
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

// exchange sends a request, even to an upstream that is down. An error means that ctx has ended.
func (u *upstream) exchange(ctx context.Context, timeout time.Duration, path string, params url.Values, read bodyReader) (r response, err error) {
	start := time.Now()
	timed, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	timed, span := startSpan(timed, u.origin, u.base.Hostname(), path)
	defer func() { endSpan(span, r, err) }()

	var dial dialTrace
	body := &answerBody{upstream: u, reservation: u.budget.Reserve(&u.share)}
	defer body.reservation.Release()
	status, err := guard.Call(u.logger, func() (int, error) {
		return u.roundTrip(u.request(httptrace.WithClientTrace(timed, dial.trace()), path, params), body, read)
	})
	err = asProblem(err)
	if err != nil && ctx.Err() != nil {
		return response{}, context.Cause(ctx)
	}
	r = response{start: start, status: status, cause: err, dialFailed: dial.failed()}
	u.judge(ctx, timeout, &r, &dial)
	if ce := u.logger.Check(zap.DebugLevel, "fetched"); ce != nil {
		code := ""
		if r.problem != nil {
			code = r.problem.Code()
		}
		ce.Write(zap.String("path", path), zap.Int("status", status), zap.Int64("size", body.size),
			zap.Duration("duration", time.Since(start)), zap.String("problem", code))
	}
	return r, nil
}

// request returns a request to the upstream, with its secret.
func (u *upstream) request(ctx context.Context, path string, params url.Values) *http.Request {
	header := http.Header{"Accept": {"application/json"}, "User-Agent": {"caddy-fsbroker"}}
	if u.secret.value != "" {
		if u.secret.inHeader {
			header["secret"] = []string{u.secret.value} // spelled as it is documented
		}
		for _, name := range u.secret.params {
			params.Set(name, u.secret.value)
		}
	}
	injectSpan(ctx, header)
	target := *u.base
	target.Path += "/" + path
	target.RawQuery = params.Encode()
	req := &http.Request{Method: http.MethodGet, URL: &target, Header: header}
	return req.WithContext(upstreamContext(ctx))
}

// upstreamContext adds to ctx what Caddy's transport reads from the context of a request, where it would find a caller's.
func upstreamContext(ctx context.Context) context.Context {
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any))
	return context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
}

// roundTrip sends req and reads the answer. It uses the transport directly: an http.Client would follow redirects with
// the secret in the query, and would put the URL into its errors. The status is 0 if there is no response.
func (u *upstream) roundTrip(req *http.Request, body *answerBody, read bodyReader) (status int, err error) {
	resp, err := u.transport.RoundTrip(req)
	if isContextError(err) && req.Context().Err() == nil {
		// net/http may offer a connection to a request while it cancels the one before, and fails both with the reason of that.
		resp, err = u.transport.RoundTrip(req)
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
		p.RetryAfter = retryAfter(resp.Header, u.health.failDuration)
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
	if seconds, ok := parseSeconds(value); ok {
		return min(max(time.Duration(seconds)*time.Second, time.Second), maxRetryAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(time.Until(at), time.Second), maxRetryAfter)
	}
	return byDefault
}

// answerBody reads the body of an answer, within the upstream's limit, which counts inflated bytes. What is held of it is
// reserved: what the upstream states as the size does not count.
type answerBody struct {
	upstream    *upstream
	reservation *budget.Reservation
	body        io.Reader
	size        int64
	err         error // the first error of reading the body
}

// read reads the body of resp. An error of reading the body takes precedence over an error of read.
func (b *answerBody) read(resp *http.Response, read bodyReader) error {
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return b.upstream.problem(problem.BadAnswer, "sent a content encoding that it was not asked for: its operator must correct that")
	}
	if err := b.checkSize(resp.ContentLength); err != nil {
		return err
	}
	b.body = resp.Body
	if err := read(b, b.reservation.Grow); b.err == nil {
		return err
	}
	return b.err
}

// Read implements io.Reader.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	b.size += int64(n)
	if tooLarge := b.checkSize(b.size); tooLarge != nil {
		err = tooLarge
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// marker is a reader that remembers the first byte that is not white space.
type marker struct {
	io.Reader
	first byte
}

// Read implements io.Reader.
func (m *marker) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	if m.first == 0 {
		if text := bytes.TrimLeft(p[:n], " \t\r\n"); len(text) > 0 {
			m.first = text[0]
		}
	}
	return n, err
}

// isHTML reports whether what was read looks like HTML, or another kind of XML.
func (m *marker) isHTML() bool { return m.first == '<' }

// checkSize checks the size of the body so far, or the size that the upstream states.
func (b *answerBody) checkSize(size int64) error {
	if size > b.upstream.maxAnswer {
		return b.upstream.problem(problem.AnswerTooLarge,
			fmt.Sprintf("sent more than %d bytes: its operator may raise max_report", b.upstream.maxAnswer))
	}
	return nil
}

// drain reads a small unwanted body, so that the connection can be reused. It does not wait for a body that is late.
func drain(resp *http.Response) {
	const small, late = 4 << 10, 100 * time.Millisecond
	if resp.ContentLength == 0 || resp.ContentLength > small {
		return
	}
	timer := time.AfterFunc(late, func() { _ = resp.Body.Close() })
	defer timer.Stop()
	_, _ = io.CopyN(io.Discard, resp.Body, small)
}

// judge sets the problem of an exchange, if there is one. The timeout is 0 if it was not that of the upstream.
func (u *upstream) judge(ctx context.Context, timeout time.Duration, r *response, dial *dialTrace) {
	if dial.isLocal() {
		u.diagnoseLocal(r)
	} else {
		u.diagnose(ctx, timeout, r)
	}
}

// diagnose sets the problem that the error of an exchange means.
func (u *upstream) diagnose(ctx context.Context, timeout time.Duration, r *response) {
	if r.cause == nil {
		return
	}
	p, _ := errors.AsType[*problem.Problem](r.cause)
	// A TLS server answers a plain request with 400, or closes the connection.
	plainRefused := p == nil && r.status == 0 && !r.dialFailed && !isTimeout(r.cause) || p != nil && p.Kind == problem.RejectedRequest
	switch {
	case plainRefused && u.base.Scheme == "http" && u.speaksTLS(ctx):
		r.problem, r.dialFailed = u.problem(problem.WrongScheme, "speaks TLS, but its address says http: its operator must write https:// in its address"), true
		r.cause = errSpeaksTLS // the error may hold what the upstream sent
	case p != nil:
		r.problem = p
	case errors.Is(r.cause, budget.ErrNoRoom):
		r.problem = problem.NoRoom
	case r.dialFailed:
		r.problem, r.details = u.diagnoseDial(r.cause)
		r.cause = errors.New(u.redact(r.cause.Error())) // it may name what a certificate states
	case isTimeout(r.cause):
		within := "in time"
		if timeout > 0 {
			within = "within " + timeout.String()
		}
		r.problem = u.problem(problem.Timeout, "did not answer "+within+problem.TryAgain)
	default:
		r.problem = u.problem(problem.BadAnswer, describeBroken(*r)+problem.TryAgain)
	}
}

// describeBroken says how an answer breaks off. The error itself may hold what the upstream sent.
func describeBroken(r response) string {
	switch {
	case r.status != 0:
		return "did not finish its answer"
	case errors.Is(r.cause, io.EOF), errors.Is(r.cause, io.ErrUnexpectedEOF), errors.Is(r.cause, syscall.ECONNRESET), errors.Is(r.cause, syscall.EPIPE):
		return "closed the connection without an answer"
	}
	return "sent something that is not HTTP"
}

// diagnoseLocal sets the problem that an error of this machine means, and warns of it from time to time.
func (u *upstream) diagnoseLocal(r *response) {
	r.dialFailed = false
	r.problem = &problem.Problem{
		Kind: problem.Busy, RetryAfter: time.Second,
		Detail: "the server has no file descriptors, ports or memory left to ask an upstream" + problem.TryAgain,
	}
	if u.warnings.due(u.health.failDuration) {
		u.logger.Warn("no local resources are left to connect: raise the limit of open files", zap.Error(r.cause))
	}
}

var errSpeaksTLS = errors.New("a TLS handshake was answered")

// maxStated bounds a text that an upstream states about itself in a log, in bytes.
const maxStated = 512

// redact returns a text that an upstream states about itself without the secret that it was sent.
func (u *upstream) redact(text string) string {
	if len(text) > maxStated {
		text = text[:maxStated] + "…"
	}
	if u.secret.value == "" {
		return text
	}
	return strings.NewReplacer(u.secret.value, "REDACTED", url.QueryEscape(u.secret.value), "REDACTED").Replace(text)
}

// What an operator is told to do about a certificate.
const (
	hintUntrusted = "trust its certificate, or the authority that issued it, with transport http { tls_trust_pool file … }; if the name differs, set tls_server_name"
	hintExpired   = "the certificate has expired: have it renewed, and do not trust it, which does not help"
	hintEarly     = "the certificate is not valid yet: check the clocks of both machines, and do not trust it, which does not help"
)

// diagnoseDial returns the problem that a failure to connect means, with details for the log.
func (u *upstream) diagnoseDial(err error) (*problem.Problem, []zap.Field) {
	if untrusted, ok := errors.AsType[*tls.CertificateVerificationError](err); ok && len(untrusted.UnverifiedCertificates) > 0 {
		cert, hint := untrusted.UnverifiedCertificates[0], hintUntrusted
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			cert, hint = invalid.Cert, hintExpired
			if time.Now().Before(cert.NotBefore) {
				hint = hintEarly
			}
		}
		var names []string
		for _, name := range cert.DNSNames {
			names = append(names, u.redact(name))
		}
		for _, ip := range cert.IPAddresses {
			names = append(names, ip.String())
		}
		return u.problem(problem.UntrustedCertificate, "presented a certificate that is not trusted: its operator finds the cause in the log"), []zap.Field{
			zap.String("issuer", u.redact(cert.Issuer.String())),
			zap.String("subject", u.redact(cert.Subject.String())),
			zap.Strings("names", names),
			zap.String("not_after", cert.NotAfter.UTC().Format(time.RFC3339)), // the log's format of times may be a number
			zap.String("hint", hint),
		}
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return u.problem(problem.WrongScheme, "does not speak TLS, but its address says https: its operator must write http:// in its address, or switch on TLS on the "+u.role.String()), nil
	}
	if isTimeout(err) {
		return u.problem(problem.Timeout, "could not be connected to in time"+problem.TryAgain), nil
	}
	return u.problem(problem.Unreachable, "could not be connected to"+problem.TryAgain+"; its operator finds the cause in the log"), nil
}

// isTimeout reports whether err is a timeout.
func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || (errors.As(err, &timeout) && timeout.Timeout())
}

// dialTrace records whether a request got a connection. The transport's error does not say so if the time is up first, and
// hides the cause of a failure to connect.
type dialTrace struct {
	dialing, connected atomic.Bool
	err                atomic.Pointer[error] // of the last attempt to resolve a name or to connect
}

func (d *dialTrace) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn: func(string) { // once for every attempt
			d.dialing.Store(false)
			d.connected.Store(false)
		},
		DNSStart:     func(httptrace.DNSStartInfo) { d.dialing.Store(true) },
		DNSDone:      func(info httptrace.DNSDoneInfo) { d.err.Store(&info.Err) },
		ConnectStart: func(string, string) { d.dialing.Store(true) },
		ConnectDone:  func(_, _ string, err error) { d.err.Store(&err) },
		GotConn:      func(httptrace.GotConnInfo) { d.connected.Store(true) },
	}
}

// isLocal reports whether connecting has failed for lack of file descriptors, ports or memory of this machine, which says
// nothing about an upstream.
func (d *dialTrace) isLocal() bool {
	err := d.err.Load()
	if !d.failed() || err == nil {
		return false
	}
	for _, local := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(*err, local) {
			return true
		}
	}
	return false
}

// failed reports whether connecting was attempted, including name resolution and TLS, and failed.
func (d *dialTrace) failed() bool { return d.dialing.Load() && !d.connected.Load() }

// limiter limits how often something is done.
type limiter struct{ next atomic.Pointer[time.Time] }

// due reports whether it is time, at most once in an interval.
func (l *limiter) due(interval time.Duration) bool {
	now := time.Now()
	next, after := l.next.Load(), now.Add(interval)
	return (next == nil || !now.Before(*next)) && l.next.CompareAndSwap(next, &after)
}

// tlsProbe remembers whether an upstream speaks TLS.
type tlsProbe struct {
	mu     sync.Mutex // held during a probe
	until  time.Time  // until when the verdict counts
	speaks bool
}

// tlsProbeTimeout bounds the handshake by which an upstream is probed.
const tlsProbeTimeout = 2 * time.Second

// speaksTLS reports whether an upstream with an http address speaks TLS. Only a handshake can show that. It is tried at
// most once in failDuration, for all that want to know, and never with an upstream that has answered plain HTTP before.
func (u *upstream) speaksTLS(ctx context.Context) bool {
	if u.plain.Load() {
		return false
	}
	u.probe.mu.Lock()
	defer u.probe.mu.Unlock()
	if !time.Now().Before(u.probe.until) {
		u.probe.speaks = u.shakeHands(ctx)
		u.probe.until = time.Now().Add(u.health.failDuration)
	}
	return u.probe.speaks
}

// shakeHands reports whether the upstream answers a TLS handshake. It ends before a request is sent.
func (u *upstream) shakeHands(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, tlsProbeTimeout)
	defer cancel()
	var answered atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			answered.Store(answersHandshake(err))
			cancel()
		},
	})
	target := url.URL{Scheme: "https", Host: u.base.Host, Path: "/"}
	resp, err := u.transport.RoundTrip((&http.Request{Method: http.MethodHead, URL: &target, Header: make(http.Header)}).WithContext(upstreamContext(ctx)))
	if err == nil { // over a connection that was open already
		_ = resp.Body.Close()
	}
	return answered.Load() || answersHandshake(err)
}

// answersHandshake reports whether a TLS server has answered a handshake with that outcome.
func answersHandshake(err error) bool {
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	network, ok := errors.AsType[*net.OpError](err)
	alert := ok && network.Op == "remote error" // which is how crypto/tls reports an alert
	return err == nil || untrusted || alert
}
