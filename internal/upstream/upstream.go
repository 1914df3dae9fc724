// Package upstream asks the nodes and the broker: for reports, for what became of a submission, and for what they say about
// themselves. It also passes requests through to a broker. It knows whether an upstream is healthy. It does not know who the
// callers are, or what is kept.
package upstream

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Origin names an upstream.
type Origin struct {
	Role problem.Role
	Name string // a node's application server ID
}

// Config configures an Upstream.
type Config struct {
	Options
	Origin

	// Base is the URL that precedes the paths of the endpoints. It has a port.
	Base *url.URL

	// Secret is what the upstream requires.
	Secret Secret
}

// Options are what the upstreams of a site have in common.
type Options struct {
	// Transport sends the requests. It should have been given to WithPatientWrites.
	Transport http.RoundTripper

	// Budget is the memory for answers.
	Budget *budget.Budget

	// Timeout is the maximum duration of a request, including the body of the answer. Waiting in line does not count. It does
	// not apply to requests that are passed through.
	Timeout time.Duration

	// CheckTimeout is the maximum duration of a request for what an upstream says about itself.
	CheckTimeout time.Duration

	// MaxAnswer is the maximum size of an answer, inflated, in bytes.
	MaxAnswer int64

	// FailDuration is how long an upstream is not asked again after it could not be connected to.
	FailDuration time.Duration

	// Notify is called when the upstream becomes unhealthy or healthy. It gets the name of the event, and the code of the
	// failure that began or ended.
	Notify func(u *Upstream, event, reason string)

	Logger  *zap.Logger
	Metrics *Metrics
}

// Secret is the secret that an upstream requires, and where it takes it.
type Secret struct {
	Value    string   // empty if the upstream requires none
	InHeader bool     // in the header field "secret"
	Params   []string // in these query parameters
}

// Upstream is a node or the broker. Make one with New.
type Upstream struct {
	Origin
	Options
	base     *url.URL
	secret   *Secret // a pointer, so printing an upstream does not print its secret
	identity task.Key

	line     *semaphore.Weighted // bounds the requests in flight; first come, first served
	health   *health
	share    budget.Share // of the memory for answers
	plain    atomic.Bool  // it has answered plain HTTP, so it does not speak TLS
	probe    tlsProbe
	warnings limiter
	inFlight atomic.Int64
}

// maxInFlight bounds the requests to an upstream that are in flight. Others wait in line. Requests that are passed through do
// not count. There is one request for each report that callers ask for, so the line is fair among reports, however many callers
// one has.
const maxInFlight = 64

// New returns an upstream. It must be closed.
func New(c Config) *Upstream {
	c.Logger = c.Logger.With(zap.Stringer("role", c.Role), zap.String("address", c.Base.Host))
	if c.Name != "" {
		c.Logger = c.Logger.With(zap.String("node", c.Name))
	}
	u := &Upstream{
		Origin: c.Origin, Options: c.Options, base: c.Base, secret: &c.Secret, line: semaphore.NewWeighted(maxInFlight),
		identity: task.NewKey(c.Base.String(), c.Secret.Value, fmt.Sprint(c.Secret.InHeader, c.Secret.Params, c.Timeout, c.MaxAnswer)),
	}
	u.health = newHealth(c.Role, c.FailDuration, c.Logger, func(event, reason string) { c.Notify(u, event, reason) })
	return u
}

// Close ends what goes on by itself. Requests under way are still answered.
func (u *Upstream) Close() { u.health.close() }

// Host returns the host and the port of the upstream's address.
func (u *Upstream) Host() string { return u.base.Host }

// Identity returns a key that differs for upstreams that must not share an answer: with another address, secret or limits.
func (u *Upstream) Identity() task.Key { return u.identity }

// InFlight returns the number of requests to the upstream that are under way.
func (u *Upstream) InFlight() int64 { return u.inFlight.Load() }

// Status returns the state of the upstream and the failure that is the reason for it. A healthy upstream has its last failure,
// which is over, or nil.
func (u *Upstream) Status() (Status, *Failure) { return u.health.status(time.Now()) }

// Reserve returns a reservation of the memory for answers of this upstream. It must be released.
func (u *Upstream) Reserve() *budget.Reservation { return u.Budget.Reserve(&u.share) }

// WarnSometimes logs a warning about the upstream, unless there was one within FailDuration.
func (u *Upstream) WarnSometimes(message string, err error) {
	if u.warnings.due(u.FailDuration) {
		u.Logger.Warn(message, zap.Error(err))
	}
}

// Down returns a problem while the last failure to connect is recent, so callers fail fast. It returns nil if the upstream may
// be asked. If an operator must end the failure, the problem is that failure again, so that every caller reads how. Otherwise it
// is problem.Down.
func (u *Upstream) Down() *problem.Problem {
	left, cause := u.health.downFor(time.Now())
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

// Localize takes the upstream's own address out of a URL, so that a redirect leads to the site.
func (u *Upstream) Localize(location *url.URL) {
	if strings.EqualFold(location.Host, u.base.Host) {
		location.Scheme, location.Host, location.User = "", "", nil
	}
	if location.Host == "" && u.base.Path != "" {
		if path, ok := strings.CutPrefix(location.Path, u.base.Path+"/"); ok {
			location.Path, location.RawPath = "/"+path, ""
		}
	}
}

// minSecret is the length from which on a secret is recognized where it stands alone. A shorter one may be a part of any
// text.
const minSecret = 8

// HoldsSecret reports whether a text holds the secret that the upstream was sent.
func (u *Upstream) HoldsSecret(text string) bool {
	secret := u.secret.Value
	if len(secret) < minSecret {
		return false
	}
	decoded, _ := url.PathUnescape(text)
	return strings.Contains(text, secret) || strings.Contains(text, url.QueryEscape(secret)) || strings.Contains(decoded, secret)
}

// problem returns a problem of the upstream. Its detail begins with the upstream's role. If it may pass, callers may try again
// after FailDuration.
func (u *Upstream) problem(kind problem.Kind, detail string) *problem.Problem {
	p := &problem.Problem{Kind: kind, Role: u.Role, Detail: "the " + u.Role.String() + " " + detail}
	if kind == problem.BadAnswer || p.IsPassing() {
		p.RetryAfter = u.FailDuration
	}
	return p
}

// refusedSecret returns the problem of an upstream that answers 401 or 403.
func (u *Upstream) refusedSecret() *problem.Problem {
	return u.problem(problem.RefusedSecret, "refused the secret that is configured for it: its operator must correct secret or secret_in")
}

// rejectedRequest returns the problem of an upstream that answers 400.
func (u *Upstream) rejectedRequest() *problem.Problem {
	return u.problem(problem.RejectedRequest,
		"answered with the status 400: perhaps it refused the secret that is configured for it, or does not accept the IDs: check the IDs; its operator checks secret and secret_in")
}

// limiter limits how often something is done.
type limiter struct{ next atomic.Pointer[time.Time] }

// due reports whether it is time, at most once in an interval.
func (l *limiter) due(interval time.Duration) bool {
	now := time.Now()
	next, after := l.next.Load(), now.Add(interval)
	return (next == nil || !now.Before(*next)) && l.next.CompareAndSwap(next, &after)
}
