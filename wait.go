package fsbroker

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// pollers polls for the reports that callers of a site wait for. All callers who wait for one report share one poller.
type pollers struct {
	resolve  func(context.Context, *query) result
	interval time.Duration
	logger   *zap.Logger
	ctx      context.Context // ends all pollers
	stop     context.CancelFunc

	mu      sync.Mutex // guards the map and all pollers
	byQuery map[query]*poller
}

// poller polls for a report until it is finished. Between two polls it has no goroutine, because the stack of one would stay
// as large as the poll has made it.
type poller struct {
	waiters int
	result  result // the newest
	timer   *time.Timer
	cancel  context.CancelFunc
	done    chan struct{} // closed when the wait is over
}

func newPollers(resolve func(context.Context, *query) result, interval time.Duration, logger *zap.Logger) *pollers {
	ps := &pollers{resolve: resolve, interval: interval, logger: logger, byQuery: make(map[query]*poller)}
	ps.ctx, ps.stop = context.WithCancel(context.Background())
	return ps
}

// wait waits up to maxWait for an unfinished report to be finished, and returns the newest result. A problem ends the
// wait as well, and so does the end of the site or of its server. If ctx has ended, the result is problem.Left.
func (ps *pollers) wait(ctx context.Context, q query, res result, maxWait time.Duration) result {
	timer := time.NewTimer(maxWait)
	defer timer.Stop()
	p, joined := ps.join(ctx, q, res)
	select {
	case <-p.done:
	case <-ps.ctx.Done():
	case <-timer.C:
	case <-ctx.Done():
	}
	res = ps.leave(q, p)
	if joined {
		upstream.LinkSpan(ctx, res.span)
	}
	if ctx.Err() != nil {
		res.problem = problem.Left
	}
	return res
}

// join adds a caller, with its own result, to those that wait for q. It starts a poller for the first one, and reports
// whether there was one already.
func (ps *pollers) join(caller context.Context, q query, res result) (p *poller, joined bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p, joined = ps.byQuery[q]
	if !joined {
		ctx, cancel := context.WithCancel(ps.ctx)
		p = &poller{result: res, cancel: cancel, done: make(chan struct{})}
		ps.byQuery[q] = p
		ctx = upstream.WithSpanOf(ctx, caller)
		p.timer = time.AfterFunc(ps.pause(res), func() { ps.poll(ctx, q, p) })
	} else if res.at().After(p.result.at()) {
		p.result = res
	}
	p.waiters++
	return p, joined
}

// leave removes a caller and returns the newest result. The poller ends when its last caller leaves.
func (ps *pollers) leave(q query, p *poller) result {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p.waiters--; p.waiters == 0 {
		p.cancel()
		p.timer.Stop()
		ps.forget(q, p)
	}
	return p.result
}

// forget keeps other callers from joining p.
func (ps *pollers) forget(q query, p *poller) {
	if ps.byQuery[q] == p {
		delete(ps.byQuery, q)
	}
}

// poll resolves q. It sets the timer for the next poll, unless the report is finished, there is a problem, or no caller waits
// any more. If resolve panics, that is the problem.
func (ps *pollers) poll(ctx context.Context, q query, p *poller) {
	res, err := guard.Call(ps.logger, func() (result, error) { return ps.resolve(ctx, &q), nil })
	if err != nil {
		res = failed(problemOf(err))
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	p.result = res
	if res.problem != nil || res.entry.report.Finished() {
		ps.forget(q, p)
		close(p.done)
		return
	}
	p.timer.Reset(ps.pause(res))
}

// pause returns the time until the next poll. Then res is no longer kept. It has jitter, so pollers that began together do
// not stay together.
func (ps *pollers) pause(res result) time.Duration {
	pause := ps.interval
	if res.kept() {
		pause -= min(max(time.Since(res.at()), 0), pause) // the clock may have stepped back
	}
	return pause + rand.N(ps.interval/10+1) //nolint:gosec // it need not be unpredictable
}

// at returns when the upstream answered. The result must have a report.
func (r result) at() time.Time { return r.entry.report.At() }
