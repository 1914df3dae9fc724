package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// keeper is a contender that finds its reports in files after a restart.
type keeper struct {
	name string

	// fill returns a folder in memory that has the reports of a size.
	fill func(h *harness, ctx context.Context, size size) (string, error)

	// with returns the contender with a folder for its reports.
	with func(folder string) *contender
}

// keepers lists all keepers, the module first.
var keepers = []keeper{
	{module.name, (*harness).filled, func(folder string) *contender {
		return moduleWith(module.name, nodeOption, "max_size 2GiB", "storage file_system "+folder)
	}},
	{bareHandler.name, (*harness).filledBare, storedBare},
	{"nginx", (*harness).filledNginx, func(folder string) *contender { return nginxWith("nginx", 1, folder) }},
	{"nginx, level 6", (*harness).filledNginx, func(folder string) *contender { return nginxWith("nginx, level 6", 6, folder) }},
}

// keepers returns all keepers, the module before after that of today.
func (h *harness) keepers() []keeper {
	if h.before == nil {
		return keepers
	}
	before := keepers[0]
	before.name = h.before.module.name
	before.fill = func(h *harness, ctx context.Context, size size) (string, error) { return h.before.filled(ctx, size) }
	before.with = func(folder string) *contender { return keepers[0].with(folder).before(h.before.module.program) }
	return slices.Insert(slices.Clone(keepers), 1, before)
}

// filledNginx returns a folder of nginx that has the reports that stored requests.
func (h *harness) filledNginx(ctx context.Context, size size) (string, error) {
	folder := filepath.Join(h.values, "nginx-"+size.id())
	if h.kept[folder] {
		return folder, nil
	}
	progress.Printf("caching %d reports of %s in nginx", h.options.stored, size.name)
	s, err := nginxWith("nginx", 1, folder).start(ctx, h)
	if err != nil {
		return "", err
	}
	_, err = h.stored(size, 32).runAll(ctx, s)
	s.process.stop()
	h.kept[folder] = err == nil
	return folder, err
}

// onDisk returns a copy of a folder on the disk. The page cache has what is in it.
func (h *harness) onDisk(folder string) (string, error) {
	name, err := filepath.Rel(h.values, folder)
	if err != nil {
		return "", err
	}
	other := filepath.Join(h.dir, name)
	if h.kept[other] {
		return other, nil
	}
	err = os.CopyFS(other, os.DirFS(folder))
	syscall.Sync() // so that nothing is written while servers are measured
	h.kept[other] = err == nil
	return other, err
}

// restartTrial is a contender with its reports in a folder, under a load.
type restartTrial struct {
	load
	*contender
	place string // of the folder
}

func (t restartTrial) String() string {
	return fmt.Sprintf("%s, %s, %s", t.contender.name, t.place, t.load)
}

// restartResult is how fast a contender responds after a restart, and then again.
type restartResult struct {
	restartTrial
	restarted

	// The module's rate after the restart, and its CPU time per report, divided by those of the contender.
	rate, cpu float64
}

// restart measures how fast servers respond after a restart, with reports that they have in files. Each is requested once,
// and then again. The node does not know them any more.
func (h *harness) restart(ctx context.Context, participants []*contender, results *results) error {
	trials, err := h.restartTrials(ctx, participants)
	if err != nil {
		return err
	}
	h.node.forgets.Store(true)
	defer h.node.forgets.Store(false)
	rounds, err := inRounds(ctx, "restart", h.options.rounds, trials, h.restartOf)
	var ours []restartResult // of the module, which comes first under each load
	for _, theirs := range rounds {
		if theirs[0].contender.name == module.name {
			ours = theirs
		}
		for i, r := range theirs {
			theirs[i].rate = ours[i].cold.perSecond() / r.cold.perSecond()
			theirs[i].cpu = float64(ours[i].cold.cpuPerReport()) / float64(r.cold.cpuPerReport())
		}
	}
	results.restarts = rounds
	compareContenders(results, "restart", rounds)
	return err
}

// restartOf measures a trial once. No request may fail.
func (h *harness) restartOf(ctx context.Context, t restartTrial) (restartResult, error) {
	p := h.stored(t.size, t.conns)
	p.identity = !t.gzip
	r, err := h.restarted(ctx, t.contender, p)
	return restartResult{restartTrial: t, restarted: r}, cmp.Or(err, r.cold.err(), r.warm.err())
}

// restartTrials returns the trials of the participants, for which it stores reports.
func (h *harness) restartTrials(ctx context.Context, participants []*contender) ([]restartTrial, error) {
	var trials []restartTrial
	for _, place := range []string{"memory", "disk"} {
		for _, size := range h.sizes[:2] {
			for _, gzip := range []bool{true, false} {
				for _, k := range h.keepers() {
					if !slices.ContainsFunc(participants, func(c *contender) bool { return c.name == k.name }) {
						continue
					}
					if k.name == bareHandler.name && !gzip { // it cannot inflate
						continue
					}
					folder, err := k.fill(h, ctx, size)
					if err == nil && place == "disk" {
						folder, err = h.onDisk(folder)
					}
					if err != nil {
						return nil, err
					}
					trials = append(trials, restartTrial{load{size: size, gzip: gzip, conns: 32}, k.with(folder), place})
				}
			}
		}
	}
	return trials, nil
}

// printRestarts prints the medians of the rounds, and whether the goals were met.
func (r *results) printRestarts(out io.Writer) {
	fmt.Fprint(out, "\n**After a restart, with the reports in files, and the same reports again**\n\n"+
		"| files in | load | server | after the restart, reports/s | p50 | p99 | server CPU µs per report | CPUs busy | again, reports/s | server CPU µs per report | CPUs busy "+
		"| after the restart / again | after the restart, the module is … times as fast | and its CPU time … times as much |\n"+
		"|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, rounds := range r.restarts {
		cold := func(r restartResult) calls { return r.cold }
		warm := func(r restartResult) calls { return r.warm }
		fmt.Fprintf(out, "| %s | %s | %s | %.0f | %s | %s |%s %.0f |%s %.2f | %.2f | %.2f |\n",
			rounds[0].place, rounds[0].load, rounds[0].contender.name,
			median(rounds, func(r restartResult) float64 { return r.cold.perSecond() }),
			short(median(rounds, func(r restartResult) time.Duration { return r.cold.percentile(50) })),
			short(median(rounds, func(r restartResult) time.Duration { return r.cold.percentile(99) })),
			cpuColumns(rounds, cold),
			median(rounds, func(r restartResult) float64 { return r.warm.perSecond() }),
			cpuColumns(rounds, warm),
			medianRatio(rounds), medianRate(rounds), median(rounds, func(r restartResult) float64 { return r.cpu }))
	}
	r.printRestartGoals(out)
}

// cpuColumns returns the columns of the server's CPU time.
func cpuColumns(rounds []restartResult, of func(restartResult) calls) string {
	each := median(rounds, func(r restartResult) time.Duration { return of(r).cpuPerReport() })
	return fmt.Sprintf(" %.0f | %.2f |", micros(each), median(rounds, func(r restartResult) float64 { return of(r).busy() }))
}

func medianRatio(rounds []restartResult) float64 {
	return median(rounds, func(r restartResult) float64 { return r.ratio() })
}

func medianRate(rounds []restartResult) float64 {
	return median(rounds, func(r restartResult) float64 { return r.rate })
}

// printRestartGoals prints the worst results for the goals.
func (r *results) printRestartGoals(out io.Writer) {
	fmt.Fprint(out, "\n| goal | worst result | files in | load | |\n|---|--:|---|---|---|\n")
	for _, g := range []struct {
		text    string
		name    string
		minimum float64
		of      func([]restartResult) float64
		loads   func(load) bool
	}{
		{"after a restart, 0.5 of the rate of hits in memory", module.name, 0.5, medianRatio, func(load) bool { return true }},
		{"after a restart, ahead of nginx where gzip is accepted", "nginx", 1, medianRate, httpGzip},
		{"after a restart, ahead of nginx (level 6) where gzip is accepted", "nginx, level 6", 1, medianRate, httpGzip},
	} {
		var worst []restartResult
		for _, rounds := range r.restarts {
			if rounds[0].contender.name == g.name && g.loads(rounds[0].load) && (worst == nil || g.of(rounds) < g.of(worst)) {
				worst = rounds
			}
		}
		if worst != nil {
			fmt.Fprintf(out, "| %s | %.2f | %s | %s | %s |\n", g.text, g.of(worst), worst[0].place, worst[0].load, verdict(g.of(worst) >= g.minimum))
		}
	}
}
