package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"
)

// waitingTrial is a number of callers that wait for reports to be finished.
type waitingTrial struct {
	http2   bool
	callers int
	reports int // one for all callers, or one for each
}

func (t waitingTrial) protocol() string {
	if t.http2 {
		return "HTTP/2"
	}
	return "HTTP/1.1"
}

// task returns the ID of the task for which a caller waits.
func (t waitingTrial) task(size size, i int) string {
	if t.reports == 1 {
		return latePrefix + size.id()
	}
	return latePrefix + "own-" + size.id() + "-" + strconv.Itoa(i)
}

// waitingResult is what the callers of a trial cost a server.
type waitingResult struct {
	each      footprint     // per caller
	joined    time.Duration // until all callers waited
	questions float64       // requests to the node per second, while all wait
	cpu       float64       // CPU time per second, while all wait
	first     time.Duration // from the end of the tasks to the first answer
	last      time.Duration // … to the last answer
	fromNode  time.Duration // from the node's first finished report to the last answer
	answerCPU time.Duration // per caller, from the end of the tasks to the last answer
	ownCPU    time.Duration // that of the callers and the node meanwhile, per caller
}

func (r waitingResult) sample() sample {
	return sample{
		{"all wait after, ms", millis(r.joined)},
		{"heap per caller, bytes", float64(r.each.heap)},
		{"stacks per caller, bytes", float64(r.each.stacks)},
		{"resident memory per caller, bytes", float64(r.each.resident)},
		{"requests to the node/s", r.questions},
		{"CPU while all wait, ms/s", 1000 * r.cpu},
		{"first answer after, ms", millis(r.first)},
		{"last answer after, ms", millis(r.last)},
		{"last answer after the node's first, ms", millis(r.fromNode)},
		{"CPU of an answer, µs", micros(r.answerCPU)},
	}
}

// footprint is the memory of a server, in bytes.
type footprint struct {
	heap     int64 // after a garbage collection
	stacks   int64 // of goroutines
	resident int64
}

// perCaller returns how much of the memory each caller takes, given the memory before they came.
func (f footprint) perCaller(before footprint, callers int) footprint {
	n := int64(callers)
	return footprint{(f.heap - before.heap) / n, (f.stacks - before.stacks) / n, (f.resident - before.resident) / n}
}

// footprint returns the memory of a server now.
func (h *harness) footprint(ctx context.Context, c *contender, s *server) (f footprint, err error) {
	if f.heap, err = h.memoryUsed(ctx, c, s); err != nil {
		return f, err
	}
	m, err := h.metrics(ctx, s)
	f.stacks, f.resident = int64(m[stacksMetric]), s.process.memory("VmRSS")
	return f, err
}

// waitingServer is a server on which callers can wait.
type waitingServer struct {
	*contender
	gauge string                 // the metric that counts the callers that wait
	want  func(id string) []byte // what it answers in the end

	// release ends the wait of all callers.
	release func(context.Context, *server) error
}

// waitingServers returns the module and the bare handler.
func (h *harness) waitingServers() []waitingServer {
	// The site without TLS speaks HTTP/2 as well.
	const protocols = `
	servers :{{port .Plain}} {
		protocols h1 h2 h2c
	}`
	return []waitingServer{{
		contender: &contender{name: module.name, config: caddyConfig("waiting", protocols, fmt.Sprintf(`
	fsbroker_task {
		secret bench {{.Secret}}
		node node-1 {{.Node}} {{.Secret}}
		poll_interval %s
		max_wait 1h
	}`, h.options.poll))},
		gauge:   `caddy_fsbroker_waiters{namespace="default"}`,
		want:    h.node.document,
		release: func(context.Context, *server) error { h.node.late.finish(); return nil },
	}, {
		contender: &contender{
			name:   bareHandler.name,
			config: caddyConfig("waiting-bare", protocols, "bench_wait * {{.Dir}}/"+waitingRecorded),
		},
		gauge: bareWaitersMetric,
		want:  func(string) []byte { return h.sizes[0].document },
		release: func(ctx context.Context, s *server) error {
			_, err := h.get(ctx, "http://"+s.Plain+releasePath, false)
			return err
		},
	}}
}

const (
	stacksMetric = "go_memstats_stack_inuse_bytes"

	// waitingRecorded is the file of the response that the bare handler plays back.
	waitingRecorded = "waiting.response"

	// pollsCounted is for how many poll intervals requests to the node are counted.
	pollsCounted = 5

	// waitSeconds is for how long callers want to wait. It is longer than a trial takes.
	waitSeconds = 3600
)

// waitingRounds are the results of a server in a trial.
type waitingRounds struct {
	waitingTrial
	name   string
	server waitingServer
	on     *harness
	rounds []waitingResult
	floor  *waitingRounds // of the bare handler
}

func (w *waitingRounds) String() string {
	return fmt.Sprintf("%s, %d callers wait for %d reports, %s", w.name, w.callers, w.reports, w.protocol())
}

// waiting measures callers that wait for reports of 15 KB, compared with callers of a handler that does nothing but hold
// them.
func (h *harness) waiting(ctx context.Context, _ []*contender, results *results) error {
	servers := h.waitingServers()
	if err := h.recordWaiting(ctx, servers[0].contender); err != nil {
		return err
	}
	var all []*waitingRounds
	for _, t := range []waitingTrial{
		{true, h.options.waiters, 1},
		{true, h.options.waiters / 10, h.options.waiters / 10},
		{false, h.options.waiters / 10, 1},
	} {
		floor := &waitingRounds{waitingTrial: t, name: servers[1].name, server: servers[1], on: h}
		floor.floor = floor
		for _, on := range h.both() {
			all = append(all, &waitingRounds{waitingTrial: t, name: on.module.name, server: servers[0], on: on, floor: floor})
		}
		all = append(all, floor)
	}
	rounds, err := inRounds(ctx, "waiting", h.options.rounds, all, func(ctx context.Context, w *waitingRounds) (waitingResult, error) {
		return w.on.waitOn(ctx, w.server, w.waitingTrial)
	})
	if err != nil {
		return err
	}
	for i, w := range all {
		w.rounds = rounds[i]
		if w.on == h.before {
			compare(results, "waiting, "+all[i-1].String(), rounds[i-1], rounds[i])
		}
	}
	results.waiting = all
	return nil
}

// recordWaiting checks what the module answers before and after a task is finished. It saves the finished report for the
// bare handler.
func (h *harness) recordWaiting(ctx context.Context, c *contender) error {
	s, err := c.start(ctx, h)
	if err != nil {
		return err
	}
	defer s.process.stop()
	url := "http://" + s.Plain + byPair(load{}, latePrefix+h.sizes[0].id())
	r, err := h.get(ctx, url, true)
	if err == nil {
		err = r.check([]byte(pendingReport), true)
	}
	if err != nil {
		return err
	}
	h.node.late.finish()
	defer h.node.late.restart()
	if r, err = h.get(ctx, url+"&wait=60", true); err != nil {
		return err
	}
	if err := r.check(h.sizes[0].document, true); err != nil {
		return err
	}
	return h.save(waitingRecorded, recorded{Header: r.header, Body: r.body})
}

// waitOn starts a server, lets the callers of a trial wait on it, and ends their wait.
func (h *harness) waitOn(ctx context.Context, ws waitingServer, t waitingTrial) (waitingResult, error) {
	s, err := ws.start(ctx, h)
	if err != nil {
		return waitingResult{}, err
	}
	defer s.process.stop()
	h.node.late.restart()
	ctx, cancel := context.WithCancelCause(ctx)
	run := &waitingRun{harness: h, waitingServer: ws, server: s, done: make(chan struct{})}
	run.callers = &waitingCallers{
		count: t.callers, server: s, want: ws.want,
		task: func(i int) string { return t.task(h.sizes[0], i) },
	}
	err = run.join(ctx, func() {
		defer close(run.done)
		if err := run.callers.run(ctx, t.http2); err != nil {
			cancel(err)
		}
	})
	if err == nil {
		err = run.count(ctx)
	}
	if err == nil {
		err = run.finish(ctx)
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cancel(nil)
	<-run.done
	return run.result, err
}

// waitingRun is a trial on a server.
type waitingRun struct {
	*harness
	waitingServer
	server  *server
	callers *waitingCallers
	done    chan struct{} // closed when all callers have their answers, or one has failed
	result  waitingResult
}

// join starts the callers, waits until all wait, and measures the memory that they take.
func (r *waitingRun) join(ctx context.Context, start func()) error {
	before, err := r.footprint(ctx, r.contender, r.server)
	begin := time.Now()
	go start()
	for waiting := 0; err == nil && waiting < r.callers.count; {
		var m metrics
		if m, err = r.metrics(ctx, r.server); err == nil {
			waiting = int(m[r.gauge])
			err = wait(ctx, 10*time.Millisecond)
		}
	}
	if err != nil {
		return err
	}
	r.result.joined = time.Since(begin)
	after, err := r.footprint(ctx, r.contender, r.server)
	r.result.each = after.perCaller(before, r.callers.count)
	return err
}

// count counts the requests to the node while all callers wait, and measures the CPU time of the server.
func (r *waitingRun) count(ctx context.Context) error {
	asked, cpu, begin := r.node.requests.Load(), r.server.process.cpu(), time.Now()
	if err := wait(ctx, pollsCounted*r.options.poll); err != nil {
		return err
	}
	period := time.Since(begin).Seconds()
	r.result.questions = float64(r.node.requests.Load()-asked) / period
	r.result.cpu = (r.server.process.cpu() - cpu).Seconds() / period
	if n, _, _ := r.callers.answers(); n > 0 {
		return fmt.Errorf("%d callers got an answer before the report was finished", n)
	}
	return nil
}

// finish ends the wait and measures when the callers have their answers.
func (r *waitingRun) finish(ctx context.Context) error {
	cpu, own, finished := r.server.process.cpu(), ownCPU(), time.Now()
	if err := r.release(ctx, r.server); err != nil {
		return err
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	n, first, last := r.callers.answers()
	if n != r.callers.count {
		return fmt.Errorf("%d of %d callers got an answer", n, r.callers.count)
	}
	r.result.answerCPU, r.result.ownCPU = (r.server.process.cpu()-cpu)/time.Duration(n), (ownCPU()-own)/time.Duration(n)
	r.result.first, r.result.last, r.result.fromNode = first.Sub(finished), last.Sub(finished), last.Sub(finished)
	if told := r.node.late.toldAt(); !told.IsZero() {
		r.result.fromNode = last.Sub(told)
	}
	return nil
}

// printWaiting prints what callers cost while they wait, and when they get their answers.
func (r *results) printWaiting(out io.Writer) {
	fmt.Fprint(out, "\n**While callers wait**\n\n| server | protocol | callers | reports | all wait after | heap per caller, bytes | stacks per caller, bytes | "+
		"heap and stacks, times the bare handler's | resident per caller, bytes | requests to the node per s | CPU, % of a core |\n"+
		"|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, w := range r.waiting {
		fmt.Fprintf(out, "| %s | %s | %d | %d | %s | %d | %d | %.2f | %d | %.1f | %.1f |\n", w.name, w.protocol(), w.callers, w.reports,
			short(median(w.rounds, func(r waitingResult) time.Duration { return r.joined })),
			median(w.rounds, func(r waitingResult) int64 { return r.each.heap }),
			median(w.rounds, func(r waitingResult) int64 { return r.each.stacks }),
			w.timesFloor(func(r waitingResult) float64 { return float64(r.each.heap + r.each.stacks) }),
			median(w.rounds, func(r waitingResult) int64 { return r.each.resident }),
			median(w.rounds, func(r waitingResult) float64 { return r.questions }),
			100*median(w.rounds, func(r waitingResult) float64 { return r.cpu }))
	}
	fmt.Fprint(out, "\n**When all reports are finished**\n\n| server | protocol | callers | reports | first answer after | last answer after | "+
		"last answer, after the node's first finished report | that time, times the bare handler's | CPU µs per caller | of callers and node, CPU µs per caller |\n"+
		"|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, w := range r.waiting {
		fmt.Fprintf(out, "| %s | %s | %d | %d | %s | %s | %s | %.2f | %d | %d |\n", w.name, w.protocol(), w.callers, w.reports,
			short(median(w.rounds, func(r waitingResult) time.Duration { return r.first })),
			short(median(w.rounds, func(r waitingResult) time.Duration { return r.last })),
			short(median(w.rounds, func(r waitingResult) time.Duration { return r.fromNode })),
			w.timesFloor(func(r waitingResult) float64 { return r.fromNode.Seconds() }),
			median(w.rounds, func(r waitingResult) time.Duration { return r.answerCPU }).Microseconds(),
			median(w.rounds, func(r waitingResult) time.Duration { return r.ownCPU }).Microseconds())
	}
}

// timesFloor returns the median of the ratios to the bare handler in each round.
func (w *waitingRounds) timesFloor(of func(waitingResult) float64) float64 {
	ratios := make([]float64, len(w.rounds))
	for i := range w.rounds {
		ratios[i] = of(w.rounds[i]) / of(w.floor.rounds[i])
	}
	return median(ratios, func(r float64) float64 { return r })
}
