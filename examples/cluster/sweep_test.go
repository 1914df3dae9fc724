package cluster_test

import (
	"net/http"
	"testing"
	"time"
)

// What is older than the retention is deleted, and nothing that is younger.
func TestSweep(t *testing.T) {
	c := newCluster(t)
	const retention = 8 * time.Second
	options := []string{"retention " + retention.String(), "max_size 1B"} // keep nothing in memory
	one, other := c.start(options...), c.start(options...)
	var paths []string
	for range 100 {
		paths = append(paths, c.mustScan(1, text(1)))
	}
	paths = append(paths, c.mustScan(2, text(2000))+"&all")
	began := time.Now()
	one.collect(paths...)
	one.wantStored()
	c.forget()
	stored := len(c.values())

	// The sweeps begin meanwhile.
	for time.Since(began) < 2*retention {
		path := c.mustScan(1, text(1))
		begun := time.Now()
		one.collect(path)
		one.wantStored()
		c.forget()
		for range 5 {
			r, err := other.get(path)
			if young := time.Since(begun) < retention; err != nil || young && r.status != http.StatusOK {
				t.Errorf("a report that is younger than the retention: status %d, %v", r.status, err)
			}
			time.Sleep(retention / 20)
		}
	}
	eventually(t, "the sweep", func() bool { return len(c.values()) == 0 && len(c.redis.Keys("*/index/*")) == 0 })
	t.Logf("%d values and those that were stored later are gone after %s", stored, time.Since(began).Round(time.Second))
}

// While an instance with a longer retention runs, that one counts.
func TestTwoRetentions(t *testing.T) {
	c := newCluster(t)
	long := c.start("retention 2m", "max_size 1B")
	eventually(t, "the record of an instance", func() bool { return len(c.redis.Keys("*/instances/*")) == 1 })
	short := c.start("retention 4s", "max_size 1B")
	path := c.mustScan(1, text(1))
	reports := short.collect(path)
	short.wantStored()
	c.forget()
	eventually(t, "a warning", func() bool { return short.logged("with another retention") })
	time.Sleep(8 * time.Second)
	long.wantAll(reports)
}
