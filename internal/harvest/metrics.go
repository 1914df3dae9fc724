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
	count() int
	oldest() time.Duration
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
	}, func() (sum float64) {
		m.each(func(p pending) { sum += float64(p.count()) })
		return sum
	})
	m.oldest = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: prefix + "oldest_pending_seconds", Help: "Time since the oldest submission that is followed was accepted.",
	}, func() (oldest float64) {
		m.each(func(p pending) { oldest = max(oldest, p.oldest().Seconds()) })
		return oldest
	})
	return m
}

// Collectors returns the counters and gauges, to be registered.
func (m *Metrics) Collectors() []prometheus.Collector {
	return []prometheus.Collector{m.pending, m.oldest, m.finished, m.failed, m.givenUp, m.refused}
}

// each calls do for what each follower has pending.
func (m *Metrics) each(do func(pending)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range m.pendings {
		do(p)
	}
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
