// Package cluster_test runs the example with several instances of Caddy that share a real Redis database.
package cluster_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/cluster/internal/redistest"
)

// What one instance has stored, the other serves after the nodes and the broker have forgotten it.
func TestInstancesShareReports(t *testing.T) {
	c := newCluster(t)
	one, other := c.start(), c.start()
	small, large := c.mustScan(1, text(1)), c.mustScan(2, text(2000))
	reports := one.collect(small, small+"&all", large, large+"&all", c.submit(text(10)))
	if n := len(reports[large+"&all"]); n < 200_000 {
		t.Errorf("the large report has %d bytes only", n)
	}
	one.wantStored()

	c.forget()
	other.wantAll(reports)
	for path := range reports {
		hit, stored := one.want(path, http.StatusOK, fromMemory), other.want(path, http.StatusOK, fromMemory)
		if a, b := hit.header.Get("ETag"), stored.header.Get("ETag"); a != b || a == "" {
			t.Errorf("%s: the ETags are %s and %s", path, a, b)
		}
	}
	other.want("/task?appServerID=node-1&taskID=unknown", http.StatusNotFound, fromNowhere)
}

// A stop stores what is queued, and a start finds it.
func TestRestart(t *testing.T) {
	c := newCluster(t)
	one := c.start()
	var paths []string
	for range 300 {
		paths = append(paths, c.mustScan(1, text(1)))
	}
	c.redis.Set("maxmemory", "1") // refuses values
	reports := one.collect(paths...)
	if n := one.queue().Queued; n != len(paths) {
		t.Errorf("%d reports are queued, want %d", n, len(paths))
	}
	one.terminate()
	time.Sleep(time.Second)
	c.redis.Set("maxmemory", "0")
	one.wait()
	c.forget()
	one.run()
	one.wantAll(reports)
}

// What is stored is there after kill -9, in the middle of writing.
func TestKill(t *testing.T) {
	c := newCluster(t)
	one, other := c.start(), c.start()
	for round := range 3 {
		path := c.mustScan(1, text(1))
		confirmed := one.collect(path, path+"&all")
		one.wantStored()

		// Others are being written when the process ends.
		var busy sync.WaitGroup
		var answered atomic.Int32
		for range 4 {
			busy.Go(func() {
				for {
					path, err := c.scan(2, text(100))
					if err == nil {
						_, err = one.get(path + "&all")
					}
					if err != nil {
						return // killed
					}
					answered.Add(1)
				}
			})
		}
		eventually(t, "other reports", func() bool { return answered.Load() > 20 })
		one.kill()
		busy.Wait()

		c.forget()
		other.wantAll(confirmed)
		one.run()
		one.wantAll(confirmed)
		t.Logf("round %d: %d other reports were answered", round, answered.Load())
	}
}

// outage is how long Redis is away.
const outage = 20 * time.Second

// While Redis is away, answers go on. When it is back, all of them are stored.
func TestOutage(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		options     []string
		leave, back func(*redistest.Server)
	}{
		// Connections stay open, and nothing answers.
		"hangs": {nil, (*redistest.Server).Pause, (*redistest.Server).Resume},
		// Connections are refused. What Redis has confirmed is in its file.
		"down": {[]string{"--appendonly", "yes", "--appendfsync", "always"}, (*redistest.Server).Kill, (*redistest.Server).Restart},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, test.options...)
			one, other := c.start(), c.start()
			path := c.mustScan(1, text(1))
			reports := one.collect(path, path+"&all")
			one.wantStored()

			test.leave(c.redis)
			began := time.Now()
			var mu sync.Mutex
			var callers sync.WaitGroup
			var slowest, slowestHit time.Duration
			for range 4 {
				callers.Go(func() {
					for time.Since(began) < outage {
						newPath, err := c.scan(2, text(1))
						if err != nil {
							t.Error(err)
							return
						}
						r, err := one.get(newPath)
						hit, hitErr := one.get(path)
						mu.Lock()
						reports[newPath] = r.body
						slowest, slowestHit = max(slowest, r.took), max(slowestHit, hit.took)
						mu.Unlock()
						if err != nil || r.status != http.StatusOK {
							t.Errorf("a new report: status %d, %v: %s", r.status, err, r.body)
						}
						if hitErr != nil || hit.status != http.StatusOK {
							t.Errorf("a report in memory: status %d, %v: %s", hit.status, hitErr, hit.body)
						}
						time.Sleep(100 * time.Millisecond)
					}
				})
			}
			// Nobody can say whether the storage has it.
			r := other.want("/task?appServerID=node-1&taskID=unknown", http.StatusServiceUnavailable, fromNowhere)
			if !strings.Contains(r.body, "storage_unavailable") || r.header.Get("Retry-After") == "" {
				t.Errorf("%v: %s", r.header, r.body)
			}
			callers.Wait() // no answer waits for Redis to be back
			queued := one.queue()
			if queued.Queued == 0 || !queued.Failing {
				t.Errorf("while Redis is away: %+v", queued)
			}

			test.back(c.redis)
			back := time.Now()
			one.wantStored()
			t.Logf("%d new reports, the slowest took %s, the slowest hit %s; %d were queued, all stored %s after Redis was back",
				len(reports)-2, slowest.Round(time.Millisecond), slowestHit.Round(time.Millisecond), queued.Queued, time.Since(back).Round(time.Millisecond))
			one.kill()
			c.forget()
			eventually(t, "reads to work again", func() bool { r, _ := other.get(path); return r.status == http.StatusOK })
			delete(reports, path)
			other.wantAll(reports)
		})
	}
}

// A Redis that refuses connections costs no caller a wait, and the log says what is wrong with which storage.
func TestRefusal(t *testing.T) {
	c := newCluster(t)
	one := c.start()
	var paths []string
	for range 5 {
		paths = append(paths, c.mustScan(1, text(1)))
	}
	c.redis.Kill()
	for _, path := range paths {
		one.want(path, http.StatusOK, fromNode)
	}
	eventually(t, "the cause in the log", func() bool { return one.logged("connect: connection refused") })
	if one.logged("deadline exceeded") {
		t.Error("a caller has waited")
	}
	if !one.logged(`"storage":"redis"`) {
		t.Error("the log does not name the storage")
	}
}

// A full Redis refuses values. Answers go on, and all are stored when it has room.
func TestFull(t *testing.T) {
	c := newCluster(t)
	one, other := c.start(), c.start()
	c.redis.Set("maxmemory-policy", "noeviction")
	used := c.redis.Client.InfoMap(t.Context(), "memory").Item("Memory", "used_memory")
	var room int
	if _, err := fmt.Sscan(used, &room); err != nil {
		t.Fatal(err)
	}
	c.redis.Set("maxmemory", fmt.Sprint(room+2<<20))

	var paths []string
	for range 100 {
		paths = append(paths, c.mustScan(1, text(200))+"&all")
	}
	reports := one.collect(paths...)
	eventually(t, "Redis to be full", func() bool { q := one.queue(); return q.Failing && q.Queued > 0 })
	one.want(paths[0], http.StatusOK, fromMemory)
	queued := one.queue().Queued
	if queued == len(paths) {
		t.Error("nothing was stored before Redis was full")
	}

	c.redis.Set("maxmemory", "0")
	back := time.Now()
	one.wantStored()
	t.Logf("%d of %d reports were refused, all are stored %s after Redis had room", queued, len(paths), time.Since(back).Round(time.Millisecond))
	one.kill()
	c.forget()
	other.wantAll(reports)
}

func TestCaddyfile(t *testing.T) {
	c := newCluster(t)
	for _, args := range [][]string{{"fmt", caddyfile}, {"validate", "--config", caddyfile}} {
		command := exec.Command(os.Args[0], args...)
		var stderr bytes.Buffer
		command.Env, command.Stderr = c.env, &stderr
		if err := command.Run(); err != nil {
			t.Errorf("caddy %s: %v\n%s", strings.Join(args, " "), err, &stderr)
		}
	}
}
