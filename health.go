package fsbroker

import (
	"sync"
	"time"

	"go.uber.org/zap"
)

// health is the state of an upstream, from checks and from requests. It does not know how the upstream is reached.
type health struct {
	failDuration time.Duration
	logger       *zap.Logger
	notify       func(event, reason string) // reports a change to event handlers

	mu         sync.Mutex // guards the fields below
	dialFailed time.Time  // when the upstream last could not be connected to; zero since it could
	failures   [3]*failure
	last       *failure // the last failure of the upstream or of one of its answers
}

// failure is a failure of an upstream.
type failure struct {
	Code string    `json:"code"`
	At   time.Time `json:"at"`
}

// healthSource is how a failure was found. A failure ends when the same source finds the upstream healthy again, so each
// source has a place in health.failures. The first that is failing counts.
type healthSource int

const (
	sourceDial    healthSource = iota // any exchange
	sourceRequest                     // a request for a report
	sourceCheck
	sourceOther // only connecting counts
)

// response is the outcome of an exchange with an upstream.
type response struct {
	start      time.Time
	status     int
	problem    *problem // nil if the answer can be used
	cause      error    // of the problem; it may hold what the upstream sent
	dialFailed bool
	details    []zap.Field // about the cause, for the log
}

// healthStatus is the state of an upstream as an operator sees it.
type healthStatus int

const (
	statusHealthy healthStatus = iota
	statusUnhealthy
	statusDown // not asked for a while
)

func (s healthStatus) String() string { return [...]string{"healthy", "unhealthy", "down"}[s] }

// status returns the state of the upstream and its last failure, if there was one.
func (h *health) status(now time.Time) (healthStatus, *failure) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.downUntil().After(now):
		return statusDown, h.last
	case h.current() != nil:
		return statusUnhealthy, h.last
	}
	return statusHealthy, h.last
}

// downFor returns how long the upstream is not asked because a recent dial has failed.
func (h *health) downFor(now time.Time) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return max(0, h.downUntil().Sub(now))
}

// downUntil returns until when the upstream is not asked. The caller holds the mutex.
func (h *health) downUntil() time.Time {
	if h.dialFailed.IsZero() {
		return time.Time{}
	}
	return h.dialFailed.Add(h.failDuration)
}

// current returns the failure that counts, or nil if there is none. The caller holds the mutex.
func (h *health) current() *failure {
	for _, f := range h.failures {
		if f != nil {
			return f
		}
	}
	return nil
}

// record records the outcome of an exchange, and logs and reports a change.
func (h *health) record(source healthSource, r response) {
	before, after := h.update(source, r)
	switch {
	case after != nil && (before == nil || before.Code != after.Code):
		fields := []zap.Field{zap.String("code", after.Code)}
		if r.dialFailed { // dial errors hold only an address; other errors may hold what the upstream sent
			fields = append(fields, zap.NamedError("cause", r.cause), zap.Duration("fail_duration", h.failDuration))
			fields = append(fields, r.details...)
		}
		h.logger.Warn("fails", fields...)
		if before == nil {
			h.notify("fsbroker_node_unhealthy", after.Code)
		}
	case after == nil && before != nil:
		h.logger.Info("answers again")
		h.notify("fsbroker_node_healthy", before.Code)
	}
}

// update records the outcome of an exchange and returns the failure that counts, before and after. A slow or malformed
// answer to a request is a failure of that report only.
func (h *health) update(source healthSource, r response) (before, after *failure) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before = h.current()
	switch {
	case r.dialFailed:
		h.fail(sourceDial, r.problem)
		h.dialFailed = time.Now()
	case r.status != 0 && r.start.After(h.dialFailed): // it could be connected to since
		h.failures[sourceDial], h.dialFailed = nil, time.Time{}
	}
	switch {
	case r.dialFailed, source == sourceOther:
	case r.problem == nil:
		h.failures[source] = nil
	case r.problem.kind == problemBusy:
	case source == sourceCheck, r.problem.kind == problemRefusedSecret:
		h.fail(source, r.problem)
	default:
		h.last = &failure{Code: r.problem.code(), At: time.Now()}
	}
	return before, h.current()
}

// fail sets the failure of a source. The caller holds the mutex.
func (h *health) fail(source healthSource, p *problem) {
	h.failures[source] = &failure{Code: p.code(), At: time.Now()}
	h.last = h.failures[source]
}
