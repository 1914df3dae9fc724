package fsbroker

import (
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// health is the state of an upstream, from checks and from requests. It does not know how the upstream is reached.
type health struct {
	failDuration time.Duration
	logger       *zap.Logger
	notify       func(event, reason string) // reports a change to event handlers

	dialFailed atomic.Pointer[time.Time] // when the upstream last could not be connected to; nil since it could
	current    atomic.Pointer[failure]   // the current failure; nil if healthy
	last       atomic.Pointer[failure]   // the last failure of the upstream or of one of its answers
}

// failure is a failure of an upstream.
type failure struct {
	Code string    `json:"code"`
	At   time.Time `json:"at"`

	source healthSource
}

// response is the outcome of an exchange with an upstream.
type response struct {
	status     int
	problem    *problem // nil if the answer can be used
	cause      error    // of the problem; it may hold what the upstream sent
	dialFailed bool
	details    []zap.Field // about the cause, for the log
}

// healthSource is how a failure was found. The same source must find the upstream healthy again.
type healthSource int

const (
	sourceRequest healthSource = iota
	sourceCheck
	sourceAdmin
	sourceDial // any of them, and any of them can end it
)

// healthStatus is the state of an upstream as an operator sees it.
type healthStatus int

const (
	statusHealthy healthStatus = iota
	statusUnhealthy
	statusDown // not asked for a while
)

func (s healthStatus) String() string { return [...]string{"healthy", "unhealthy", "down"}[s] }

func (h *health) status(now time.Time) healthStatus {
	switch {
	case h.downFor(now) > 0:
		return statusDown
	case h.current.Load() != nil:
		return statusUnhealthy
	}
	return statusHealthy
}

// downFor returns how long the upstream is not asked because a recent dial has failed.
func (h *health) downFor(now time.Time) time.Duration {
	failed := h.dialFailed.Load()
	if failed == nil {
		return 0
	}
	return max(0, failed.Add(h.failDuration).Sub(now))
}

// recordDial records whether the upstream could be connected to.
func (h *health) recordDial(ok bool) {
	if !ok {
		now := time.Now()
		h.dialFailed.Store(&now)
	} else if h.dialFailed.Load() != nil {
		h.dialFailed.Store(nil)
	}
}

// record records the outcome of an exchange, and logs and reports a change. A slow or malformed answer to a request is a
// failure of that report only. In an exchange of the admin API, only a failed dial counts.
func (h *health) record(source healthSource, r response) {
	if r.problem == nil {
		h.recover(source)
		return
	}
	if r.problem.kind == problemBusy || source == sourceAdmin && !r.dialFailed {
		return
	}
	if r.dialFailed {
		source = sourceDial
	}
	now := &failure{Code: r.problem.code(), At: time.Now(), source: source}
	h.last.Store(now)
	if source == sourceRequest && r.problem.kind != problemRefusedSecret {
		return
	}
	known := h.current.Swap(now)
	if known != nil && known.Code == now.Code {
		return
	}
	fields := []zap.Field{zap.String("code", now.Code)}
	if r.dialFailed { // dial errors hold only an address; other errors may hold what the upstream sent
		fields = append(fields, zap.NamedError("cause", r.cause), zap.Duration("fail_duration", h.failDuration))
		fields = append(fields, r.details...)
	}
	h.logger.Warn("fails", fields...)
	if known == nil {
		h.notify("fsbroker_node_unhealthy", now.Code)
	}
}

// recover ends the current failure if this source can see that it is over.
func (h *health) recover(source healthSource) {
	known := h.current.Load()
	if known == nil || known.source != source && known.source != sourceDial || !h.current.CompareAndSwap(known, nil) {
		return
	}
	h.logger.Info("answers again")
	h.notify("fsbroker_node_healthy", known.Code)
}
