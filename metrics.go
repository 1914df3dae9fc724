package fsbroker

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// outcome says what a request had of what is kept. It is a label of metrics, and a field of logs.
type outcome int

const (
	outcomeNone      outcome = iota // nothing was looked up, or nobody waited for what was
	outcomeHit                      // it was in memory
	outcomeStorage                  // it was in the storage
	outcomeMiss                     // it was not kept, and was asked for
	outcomeBypass                   // it was asked for, since the caller wanted nothing that is only kept
	outcomeCollapsed                // it came with the question of another caller
	outcomeError                    // it was asked for, to no avail
)

var outcomeNames = [...]string{"none", "hit", "storage", "miss", "bypass", "collapsed", "error"}

func (o outcome) String() string { return outcomeNames[o] }

// outcome is what there was of f, or of the problem there was instead.
func (f *finding) outcome(p *problem) outcome {
	switch {
	case p != nil && p.asked:
		return outcomeError
	case p != nil || f.entry == nil:
		return outcomeNone
	case f.recalled:
		return outcomeStorage
	case f.hit:
		return outcomeHit
	case f.joined:
		return outcomeCollapsed
	case f.nocache:
		return outcomeBypass
	}
	return outcomeMiss
}

// The metrics that are counted as things happen. Each configuration has a registry of its own: these live on, and are
// registered again. No label may have a value that a caller can make up.
var (
	requestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_fsbroker_requests_total",
		Help: "Requests, by the status code and the name of the client, and by what the cache did for them: hit, storage, miss, bypass, collapsed, error or none.",
	}, []string{"code", "cache", "client"})

	questionsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_fsbroker_questions_total",
		Help: "Questions to nodes and the broker, by how they ended: answered, nothing_yet, unknown, abandoned by all callers, or what was wrong.",
	}, []string{"role", "node", "outcome"})

	questionSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "caddy_fsbroker_question_duration_seconds",
		Help:    "How long questions to nodes and the broker took, the bodies of the answers included.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
	}, []string{"role", "node"})

	storageWritesTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "caddy_fsbroker_storage_writes_total",
		Help: "Values that were written to the storage.",
	})
	storageFailuresTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "caddy_fsbroker_storage_write_failures_total",
		Help: "Writes to the storage that failed, and are tried again.",
	})
	storageRefusedTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "caddy_fsbroker_storage_refused_total",
		Help: "Values that found the queue to the storage full, and stay in memory alone until they are asked for again.",
	})
)

// registerMetrics makes all metrics known to a configuration's registry, which another handler may have done.
func registerMetrics(registry *prometheus.Registry) error {
	for _, c := range []prometheus.Collector{
		requestsTotal, questionsTotal, questionSeconds,
		storageWritesTotal, storageFailuresTotal, storageRefusedTotal, liveMetrics{},
	} {
		err := registry.Register(c)
		if _, already := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !already {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	return nil
}

// hitCounters are a client's counters of what has to be fast: looking them up would make a hit a tenth slower.
type hitCounters struct{ whole, unchanged prometheus.Counter }

func newHitCounters(client string) hitCounters {
	of := func(status int) prometheus.Counter {
		return requestsTotal.WithLabelValues(strconv.Itoa(status), outcomeHit.String(), client)
	}
	return hitCounters{whole: of(http.StatusOK), unchanged: of(http.StatusNotModified)}
}

// countRequest counts a request that was answered. Without a right secret it has no client.
func countRequest(rec *record, status int) {
	if rec.client != nil && rec.cache == outcomeHit {
		switch status {
		case http.StatusOK:
			rec.client.hits.whole.Inc()
			return
		case http.StatusNotModified:
			rec.client.hits.unchanged.Inc()
			return
		}
	}
	requestsTotal.WithLabelValues(strconv.Itoa(status), rec.cache.String(), rec.clientName()).Inc()
}

// countQuestion counts a question that has ended, with a status or an error.
func (p *peer) countQuestion(status int, err error, took time.Duration) {
	how := "answered"
	if trouble, ok := errors.AsType[*problem](err); ok {
		how = strings.TrimPrefix(trouble.code, p.role+"_")
	} else if err != nil {
		how = "abandoned"
	}
	switch status {
	case http.StatusNoContent:
		how = "nothing_yet"
	case http.StatusNotFound:
		how = "unknown"
	}
	questionsTotal.WithLabelValues(p.role, p.name, how).Inc()
	questionSeconds.WithLabelValues(p.role, p.name).Observe(took.Seconds())
}

// The metrics that are looked up when somebody wants them.
var (
	nodeUp = prometheus.NewDesc("caddy_fsbroker_node_up",
		"1, or 0 while a node or the broker is known to fail.", []string{"role", "node", "address"}, nil)
	questionsInFlight = prometheus.NewDesc("caddy_fsbroker_questions_in_flight",
		"Questions that wait for the answer of a node or the broker.", []string{"role", "node", "address"}, nil)
	cacheBytes = prometheus.NewDesc("caddy_fsbroker_cache_bytes",
		"What all that is kept in memory takes.", nil, nil)
	cacheLimitBytes = prometheus.NewDesc("caddy_fsbroker_cache_limit_bytes",
		"What it may take.", nil, nil)
	cacheEntries = prometheus.NewDesc("caddy_fsbroker_cache_entries",
		"How many reports and submissions are kept in memory.", nil, nil)
	cacheEvictionsTotal = prometheus.NewDesc("caddy_fsbroker_cache_evictions_total",
		"How many had to go before their time, to make room.", nil, nil)
	waiters = prometheus.NewDesc("caddy_fsbroker_waiters",
		"Callers who wait for a report that is not finished.", nil, nil)
	storageQueueLength = prometheus.NewDesc("caddy_fsbroker_storage_queue_length",
		"How many values wait to be written to the storage.", nil, nil)
	storageQueueBytes = prometheus.NewDesc("caddy_fsbroker_storage_queue_bytes",
		"What the values that wait to be written to the storage take in memory.", nil, nil)
)

// liveMetrics collects what the handlers of this moment know, so that nodes that are configured no more vanish.
type liveMetrics struct{}

// Describe implements prometheus.Collector.
func (liveMetrics) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		nodeUp, questionsInFlight, cacheBytes, cacheLimitBytes, cacheEntries, cacheEvictionsTotal, waiters,
		storageQueueLength, storageQueueBytes,
	} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (liveMetrics) Collect(metrics chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	for id, peers := range live.peers() {
		up, asking := 1.0, int64(0)
		for _, p := range peers {
			if p.ailment.Load() != nil {
				up = 0
			}
			asking += p.asking.Load()
		}
		set(nodeUp, prometheus.GaugeValue, up, id.role, id.name, id.host)
		set(questionsInFlight, prometheus.GaugeValue, float64(asking), id.role, id.name, id.host)
	}
	memory, storage := live.cacheFigures()
	set(cacheBytes, prometheus.GaugeValue, float64(memory.Bytes))
	set(cacheLimitBytes, prometheus.GaugeValue, float64(memory.Limit))
	set(cacheEntries, prometheus.GaugeValue, float64(memory.Entries))
	set(cacheEvictionsTotal, prometheus.CounterValue, float64(memory.Evictions))
	set(waiters, prometheus.GaugeValue, float64(memory.Waiters))
	set(storageQueueLength, prometheus.GaugeValue, float64(storage.Queued))
	set(storageQueueBytes, prometheus.GaugeValue, float64(storage.QueuedBytes))
}

// Interface guard
var _ prometheus.Collector = liveMetrics{}
