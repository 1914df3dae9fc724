package cluster_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// purged is the response to a purge. Next is where it goes on, if it is not done.
type purged struct {
	Memory, Queue, Storage int
	Next                   int
}

// purge purges what a query selects. It goes on until all is done, and returns the sums.
func (i *instance) purge(query string) (sum purged) {
	i.c.t.Helper()
	query = strings.TrimPrefix(query, "?")
	for from := ""; ; {
		r, err := i.do(http.MethodDelete, i.admin+"/fsbroker/cache?"+strings.Trim(query+"&"+from, "&"))
		if err != nil {
			i.c.t.Fatal(err)
		}
		var p purged
		if err := json.Unmarshal([]byte(r.body), &p); err != nil || r.status != http.StatusOK {
			i.c.t.Fatalf("purging %q: status %d: %s", query, r.status, r.body)
		}
		sum.Memory, sum.Queue, sum.Storage = sum.Memory+p.Memory, sum.Queue+p.Queue, sum.Storage+p.Storage
		if p.Next == 0 {
			return sum
		}
		from = fmt.Sprint("from=", p.Next)
	}
}

// What is purged is gone from memory and from Redis, and nothing else is.
func TestPurge(t *testing.T) {
	c := newCluster(t)
	// The other instance keeps nothing in memory, so it shows what is stored.
	one, other := c.start(), c.start("max_size 1B")
	file := text(1)
	byTask, byFile, atNode, old := c.mustScan(1, text(1)), c.mustScan(2, file), c.mustScan(1, text(1)), c.mustScan(2, text(1))
	submitted := c.submit(text(1))
	reports := one.collect(byTask, byTask+"&all", byFile, old, atNode, submitted)
	const gap = 20 * time.Second // much longer than a purge takes
	time.Sleep(gap)
	since := time.Now()
	young := c.mustScan(2, text(1))
	maps.Copy(reports, one.collect(young))
	one.wantStored()
	c.forget()
	other.wantAll(reports)

	purge := func(query string, want purged, gone ...string) {
		t.Helper()
		if got := one.purge(query); got != want {
			t.Errorf("purging %q: %+v, want %+v", query, got, want)
		}
		for _, path := range gone {
			delete(reports, path)
			for _, i := range []*instance{one, other} {
				i.want(path, http.StatusNotFound, fromNowhere)
			}
		}
		other.wantAll(reports)
	}
	query := func(path string) string { return strings.TrimPrefix(path, "/task") }
	purge(query(byTask), purged{Memory: 2, Storage: 2}, byTask, byTask+"&all")
	purge(query(submitted), purged{Memory: 1, Storage: 1}, submitted)
	purge(fmt.Sprintf("?sha256=%x", sha256.Sum256(file)), purged{Memory: 1, Storage: 1}, byFile)
	purge("?appServerID=node-1", purged{Memory: 1, Storage: 1}, atNode)
	purge("?older_than="+(gap/2+time.Since(since)).String(), purged{Memory: 1, Storage: 1}, old)
	purge("", purged{Memory: 1, Storage: 1}, slices.Collect(maps.Keys(reports))...)
	if keys := c.values(); len(keys) > 0 {
		t.Errorf("Redis still has %q", keys)
	}
}

// A purge that cannot reach Redis is an error, and succeeds later.
func TestPurgeDuringAnOutage(t *testing.T) {
	c := newCluster(t, "--appendonly", "yes", "--appendfsync", "always")
	one := c.start()
	path := c.mustScan(1, text(1))
	one.collect(path)
	one.wantStored()
	c.redis.Kill()
	for _, query := range []string{"", "?appServerID=node-1", strings.TrimPrefix(path, "/task")} {
		r, err := one.do(http.MethodDelete, one.admin+"/fsbroker/cache"+query)
		if err != nil || r.status < 500 {
			t.Errorf("purging %q: status %d, %v: %s", query, r.status, err, r.body)
		}
	}
	c.redis.Restart()
	if n := len(c.values()); n == 0 {
		t.Error("Redis has lost the report")
	}
	one.purge("")
	if keys := c.values(); len(keys) > 0 {
		t.Errorf("Redis still has %q", keys)
	}
}
