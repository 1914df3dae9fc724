package upstream

import (
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// health is the state of an upstream, from checks and from requests. It does not know how the upstream is reached.
type health struct {
	role         problem.Role
	failDuration time.Duration
	logger       *zap.Logger
	notify       func(event, reason string) // reports a change to event handlers

	mu           sync.Mutex       // guards the fields below
	dialFailed   time.Time        // when the upstream last could not be connected to; zero since it could
	dialProblem  *problem.Problem // of that time
	answerFailed time.Time        // when a request last failed although it could be connected to
	inARow       int              // requests that failed since the last that succeeded; fail says which count
	accepted     bool             // the secret, since it was refused
	failures     [4]*Failure      // that make the upstream unhealthy, by healthSource
	last         *Failure         // the last failure of the upstream or of one of its answers

	warnings map[string]*warning // by the code of the failure
	begin    time.Time           // of the failures that are not over
	failed   int                 // how many they are
	settling *time.Timer         // ends them if no request fails meanwhile; nil before it is needed
}

// Failure is a failure of a node or a broker.
type Failure struct {
	Code  string    `json:"code"`
	Cause string    `json:"cause"` // never what the upstream sent
	At    time.Time `json:"at"`
}

// warning is what the log has about the failures with one code.
type warning struct {
	open   bool      // the log has them, and does not say yet that they are over
	logged time.Time // when it last had them
	failed int       // since then
}

const (
	// unhealthyAfter is how many requests must fail in a row, so that one bad report does not make an upstream unhealthy.
	unhealthyAfter = 3

	// repeatWarning is how often the log has a failure that lasts.
	repeatWarning = 10 * time.Minute
)

// healthSource is how a failure was found. A failure ends when the same source finds the upstream healthy again. So each source
// that can make an upstream unhealthy has a place in health.failures. If several have a failure, the first one is shown.
type healthSource int

const (
	sourceDial    healthSource = iota // any exchange
	sourceSecret                      // a request for a report, for which the secret is refused
	sourceRequest                     // a request for a report
	sourceCheck
	sourceOther // has no place: it does not make the upstream unhealthy, unless that cannot be connected to
)

// response is the outcome of an exchange with an upstream.
type response struct {
	start      time.Time
	status     int
	problem    *problem.Problem // nil if the answer can be used
	cause      error            // of the problem; it may hold what the upstream sent
	dialFailed bool
	details    []zap.Field // about the cause, for the log
}

// Status is the state of an upstream as an operator sees it.
type Status int

// The states of an upstream, from the best to the worst.
const (
	Healthy   Status = iota
	Degraded         // some answers fail
	Unhealthy        // still asked
	Down             // not asked for a while
)

// String returns the state as the admin API shows it.
func (s Status) String() string {
	return [...]string{"healthy", "degraded", "unhealthy", "down"}[s]
}

// Works reports whether the upstream is not known to fail as a whole.
func (s Status) Works() bool { return s < Unhealthy }

// newHealth returns the state of an upstream that has not been asked yet. It must be closed.
func newHealth(role problem.Role, failDuration time.Duration, logger *zap.Logger, notify func(event, reason string)) *health {
	return &health{role: role, failDuration: failDuration, logger: logger, notify: notify, warnings: make(map[string]*warning)}
}

// status returns the state of the upstream and the failure that is the reason for it. A healthy upstream has its last
// failure, which is over.
func (h *health) status(now time.Time) (Status, *Failure) {
	h.mu.Lock()
	defer h.mu.Unlock()
	current := h.current()
	switch {
	case h.downUntil().After(now):
		return Down, current
	case current != nil:
		return Unhealthy, current
	case h.failed > 0:
		return Degraded, h.last
	}
	return Healthy, h.last
}

// downFor returns how long the upstream is not asked because a recent dial has failed, and the problem of that dial.
func (h *health) downFor(now time.Time) (time.Duration, *problem.Problem) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return max(0, h.downUntil().Sub(now)), h.dialProblem
}

// downUntil returns until when the upstream is not asked. The caller holds the mutex.
func (h *health) downUntil() time.Time {
	if h.dialFailed.IsZero() {
		return time.Time{}
	}
	return h.dialFailed.Add(h.failDuration)
}

// current returns the failure that makes the upstream unhealthy, or nil if there is none. The caller holds the mutex.
func (h *health) current() *Failure {
	for _, f := range h.failures {
		if f != nil {
			return f
		}
	}
	return nil
}

// record records the outcome of an exchange, and logs and reports what it changes. If the caller has left, it says nothing about
// the upstream.
func (h *health) record(source healthSource, r response) {
	if r.problem != nil && r.problem.Kind == problem.CallerLeft {
		return
	}
	h.change(func(now time.Time) (log func()) {
		if f := h.update(source, r, now); f != nil {
			return h.warn(f, r, now)
		}
		if r.problem == nil {
			return h.settle(now)
		}
		return nil
	})
}

// change applies a change with the mutex held, and logs and reports it without: event handlers may take their time.
func (h *health) change(apply func(now time.Time) (log func())) {
	h.mu.Lock()
	before := h.current()
	log := apply(time.Now())
	after := h.current()
	h.mu.Unlock()
	if log != nil {
		log()
	}
	switch {
	case before == nil && after != nil:
		h.notify("fsbroker_node_unhealthy", after.Code)
	case before != nil && after == nil:
		h.notify("fsbroker_node_healthy", before.Code)
	}
}

// update records the outcome of an exchange, and returns the failure that it is, or nil. The caller holds the mutex.
func (h *health) update(source healthSource, r response, now time.Time) *Failure {
	switch {
	case r.dialFailed:
		source, h.dialFailed, h.dialProblem = sourceDial, now, r.problem
	case r.status != 0 && r.start.After(h.dialFailed): // it could be connected to since
		h.failures[sourceDial], h.dialFailed = nil, time.Time{}
	}
	if r.problem == nil {
		h.succeed(source, r.start)
		return nil
	}
	switch kind := r.problem.Kind; {
	case kind == problem.Busy, kind == problem.Internal, source == sourceOther && !r.problem.IsPassing():
		return nil
	}
	f := &Failure{Code: r.problem.Code(), Cause: r.causeText(), At: now}
	h.fail(source, r.problem.Kind, f)
	return f
}

// succeed ends what the source has found before. What requests have found ends in settle. A check sends the same secret as
// they do, so it shows as well that a secret is accepted that was refused before start. The caller holds the mutex.
func (h *health) succeed(source healthSource, start time.Time) {
	switch source {
	case sourceRequest:
		h.inARow = 0
	case sourceCheck:
		h.failures[sourceCheck] = nil
	default:
		return
	}
	if refused := h.failures[sourceSecret]; refused != nil && !start.Before(refused.At) {
		h.accepted = true
	}
}

// fail adds a failure. The caller holds the mutex.
func (h *health) fail(source healthSource, kind problem.Kind, f *Failure) {
	if h.failed == 0 {
		h.begin = f.At
	}
	h.failed++
	h.last = f
	if source == sourceDial || source == sourceCheck {
		h.failures[source] = f
		return
	}
	h.answerFailed = f.At
	h.stop()
	if source != sourceRequest {
		return
	}
	switch kind {
	case problem.RefusedSecret:
		h.failures[sourceSecret], h.accepted = f, false
		return
	case problem.AnswerTooLarge, problem.Overloaded: // which passes, or only this report is
	default:
		h.inARow++
	}
	if h.inARow >= unhealthyAfter {
		h.failures[sourceRequest] = f
	}
}

// warn returns what logs a failure, or nil if the log has its code already. A failure that makes the upstream unhealthy is
// logged when it begins. Apart from that, each code is logged once in repeatWarning at most, also if its failures come and go.
// The caller holds the mutex.
func (h *health) warn(f *Failure, r response, now time.Time) func() {
	w := h.warnings[f.Code]
	if w == nil {
		w = new(warning)
		h.warnings[f.Code] = w
	}
	w.failed++
	begins := !w.open && h.current() == f
	if !begins && now.Sub(w.logged) < repeatWarning {
		return nil
	}
	fields := []zap.Field{zap.String("code", f.Code), zap.String("cause", f.Cause), zap.Int("failures", w.failed)}
	if r.dialFailed {
		fields = append(append(fields, zap.Duration("fail_duration", h.failDuration)), r.details...)
	}
	*w = warning{open: true, logged: now}
	return func() { h.logger.Warn(h.role.String()+" fails", fields...) }
}

// settle ends the failures of requests once the last is failDuration ago and a request has succeeded since. So an upstream
// whose answers only sometimes fail does not change its state with each of them. The same holds for an upstream that refuses
// the secret of requests, but answers checks without one. It returns what logs that everything is over, or nil. The caller
// holds the mutex.
func (h *health) settle(now time.Time) func() {
	if h.failed == 0 {
		return nil
	}
	if wait := h.answerFailed.Add(h.failDuration).Sub(now); wait > 0 {
		h.settleAfter(wait)
		return nil
	}
	if h.inARow == 0 {
		h.failures[sourceRequest] = nil
	}
	if h.accepted {
		h.failures[sourceSecret] = nil
	}
	if h.inARow > 0 || h.current() != nil {
		return nil
	}
	fields := []zap.Field{zap.Int("failures", h.failed), zap.Duration("duration", now.Sub(h.begin))}
	h.failed = 0
	logged := false
	for _, w := range h.warnings {
		if w.open {
			w.open, w.failed, logged = false, 0, true
		}
	}
	if !logged {
		return nil
	}
	return func() { h.logger.Info(h.role.String()+" answers again", fields...) }
}

// settleAfter calls settle later, unless a request fails before. The caller holds the mutex.
func (h *health) settleAfter(wait time.Duration) {
	if h.settling == nil {
		h.settling = time.AfterFunc(wait, func() { h.change(h.settle) })
		return
	}
	h.settling.Reset(wait)
}

// stop keeps the failures from being settled. The caller holds the mutex.
func (h *health) stop() {
	if h.settling != nil {
		h.settling.Stop()
	}
}

// close ends what goes on by itself.
func (h *health) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stop()
}

// causeText returns the cause of a problem for operators: that of a failure to connect, or else what the caller reads,
// without the advice. Other errors may hold what the upstream sent.
func (r response) causeText() string {
	if r.dialFailed {
		return r.cause.Error()
	}
	return strings.TrimSuffix(r.problem.Detail, problem.TryAgain)
}
