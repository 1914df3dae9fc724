package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// withStorage returns the module with a storage whose operations take that long, and with other options of `cache`.
// Without a folder, the storage keeps nothing.
func withStorage(delay time.Duration, folder string, options ...string) *contender {
	return moduleWith(fmt.Sprintf("fsbroker_task, storage of %s", delay), nodeOption,
		append(options, fmt.Sprintf("storage bench_delayed %s %s", delay, folder))...)
}

// nodeOption configures the node.
const nodeOption = "node node-1 {{.Node}} {{.Secret}}"

// moduleWith returns the module with options, and with those of `cache`.
func moduleWith(name, options string, cache ...string) *contender {
	return &contender{
		name: name,
		config: caddyConfig("storage", "", fmt.Sprintf(`
	fsbroker_task {
		secret bench {{.Secret}}
		%s
		cache {
			%s
		}
	}`, options, strings.Join(cache, "\n"))),
	}
}

// inFileSystem returns the module with Caddy's storage in files in a folder, and other options.
func inFileSystem(folder, options string) *contender {
	return moduleWith("fsbroker_task, storage file_system", options, "storage file_system "+folder)
}

// ownReports returns a plan that requests reports of a size. Each is that of another file.
func (h *harness) ownReports(size, name string, count, callers int) plan {
	return plan{
		callers: callers, count: count, want: h.node.document,
		task:  func(i int) string { return "own-" + size + "-" + name + strconv.Itoa(i) },
		query: module.request(load{}),
	}
}

// stored returns a plan that requests the reports in the folder that filled returns.
func (h *harness) stored(size size, callers int) plan {
	return h.ownReports(size.id(), "stored", h.options.stored, callers)
}

// filled returns a folder of a storage that has the reports that stored requests.
func (h *harness) filled(ctx context.Context, size size) (string, error) {
	folder := filepath.Join(h.values, "stored-"+size.id())
	if h.kept[folder] {
		return folder, nil
	}
	progress.Printf("storing %d reports of %s", h.options.stored, size.name)
	s, err := withStorage(0, folder).start(ctx, h)
	if err != nil {
		return "", err
	}
	err = h.fill(ctx, s, h.stored(size, 32))
	s.process.stop()
	if err != nil {
		return "", err
	}
	found, err := countStored(folder)
	if err == nil && found.documents != h.options.stored {
		err = fmt.Errorf("%d of %d reports were stored", found.documents, h.options.stored)
	}
	h.kept[folder] = err == nil
	return folder, err
}

// fillBoth stores reports of a size with the module of today, and with the one before.
func (h *harness) fillBoth(ctx context.Context, size size) error {
	for _, on := range h.both() {
		if _, err := on.filled(ctx, size); err != nil {
			return fmt.Errorf("%s: %w", on.module.name, err)
		}
	}
	return nil
}

// fill makes the requests of a plan in small steps, and waits after each until the reports are stored.
func (h *harness) fill(ctx context.Context, s *server, all plan) error {
	const step = 5000 // half of what the queue has room for
	for from := 0; from < all.count; from += step {
		if _, err := all.from(from, min(step, all.count-from)).runAll(ctx, s); err != nil {
			return err
		}
		if err := h.waitUntilStored(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// waitUntilStored waits until nothing is queued to the storage.
func (h *harness) waitUntilStored(ctx context.Context, s *server) error {
	for {
		queued, err := h.queued(ctx, s)
		if err != nil || queued == 0 {
			return err
		}
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

// queued returns how many values wait to be stored.
func (h *harness) queued(ctx context.Context, s *server) (int, error) {
	a, err := h.get(ctx, "http://"+s.Admin+"/fsbroker/cache", false)
	if err != nil {
		return 0, err
	}
	var caches map[string]struct{ Storage struct{ Queued int } }
	err = json.Unmarshal(a.body, &caches)
	return caches["default"].Storage.Queued, err
}

// metrics are the metrics of a server, by name and labels.
type metrics map[string]float64

func (h *harness) metrics(ctx context.Context, s *server) (metrics, error) {
	a, err := h.get(ctx, "http://"+s.Admin+"/metrics", false)
	if err != nil {
		return nil, err
	}
	all := make(metrics)
	for line := range strings.Lines(string(a.body)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if f, err := strconv.ParseFloat(value, 64); ok && err == nil {
			all[name] = f
		}
	}
	return all, nil
}

const (
	writesMetric  = "caddy_fsbroker_storage_writes_total"
	refusedMetric = "caddy_fsbroker_storage_refused_total"
	sweptMetric   = "caddy_fsbroker_storage_swept_total"
	heapMetric    = "go_memstats_heap_alloc_bytes"
)

// storedCount is how much a folder of a storage has.
type storedCount struct {
	documents int
	values    int // the documents, and the references to them
}

// valueName matches the names of values, which begin with a key. That of a reference from a file goes on with a time.
var valueName = regexp.MustCompile(`^[0-9a-f]{64}(-[0-9]+|\.large)?$`)

// countStored counts what a folder of a storage has. A folder that does not exist has nothing.
func countStored(folder string) (storedCount, error) {
	var n storedCount
	if !isThere(folder) {
		return n, nil
	}
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !valueName.MatchString(entry.Name()) {
			return err
		}
		n.values++
		switch filepath.Base(filepath.Dir(path)) {
		case "files", "damaged":
		default:
			n.documents++
		}
		return nil
	})
	return n, err
}
