package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// memory measures the memory per cached report, for the contenders that cache, when clients accept gzip.
func (h *harness) memory(ctx context.Context, participants []*contender, results *results) error {
	for _, size := range h.sizes[:2] {
		for _, c := range participants {
			if !c.caches {
				continue
			}
			progress.Printf("memory of %s, %s", c.name, size.name)
			bytes, err := h.memoryOf(ctx, c, load{size: size, gzip: true})
			if err != nil {
				return err
			}
			results.memory = append(results.memory, memoryResult{c, size, bytes})
		}
	}
	compareContenders(results, "memory", once(results.memory))
	return nil
}

// memoryOf returns the bytes per report. For a Go process, these are on its heap after a garbage collection. For other
// processes, they are resident or in files.
func (h *harness) memoryOf(ctx context.Context, c *contender, l load) (float64, error) {
	s, err := c.start(ctx, h)
	if err != nil {
		return 0, err
	}
	defer s.process.stop()
	fetch := func(from, to int) error {
		for i := from; i < to; i++ {
			if _, err := h.get(ctx, "http://"+s.Plain+c.target(l, fmt.Sprintf("%s-%d", l.size.id(), i)), true); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		return nil
	}
	const warmUp = 100
	if err := fetch(0, warmUp); err != nil {
		return 0, err
	}
	before, err := h.memoryUsed(ctx, c, s)
	if err != nil {
		return 0, err
	}
	if err := fetch(warmUp, warmUp+h.options.kept); err != nil {
		return 0, err
	}
	after, err := h.memoryUsed(ctx, c, s)
	return float64(after-before) / float64(h.options.kept), err
}

func (h *harness) memoryUsed(ctx context.Context, c *contender, s *server) (int64, error) {
	if c.command != nil {
		var files int64
		err := filepath.WalkDir(filepath.Join(s.Dir, "cache"), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return nil //nolint:nilerr // the folder may not exist
			}
			info, err := os.Stat(path)
			if err == nil {
				files += info.Size()
			}
			return err
		})
		return s.process.memory("VmRSS") + files, err
	}
	var a response
	for range 2 { // objects with a finalizer are only freed by the second collection
		var err error
		if a, err = h.get(ctx, "http://"+s.Admin+"/debug/pprof/heap?gc=1&debug=1", false); err != nil {
			return 0, err
		}
	}
	_, rest, _ := strings.Cut(string(a.body), "# HeapAlloc = ")
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.ParseInt(line, 10, 64)
}

// cold counts the requests that the node receives when many callers request an uncached report at once.
func (h *harness) cold(ctx context.Context, participants []*contender, results *results) error {
	const callers = 200
	servers, err := h.startAll(ctx, participants)
	defer servers.stop()
	if err != nil {
		return err
	}
	for _, c := range participants {
		if !c.caches {
			continue
		}
		progress.Printf("%d callers of %s", callers, c.name)
		url := "http://" + servers.of(c).Plain + c.target(load{gzip: true}, "cold-"+h.sizes[1].id()+"-"+strings.ReplaceAll(c.name, " ", ""))
		before := h.node.requests.Load()
		var failed atomic.Int64
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				if _, err := h.get(ctx, url, true); err != nil {
					failed.Add(1)
				}
			})
		}
		wg.Wait()
		results.cold = append(results.cold, coldResult{c, callers, int(h.node.requests.Load() - before), int(failed.Load())})
	}
	compareContenders(results, "cold", once(results.cold))
	return nil
}

// miss measures the cost of fetching a large report from the node, compared with a proxy that keeps nothing.
func (h *harness) miss(ctx context.Context, participants []*contender, results *results) error {
	for _, mib := range []int{2, 16, 50} {
		id := strconv.Itoa(mib) + "MiBmiss"
		h.node.documents[id] = makeReport(mib << 20)
		for _, gzipped := range []bool{true, false} {
			for _, c := range participants {
				if !c.isModule() && c != reverseProxy {
					continue
				}
				progress.Printf("cache miss of %d MiB, %s", mib, c.name)
				r, err := h.missOf(ctx, c, id, gzipped)
				if err != nil {
					return err
				}
				r.contender, r.mib, r.gzip = c, mib, gzipped
				results.misses = append(results.misses, r)
			}
		}
		delete(h.node.documents, id)
	}
	compareContenders(results, "miss", once(results.misses))
	return nil
}

// missOf requests different reports of one size, one after the other. The peak memory is that of the first.
func (h *harness) missOf(ctx context.Context, c *contender, id string, gzipped bool) (missResult, error) {
	s, err := c.start(ctx, h)
	if err != nil {
		return missResult{}, err
	}
	defer s.process.stop()
	target := func(task string) string { return "http://" + s.Plain + c.target(load{gzip: gzipped}, task) }
	if _, err := h.get(ctx, target(h.sizes[0].id()+"-warm"), gzipped); err != nil {
		return missResult{}, err
	}
	var r missResult
	var all []answer
	for i := range 5 {
		before := s.process.memory("VmRSS")
		if err := s.process.resetPeak(); err != nil {
			return missResult{}, err
		}
		got, err := h.getTimed(ctx, target(fmt.Sprintf("%s-%d", id, i)), gzipped)
		if err != nil {
			return missResult{}, err
		}
		if i == 0 {
			r.peak = s.process.memory("VmHWM") - before
			if err := got.check(h.node.documents[id], gzipped); err != nil {
				return missResult{}, fmt.Errorf("%s: %w", c.name, err)
			}
		}
		got.body = nil
		all = append(all, got)
	}
	r.first = median(all, func(t answer) time.Duration { return t.first })
	r.took = median(all, func(t answer) time.Duration { return t.took })
	return r, nil
}
