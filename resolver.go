package fsbroker

import (
	"context"
	"errors"
	"iter"
	"sync/atomic"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// resolver is the one way to a report: memory, then the storage, then an upstream. What an upstream answers is kept.
type resolver struct {
	resolverOptions
	nodes   map[string]*upstream
	broker  *upstream // nil without a broker
	shared  *shared
	archive *archive.Archive // nil without a storage
	retired atomic.Bool      // the configuration has ended, although requests may still be under way
}

// resolverOptions are the options of a handler that its resolver needs.
type resolverOptions struct {
	ttl, pollInterval, failDuration time.Duration
	healthTimeout                   time.Duration
	closeIdleConnections            func()
}

// result is a report and where it came from.
type result struct {
	fetchResult
	hit     bool // it was kept
	joined  bool // it came with the fetch of another caller
	nocache bool
	node    *upstream // whose report it is; nil if that is not known
}

// outcome returns what the cache did for a request, given its result or the problem that took its place.
func (r result) outcome(p *problem) outcome {
	switch {
	case p != nil && p.requested():
		return outcomeError
	case p != nil || r.entry == nil:
		return outcomeNone
	case r.stored:
		return outcomeStorage
	case r.hit:
		return outcomeHit
	case r.joined:
		return outcomeCollapsed
	case r.nocache:
		return outcomeBypass
	}
	return outcomeMiss
}

// upstreams iterates over the nodes, and the broker if there is one.
func (rs *resolver) upstreams() iter.Seq[*upstream] {
	return func(yield func(*upstream) bool) {
		for _, node := range rs.nodes {
			if !yield(node) {
				return
			}
		}
		if rs.broker != nil {
			yield(rs.broker)
		}
	}
}

// resolve returns the report that q asks for.
func (rs *resolver) resolve(ctx context.Context, q query) (result, error) {
	if q.submitID != "" {
		res, err := rs.resolveSubmission(ctx, q)
		if err != nil {
			return res, err
		}
		sub := res.entry.submission()
		if sub.Queued() {
			res.entry = &entry{value: task.NothingYet(sub.At()), number: res.entry.number}
			return res, nil
		}
		q.appServerID, q.taskID = sub.AppServerID(), sub.TaskID()
	}
	node, ok := rs.nodes[q.appServerID]
	if !ok {
		return result{}, unknownNode(q)
	}
	k := task.ReportKey(node.address, q.taskID, q.all)
	res, err := rs.lookUp(ctx, node, k, q, (*resolver).fetchReport)
	res.node = node
	return res, err
}

// resolveSubmission returns what became of a submission.
func (rs *resolver) resolveSubmission(ctx context.Context, q query) (result, error) {
	if rs.broker == nil {
		return result{}, &problem{
			kind:   problemNoBroker,
			detail: "submitID cannot be resolved because no broker is configured: give appServerID and taskID",
		}
	}
	return rs.lookUp(ctx, rs.broker, task.SubmissionKey(rs.broker.address, q.submitID), q, (*resolver).fetchSubmission)
}

// fetchFunc fetches what q asks for and keeps it under k. A fresh fetch does not take what is stored if it may have
// changed. It is a method expression, because a method value would be allocated for every hit.
type fetchFunc func(rs *resolver, ctx context.Context, u *upstream, k task.Key, q query, fresh bool) (fetchResult, error)

// lookUp returns what memory keeps under k if that answers q, or calls fetch.
func (rs *resolver) lookUp(ctx context.Context, u *upstream, k task.Key, q query, fetch fetchFunc) (result, error) {
	e, ok := rs.shared.get(k)
	if !ok || !answers(e, q.nocache) {
		return rs.call(ctx, u, k, q, fetch)
	}
	if rs.archive != nil && e.unsaved.Load() {
		rs.save(e)
	}
	return result{fetchResult: fetchResult{entry: e}, hit: true}, nil
}

// answers reports whether a kept entry is an answer for a caller, or for one that wants a fresh answer. What became of a
// submission never changes, so it answers both.
func answers(e *entry, fresh bool) bool {
	if sub, ok := e.value.(*task.Submission); ok {
		return !fresh || !sub.Queued()
	}
	return !fresh
}

// call calls fetch, together with all other callers that ask for the same.
func (rs *resolver) call(ctx context.Context, u *upstream, k task.Key, q query, fetch fetchFunc) (result, error) {
	got, joined, err := rs.shared.calls.Do(ctx, callKey{k, u.identity}, q.nocache,
		func(ctx context.Context, fresh bool) (fetchResult, error) {
			// It may have been kept while this call waited for its turn.
			if e, ok := rs.shared.get(k); ok && answers(e, fresh) {
				return fetchResult{entry: e}, nil
			}
			return fetch(rs, ctx, u, k, q, fresh)
		})
	if q.nocache {
		err = rs.mentionKept(err, k)
	}
	if rs.retired.Load() { // Caddy has cleaned up the transport before
		rs.closeIdleConnections()
	}
	return result{fetchResult: got, hit: got.stored, joined: joined, nocache: q.nocache}, err
}

// fetchReport is the fetchFunc of reports. An unfinished report does not replace a finished one.
func (rs *resolver) fetchReport(ctx context.Context, node *upstream, k task.Key, q query, fresh bool) (fetchResult, error) {
	var unreadable error
	if _, ok := rs.shared.get(k); !ok {
		e, err := rs.loadStored(ctx, k)
		if e != nil && !fresh {
			return fetchResult{entry: e, stored: true}, nil
		}
		unreadable = err
	}
	budget := rs.shared.reserve()
	defer budget.release()
	report, err := node.fetchReport(ctx, q.taskID, q.all, budget)
	if err != nil {
		return fetchResult{}, rs.withStorageError(err, unreadable)
	}
	var got fetchResult
	switch kept, ok := rs.shared.get(k); {
	case report.Finished():
		got.entry = rs.shared.put(k, report, rs.ttl)
		rs.save(got.entry)
	case ok && kept.report().Finished():
		got.entry = &entry{value: report}
	default:
		got.entry = rs.shared.put(k, report, rs.pollInterval)
	}
	return got, nil
}

// fetchSubmission is the fetchFunc of submissions. What became of a submission never changes.
func (rs *resolver) fetchSubmission(ctx context.Context, broker *upstream, k task.Key, q query, _ bool) (fetchResult, error) {
	e, unreadable := rs.loadStored(ctx, k)
	if e != nil {
		return fetchResult{entry: e}, nil
	}
	budget := rs.shared.reserve()
	defer budget.release()
	sub, err := broker.fetchSubmission(ctx, q.submitID, budget)
	if err != nil {
		return fetchResult{}, rs.withStorageError(err, unreadable)
	}
	if sub.Queued() {
		return fetchResult{entry: rs.shared.put(k, sub, rs.pollInterval)}, nil
	}
	e = rs.shared.put(k, sub, rs.ttl)
	rs.save(e)
	return fetchResult{entry: e}, nil
}

// fetchSystemInfo fetches what a node says about itself. An error means that ctx has ended.
func (rs *resolver) fetchSystemInfo(ctx context.Context, node *upstream) (response, systemInfo, error) {
	budget := rs.shared.reserve()
	defer budget.release()
	return node.fetchSystemInfo(ctx, rs.healthTimeout, budget)
}

// check checks the health of a node.
func (rs *resolver) check(ctx context.Context, node *upstream) {
	if r, _, err := rs.fetchSystemInfo(ctx, node); err == nil {
		node.health.record(sourceCheck, r)
	}
}

// withStorageError adds to a problem that the storage cannot be read. The caller must not take the report for unknown, or
// the upstream for the only cause, while the storage may have the report.
func (rs *resolver) withStorageError(err, unreadable error) error {
	p, ok := errors.AsType[*problem](err)
	switch {
	case !ok || unreadable == nil || p.kind == problemSubmissionFailed:
		return err
	case p.kind != problemUnknownTask && p.kind != problemUnknownSubmission:
		return p.with("the storage that may have it cannot be read either")
	}
	return &problem{
		kind: problemStorageUnavailable, retryAfter: rs.failDuration,
		detail: "its origin does not know it any more, and the storage that may have it cannot be read: try again after Retry-After",
	}
}

// loadStored returns what is stored under k, which memory keeps from then on. It returns nil if there is nothing.
func (rs *resolver) loadStored(ctx context.Context, k task.Key) (*entry, error) {
	if rs.archive == nil {
		return nil, nil
	}
	value, ttl, err := rs.archive.Load(ctx, k, rs.failDuration)
	if err != nil || value == nil {
		return nil, err
	}
	return rs.shared.put(k, value, min(rs.ttl, ttl)), nil
}

// save stores an entry. If there is no storage yet, or no room in its queue, the entry is saved when it is requested
// again.
func (rs *resolver) save(e *entry) {
	e.unsaved.Store(rs.archive == nil || !rs.archive.Save(e.key, e.value))
}

// unknownNode says whether the query or the configuration must be corrected.
func unknownNode(q query) *problem {
	p := &problem{kind: problemUnknownNode, detail: "no node has this appServerID: check it"}
	if q.submitID != "" {
		p.detail = "the submission went to a node that is not configured here: the operator must add it"
	}
	return p
}

// mentionKept tells a nocache caller that gets a problem about a report that is kept.
func (rs *resolver) mentionKept(err error, k task.Key) error {
	p, ok := errors.AsType[*problem](err)
	if !ok {
		return err
	}
	e, ok := rs.shared.get(k)
	if !ok {
		return err
	}
	if report, ok := e.value.(*task.Report); !ok || report.IsEmpty() {
		return err
	}
	return p.with("a report is kept here: ask without nocache to get it")
}

// reportKeys returns the keys of both reports of a task, if its node is configured.
func (rs *resolver) reportKeys(appServerID, taskID string) []task.Key {
	node, ok := rs.nodes[appServerID]
	if !ok {
		return nil
	}
	return []task.Key{task.ReportKey(node.address, taskID, false), task.ReportKey(node.address, taskID, true)}
}
