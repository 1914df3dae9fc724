package upstream

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// Metrics counts the requests to upstreams. Several upstreams share it.
type Metrics struct {
	total   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

// NewMetrics returns metrics at zero.
func NewMetrics() *Metrics {
	return &Metrics{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "caddy_fsbroker_questions_total",
			Help: "Requests to nodes and the broker, by outcome: answered, nothing_yet, unknown, abandoned by all callers, or the problem.",
		}, []string{"role", "node", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "caddy_fsbroker_question_duration_seconds",
			Help:    "Duration of requests to nodes and the broker, including the body of the answer.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"role", "node"}),
	}
}

// Collectors returns the metrics, to be registered.
func (m *Metrics) Collectors() []prometheus.Collector {
	return []prometheus.Collector{m.total, m.seconds}
}

// count counts a request that is passed through. Its duration is not measured, because it depends on the caller as well.
func (m *Metrics) count(o Origin, outcome string) {
	m.total.WithLabelValues(o.Role.String(), o.Name, outcome).Inc()
}

// countTimed counts a request, with its duration.
func (m *Metrics) countTimed(o Origin, outcome string, took time.Duration) {
	m.count(o, outcome)
	m.seconds.WithLabelValues(o.Role.String(), o.Name).Observe(took.Seconds())
}

// outcome returns how a request has ended, for metrics and spans.
func outcome(status int, p *problem.Problem) string {
	switch {
	case p != nil && p.Kind == problem.CallerLeft:
		return "abandoned"
	case p != nil:
		return p.Reason()
	case status == http.StatusNoContent:
		return "nothing_yet"
	case status == http.StatusNotFound:
		return "unknown"
	}
	return "answered"
}
