package fsbroker

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// outcome is what the cache did for a request. It is a label of metrics and a field of logs.
type outcome uint8

const (
	outcomeNone      outcome = iota // no report, and no upstream was asked for it; or the caller has left
	outcomeHit                      // from memory
	outcomeStorage                  // from the storage
	outcomeMiss                     // fetched, because it was not kept
	outcomeBypass                   // fetched, because of nocache
	outcomeCollapsed                // from the fetch of another caller
	outcomeError                    // an upstream was asked or tried, but there is no report
)

var outcomeNames = [...]string{"none", "hit", "storage", "miss", "bypass", "collapsed", "error"}

func (o outcome) String() string { return outcomeNames[o] }

// The counters. Each configuration has a registry of its own: the counters outlive it and are registered again. A label
// must not have a value that a caller can choose.
var (
	requestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_fsbroker_requests_total",
		Help: "Requests, by status code, endpoint, client, and what the cache did for them: hit, storage, miss, bypass, collapsed, error or none.",
	}, []string{"code", "cache", "client", "endpoint"})

	upstreamMetrics = upstream.NewMetrics()
	storageMetrics  = archive.NewMetrics()
	harvestMetrics  = harvest.NewMetrics()
)

// registerMetrics registers all metrics with a configuration's registry. The gauges are read from current.
func registerMetrics(registry *prometheus.Registry, current func() stats) error {
	own := []prometheus.Collector{requestsTotal, gauges{current}}
	for _, c := range slices.Concat(own, upstreamMetrics.Collectors(), storageMetrics.Collectors(), harvestMetrics.Collectors()) {
		if err := registry.Register(c); err != nil {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	return nil
}

// hitCounters are a client's counters for hits. To look them up for each request would make a hit a tenth slower.
type hitCounters struct{ ok, notModified prometheus.Counter }

func newHitCounters(client string) hitCounters {
	of := func(status int) prometheus.Counter {
		return requestsTotal.WithLabelValues(strconv.Itoa(status), outcomeHit.String(), client, taskEndpoint.path)
	}
	return hitCounters{ok: of(http.StatusOK), notModified: of(http.StatusNotModified)}
}

// count counts a hit and reports whether there is a counter for its status.
func (c *hitCounters) count(status int) bool {
	switch status {
	case http.StatusOK:
		c.ok.Inc()
	case http.StatusNotModified:
		c.notModified.Inc()
	default:
		return false
	}
	return true
}

// countRequest counts a request. The client is empty without a valid secret.
func countRequest(status int, cache outcome, client string, e *endpoint) {
	requestsTotal.WithLabelValues(strconv.Itoa(status), cache.String(), client, e.path).Inc()
}

// What is read when it is collected: the gauges, and the evictions, which each memory counts itself.
var (
	nodeUp = prometheus.NewDesc("caddy_fsbroker_node_up",
		"1, or 0 while a node or the broker is known to fail.", []string{"namespace", "role", "node", "address"}, nil)
	questionsInFlight = prometheus.NewDesc("caddy_fsbroker_questions_in_flight",
		"Requests to a node or the broker that are under way.", []string{"namespace", "role", "node", "address"}, nil)
	cacheBytes = prometheus.NewDesc("caddy_fsbroker_cache_bytes",
		"Memory that the cache uses.", []string{"namespace"}, nil)
	cacheLimitBytes = prometheus.NewDesc("caddy_fsbroker_cache_limit_bytes",
		"Memory that the cache may use.", []string{"namespace"}, nil)
	cacheEntries = prometheus.NewDesc("caddy_fsbroker_cache_entries",
		"Reports and submissions that are kept in memory.", []string{"namespace"}, nil)
	cacheEvictionsTotal = prometheus.NewDesc("caddy_fsbroker_cache_evictions_total",
		"Entries evicted before their TTL was over, to make room.", []string{"namespace"}, nil)
	waiters = prometheus.NewDesc("caddy_fsbroker_waiters",
		"Callers that wait for a report to be finished.", []string{"namespace"}, nil)
	storageQueueLength = prometheus.NewDesc("caddy_fsbroker_storage_queue_length",
		"Values that wait to be written to the storage.", []string{"namespace"}, nil)
	storageQueueBytes = prometheus.NewDesc("caddy_fsbroker_storage_queue_bytes",
		"Memory that the values use that wait to be written to the storage.", []string{"namespace"}, nil)
)

// stats are the current values of what is read when it is collected.
type stats struct {
	upstreams []upstreamStats
	caches    map[string]cli.Cache // by namespace
}

// upstreamStats are the values of one node or broker.
type upstreamStats struct {
	namespace  string
	role       problem.Role
	name, host string
	up         bool
	inFlight   int64
}

// gauges collects current values, so upstreams that are no longer configured disappear.
type gauges struct{ current func() stats }

// Describe implements prometheus.Collector.
func (gauges) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		nodeUp, questionsInFlight, cacheBytes, cacheLimitBytes, cacheEntries, cacheEvictionsTotal, waiters,
		storageQueueLength, storageQueueBytes,
	} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (g gauges) Collect(metrics chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	s := g.current()
	for _, u := range s.upstreams {
		up := 0.0
		if u.up {
			up = 1
		}
		set(nodeUp, prometheus.GaugeValue, up, u.namespace, u.role.String(), u.name, u.host)
		set(questionsInFlight, prometheus.GaugeValue, float64(u.inFlight), u.namespace, u.role.String(), u.name, u.host)
	}
	for namespace, cache := range s.caches {
		set(cacheBytes, prometheus.GaugeValue, float64(cache.Bytes), namespace)
		set(cacheLimitBytes, prometheus.GaugeValue, float64(cache.Limit), namespace)
		set(cacheEntries, prometheus.GaugeValue, float64(cache.Entries), namespace)
		set(cacheEvictionsTotal, prometheus.CounterValue, float64(cache.Evictions), namespace)
		set(waiters, prometheus.GaugeValue, float64(cache.Waiters), namespace)
		if cache.Storage != nil {
			set(storageQueueLength, prometheus.GaugeValue, float64(cache.Storage.Queued), namespace)
			set(storageQueueBytes, prometheus.GaugeValue, float64(cache.Storage.QueuedBytes), namespace)
		}
	}
}

// Interface guard
var _ prometheus.Collector = gauges{}
