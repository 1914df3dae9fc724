package archive

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts what archives do. Several archives may share it.
type Metrics struct {
	written, failed, refused, lost, givenUp, swept prometheus.Counter

	background *prometheus.CounterVec // failures, by task
}

// NewMetrics returns metrics at zero.
func NewMetrics() *Metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "caddy_fsbroker_storage_" + name, Help: help})
	}
	m := &Metrics{
		written: counter("writes_total", "Reports and references written to the storage."),
		failed:  counter("write_failures_total", "Writes to the storage that failed and are retried."),
		refused: counter("refused_total", "Reports for which the queue to the storage had no room. Memory keeps them and queues them again."),
		lost:    counter("lost_total", "Reports that left memory while the queue to the storage had no room for them. They are not stored."),
		givenUp: counter("given_up_total", "Reports that the storage did not take for an hour, although it took others. They are not stored."),
		swept:   counter("swept_total", "Values deleted from the storage because their retention was over."),
		background: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "caddy_fsbroker_storage_background_failures_total",
			Help: "Failures of what is done with the storage in the background: the sweep, reading what is pending, looking at leases, renewing the lease.",
		}, []string{"task"}),
	}
	for t := range consequences {
		m.background.WithLabelValues(string(t))
	}
	return m
}

// Collectors returns the counters, to be registered.
func (m *Metrics) Collectors() []prometheus.Collector {
	return []prometheus.Collector{m.written, m.failed, m.refused, m.lost, m.givenUp, m.swept, m.background}
}
