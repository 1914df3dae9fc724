package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/url"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/redact"
)

// judge sets the problem of an exchange, if there is one. The timeout is 0 if the exchange had no time limit of its own. That
// the caller has left is no failure, whatever has failed at the same time.
func (u *Upstream) judge(ctx context.Context, timeout time.Duration, r *response, dial *dialTrace) {
	switch {
	case errors.Is(r.cause, problem.Left):
		r.problem = problem.Left
	case dial.isLocal():
		u.diagnoseLocal(r)
	default:
		u.diagnose(ctx, timeout, r)
	}
}

// diagnose sets the problem that the error of an exchange means.
func (u *Upstream) diagnose(ctx context.Context, timeout time.Duration, r *response) {
	if r.cause == nil {
		return
	}
	p, _ := errors.AsType[*problem.Problem](r.cause)
	// A TLS server answers a plain request with 400, or closes the connection.
	plainRefused := p == nil && r.status == 0 && !r.dialFailed && !isTimeout(r.cause) || p != nil && p.Kind == problem.RejectedRequest
	switch {
	case errors.Is(r.cause, guard.ErrPanic):
		r.problem = problem.Panicked
	case plainRefused && u.base.Scheme == "http" && !u.plain.Load() && u.probe.speaksTLS(ctx, u.Transport, u.base.Host, u.FailDuration):
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
func (u *Upstream) diagnoseLocal(r *response) {
	r.dialFailed = false
	r.problem = &problem.Problem{
		Kind: problem.Busy, RetryAfter: time.Second,
		Detail: "the server has no file descriptors, ports or memory left to ask an upstream" + problem.TryAgain,
	}
	u.WarnSometimes("no local resources are left to connect: raise the limit of open files", r.cause)
}

var errSpeaksTLS = errors.New("a TLS handshake was answered")

// maxStated bounds a text that an upstream states about itself in a log, in bytes.
const maxStated = 512

// redact returns a text that an upstream states about itself without the secret that it was sent.
func (u *Upstream) redact(text string) string {
	if secret := u.secret.Value; secret != "" { // before it is shortened, so that no part of a secret is left
		text = strings.NewReplacer(secret, redact.Placeholder, url.QueryEscape(secret), redact.Placeholder).Replace(text)
	}
	if len(text) > maxStated {
		text = text[:maxStated] + "…"
	}
	return text
}

// What an operator is told to do about a certificate.
const (
	hintUntrusted = "trust its certificate, or the authority that issued it, with transport http { tls_trust_pool file … }; if the name differs, set tls_server_name"
	hintExpired   = "the certificate has expired: have it renewed, and do not trust it, which does not help"
	hintEarly     = "the certificate is not valid yet: check the clocks of both machines, and do not trust it, which does not help"
)

// diagnoseDial returns the problem that a failure to connect means, with details for the log.
func (u *Upstream) diagnoseDial(err error) (*problem.Problem, []zap.Field) {
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
		return u.problem(problem.WrongScheme, "does not speak TLS, but its address says https: its operator must write http:// in its address, or switch on TLS on the "+u.Role.String()), nil
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
