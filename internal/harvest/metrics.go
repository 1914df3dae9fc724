package harvest

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what followers do. Several followers may share it.
type Metrics struct {
	finished, failed, givenUp, refused prometheus.Counter
	pending, oldest                    prometheus.GaugeFunc

	mu       sync.Mutex
	pendings map[pending]struct{}
}

// pending is what a follower has pending.
type pending interface {
	// stats returns the number of targets, and the age of the oldest.
	stats() (targets int, oldest time.Duration)
}

// NewMetrics returns metrics at zero.
func NewMetrics() *Metrics {
	const prefix = "caddy_fsbroker_harvest_"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + name, Help: help})
	}
	m := &Metrics{
		finished: counter("finished_total", "Submissions and tasks that were followed until their reports were kept."),
		failed:   counter("failed_total", "Submissions that were followed and have failed."),
		givenUp:  counter("given_up_total", "Submissions and tasks that are not followed any longer although their reports are not kept."),
		refused:  counter("refused_total", "Submissions and tasks that are not followed because too many are pending."),
		pendings: make(map[pending]struct{}),
	}
	m.pending = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: prefix + "pending", Help: "Submissions and tasks that are followed.",
	}, func() float64 {
		pending, _ := m.sum()
		return float64(pending)
	})
	m.oldest = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: prefix + "oldest_pending_seconds", Help: "Time since the oldest submission that is followed was accepted.",
	}, func() float64 {
		_, oldest := m.sum()
		return oldest.Seconds()
	})
	return m
}

// Collectors returns the counters and gauges, to be registered.
func (m *Metrics) Collectors() []prometheus.Collector {
	return []prometheus.Collector{m.pending, m.oldest, m.finished, m.failed, m.givenUp, m.refused}
}

// sum returns the number of all pending targets, and the age of the oldest.
func (m *Metrics) sum() (pending int, oldest time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range m.pendings {
		n, age := p.stats()
		pending += n
		oldest = max(oldest, age)
	}
	return pending, oldest
}

func (m *Metrics) add(p pending) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pendings[p] = struct{}{}
}

func (m *Metrics) remove(p pending) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pendings, p)
}
