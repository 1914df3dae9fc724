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

// memory measures what a kept report costs those who keep some, when clients take gzip.
func (lab *laboratory) memory(ctx context.Context, taking []*contender, results *results) error {
	for _, size := range lab.sizes[:2] {
		for _, c := range taking {
			if !c.keeps {
				continue
			}
			progress.Printf("memory of %s, %s", c.name, size.name)
			bytes, err := lab.memoryOf(ctx, c, load{size: size, gzip: true})
			if err != nil {
				return err
			}
			results.memory = append(results.memory, memoryResult{c, size, bytes})
		}
	}
	return nil
}

// memoryOf gives the bytes for one report: what a Go process has on its heap after a collection, what another process
// has resident and in files.
func (lab *laboratory) memoryOf(ctx context.Context, c *contender, l load) (float64, error) {
	s, err := c.start(ctx, lab)
	if err != nil {
		return 0, err
	}
	defer s.process.stop()
	ask := func(from, to int) error {
		for i := from; i < to; i++ {
			if _, err := lab.get(ctx, "http://"+s.Plain+c.target(l, fmt.Sprintf("%s-%d", l.size.id(), i)), true); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		return nil
	}
	const warmUp = 100
	if err := ask(0, warmUp); err != nil {
		return 0, err
	}
	before, err := lab.held(ctx, c, s)
	if err != nil {
		return 0, err
	}
	if err := ask(warmUp, warmUp+lab.options.kept); err != nil {
		return 0, err
	}
	after, err := lab.held(ctx, c, s)
	return float64(after-before) / float64(lab.options.kept), err
}

func (lab *laboratory) held(ctx context.Context, c *contender, s *server) (int64, error) {
	if c.command != nil {
		var files int64
		err := filepath.WalkDir(filepath.Join(s.Dir, "cache"), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return nil //nolint:nilerr // there may be none
			}
			info, err := os.Stat(path)
			if err == nil {
				files += info.Size()
			}
			return err
		})
		return s.process.memory("VmRSS") + files, err
	}
	var a answer
	for range 2 { // what has a finalizer goes the second time
		var err error
		if a, err = lab.get(ctx, "http://"+s.Admin+"/debug/pprof/heap?gc=1&debug=1", false); err != nil {
			return 0, err
		}
	}
	_, rest, _ := strings.Cut(string(a.body), "# HeapAlloc = ")
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.ParseInt(line, 10, 64)
}

// cold counts the questions that the node gets when many callers ask for a report at once that nobody has yet.
func (lab *laboratory) cold(ctx context.Context, taking []*contender, results *results) error {
	const callers = 200
	servers, err := lab.startAll(ctx, taking)
	defer stopAll(servers)
	if err != nil {
		return err
	}
	for _, c := range taking {
		if !c.keeps {
			continue
		}
		progress.Printf("%d callers of %s", callers, c.name)
		url := "http://" + servers[c.config.Name()].Plain + c.target(load{gzip: true}, "cold-"+lab.sizes[1].id()+"-"+strings.ReplaceAll(c.name, " ", ""))
		before := lab.node.questions.Load()
		var failed atomic.Int64
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				if _, err := lab.get(ctx, url, true); err != nil {
					failed.Add(1)
				}
			})
		}
		wg.Wait()
		results.cold = append(results.cold, coldResult{c, callers, int(lab.node.questions.Load() - before), int(failed.Load())})
	}
	return nil
}

// miss measures what it takes to ask the node, beside a proxy that does nothing but that.
func (lab *laboratory) miss(ctx context.Context, taking []*contender, results *results) error {
	for _, mib := range []int{2, 16, 50} {
		id := strconv.Itoa(mib) + "MiBmiss"
		lab.node.documents[id] = makeReport(mib << 20)
		for _, c := range taking {
			if c != module && c.config != proxies {
				continue
			}
			for _, gzipped := range []bool{true, false} {
				if gzipped && c.config == proxies {
					continue
				}
				progress.Printf("%d MiB asked for through %s", mib, c.name)
				r, err := lab.missOf(ctx, c, id, gzipped)
				if err != nil {
					return err
				}
				r.contender, r.mib, r.gzip = c, mib, gzipped
				results.misses = append(results.misses, r)
			}
		}
		delete(lab.node.documents, id)
	}
	return nil
}

// missOf asks for different reports of one size, one after the other. The peak is that of the first.
func (lab *laboratory) missOf(ctx context.Context, c *contender, id string, gzipped bool) (missResult, error) {
	s, err := c.start(ctx, lab)
	if err != nil {
		return missResult{}, err
	}
	defer s.process.stop()
	if _, err := lab.get(ctx, "http://"+s.Plain+c.target(load{}, lab.sizes[0].id()+"-warm"), gzipped); err != nil {
		return missResult{}, err
	}
	var r missResult
	var took []time.Duration
	for i := range 5 {
		before := s.process.memory("VmRSS")
		if err := s.process.resetPeak(); err != nil {
			return missResult{}, err
		}
		begin := time.Now()
		if _, err := lab.get(ctx, "http://"+s.Plain+c.target(load{}, fmt.Sprintf("%s-%d", id, i)), gzipped); err != nil {
			return missResult{}, err
		}
		took = append(took, time.Since(begin))
		if i == 0 {
			r.peak = s.process.memory("VmHWM") - before
		}
	}
	r.took = median(took, func(d time.Duration) time.Duration { return d })
	return r, nil
}
