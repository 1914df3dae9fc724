package archive

import "github.com/prometheus/client_golang/prometheus"

var (
	writesTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "caddy_fsbroker_storage_writes_total",
		Help: "Values written to the storage.",
	})
	failuresTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "caddy_fsbroker_storage_write_failures_total",
		Help: "Writes to the storage that failed and are retried.",
	})
	refusedTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "caddy_fsbroker_storage_refused_total",
		Help: "Values for which the queue to the storage had no room. They stay in memory until they are requested again.",
	})
)

// Collectors returns the counters of all archives of the process. Each configuration has a registry of its own, so they
// are registered once for each.
func Collectors() []prometheus.Collector {
	return []prometheus.Collector{writesTotal, failuresTotal, refusedTotal}
}
