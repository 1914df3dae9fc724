package fsbroker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"iter"
	"maps"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/coalesce"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// resolver is the one way of a namespace to a report: memory, then the storage, then the upstreams, one after the other.
// What an upstream answers is kept.
type resolver struct {
	resolverOptions
	namespace string
	nodes     map[string]*upstream
	broker    *upstream // nil without a broker
	identity  task.Key  // of all upstreams: resolvers with the same identity share calls
	submitted task.Source
	shared    *shared
	archive   *archive.Archive  // nil without a storage
	follower  *harvest.Follower // nil if nothing is followed
	absent    recentKeys        // of reports that the storage did not have lately
	retired   atomic.Bool       // the configuration has ended, although requests may still be under way
}

// resolverOptions are the options of a handler that its resolver needs.
type resolverOptions struct {
	ttl, pollInterval, failDuration time.Duration
	healthTimeout                   time.Duration
	questionTimeout                 time.Duration // of all that a question of the follower does
	closeIdleConnections            func()
	logger                          *zap.Logger
}

// newResolver returns the resolver of a namespace, with nodes by their application server IDs, and a broker, if there is
// one.
func newResolver(namespace string, nodes map[string]*upstream, broker *upstream, s *shared, o resolverOptions) *resolver {
	rs := &resolver{resolverOptions: o, namespace: namespace, nodes: nodes, broker: broker, shared: s}
	rs.submitted = task.SubmissionSource(namespace)
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		nodes[name].source = task.NodeSource(namespace, name)
		parts = append(parts, name, string(nodes[name].identity[:]))
	}
	if broker != nil {
		parts = append(parts, "", string(broker.identity[:]))
	}
	rs.identity = task.NewKey(parts...)
	return rs
}

// result is a report and where it came from.
type result struct {
	fetchResult
	hit     bool // it was kept
	joined  bool // it came with the fetch of another caller
	nocache bool
	node    *origin // the node whose report it is; nil if that is not known
}

// outcome returns what the cache did for a request, given its result or the problem that took its place.
func (r result) outcome(p *problem.Problem) outcome {
	switch {
	case p != nil && p.Requested():
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

// resolve returns the report that q asks for. A hit must take little stack (see docs/ARCHITECTURE.md), so what it does not
// need is in other functions.
func (rs *resolver) resolve(ctx context.Context, q *query) (result, error) {
	if q.sha256 != "" {
		return rs.resolveFile(ctx, q.sha256, q.kind)
	}
	k, node, p := rs.key(q)
	if p != nil {
		return result{}, p
	}
	if e, ok := rs.shared.get(k); ok && !q.nocache {
		return result{fetchResult: fetchResult{entry: e}, hit: true, node: node}, nil
	}
	return rs.find(ctx, k, node, q)
}

// find returns the report under k, which memory does not have, or which is wanted from an upstream.
func (rs *resolver) find(ctx context.Context, k task.Key, node *origin, asked *query) (result, error) {
	q := asked.target()
	if q.onlyCached {
		res, err := rs.resolveStored(ctx, k, q)
		res.node = node
		return res, err
	}
	res, err := rs.call(ctx, k, q)
	switch {
	case q.nocache:
		err = rs.mentionKept(err, k)
	case err != nil && res.joined && ctx.Err() == nil:
		// The call may be that of a caller with nocache, which gets no stored report.
		if e, _ := rs.loadStored(ctx, k, q.kind); e != nil {
			return result{fetchResult: fetchResult{entry: e, stored: true}, hit: true, node: node}, nil
		}
	}
	res.node = node
	if res.from != nil && res.from.role == problem.RoleNode {
		res.node = res.from
	}
	return res, err
}

// resolveStored returns the report that is stored under k, without asking an upstream.
func (rs *resolver) resolveStored(ctx context.Context, k task.Key, q query) (result, error) {
	notCached := &problem.Problem{Kind: problem.NotCached, Detail: "no report is kept: ask without Cache-Control: only-if-cached"}
	if q.nocache { // which leaves nothing
		return result{}, notCached
	}
	e, err := rs.loadStored(ctx, k, q.kind)
	switch {
	case e != nil:
		return result{fetchResult: fetchResult{entry: e, stored: true}, hit: true}, nil
	case err != nil && ctx.Err() == nil:
		return result{}, rs.withStorageError(notCached, err)
	}
	return result{}, cmp.Or(context.Cause(ctx), error(notCached))
}

// resolveFile returns the newest finished report of a file that is kept. It asks no upstream. Another instance may have
// stored a newer one than memory has, so the storage is looked into in any case. A storage that cannot be read only matters
// if memory has none.
func (rs *resolver) resolveFile(ctx context.Context, fileSum string, kind task.Kind) (result, error) {
	sum, _ := parseSum(fileSum) // the query has been checked
	var stored fetchResult
	var err error
	if rs.archive != nil {
		k := task.FileKey(task.FileSource(rs.namespace, sum, kind), task.Key{})
		stored, _, err = rs.do(ctx, k, false, func(call context.Context, _ bool) (fetchResult, error) {
			e, err := rs.loadNewest(call, sum, kind)
			return fetchResult{entry: e, stored: true}, err
		})
		if ctx.Err() != nil {
			return result{}, context.Cause(ctx)
		}
	}
	// Memory is looked into last: the call may have begun before the caller's own report was kept.
	e := rs.shared.newest(sum, kind)
	switch {
	case stored.entry != nil && (e == nil || e.report.At().Before(stored.entry.report.At()) || e == stored.entry):
		return result{fetchResult: stored, hit: true, node: rs.nodeOf(stored.entry.key())}, nil
	case e != nil:
		return result{fetchResult: fetchResult{entry: e}, hit: true, node: rs.nodeOf(e.key())}, nil
	}
	return result{}, rs.withStorageError(&problem.Problem{
		Kind:   problem.UnknownFile,
		Detail: "no finished report of this file is kept: ask by submitID, or by appServerID and taskID, or submit the file",
	}, err)
}

// nodeOf returns the node whose report is under k, if that is a configured one.
func (rs *resolver) nodeOf(k task.Key) *origin {
	for _, u := range rs.nodes {
		if u.source == k.Source() {
			return &u.origin
		}
	}
	return nil
}

// key returns the key of the report that q asks for, and its node if that is configured.
func (rs *resolver) key(q *query) (k task.Key, node *origin, p *problem.Problem) {
	switch u := rs.nodes[q.appServerID]; {
	case rs.broker == nil && q.submitID != "":
		return k, nil, errNoBroker
	case q.submitID != "":
		return task.SubmissionKey(rs.submitted, q.submitID, q.kind), nil, nil
	case u != nil:
		return task.ReportKey(u.source, q.taskID, q.kind), &u.origin, nil
	case rs.broker == nil:
		return k, nil, errUnknownNode
	}
	return rs.keyOfOther(q), nil, nil
}

// keyOfOther is key for a task of a node that is not configured.
func (rs *resolver) keyOfOther(q *query) task.Key {
	return task.ReportKey(task.NodeSource(rs.namespace, q.appServerID), q.taskID, q.kind)
}

var (
	errNoBroker = &problem.Problem{
		Kind:   problem.NoBroker,
		Detail: "submitID cannot be resolved because no broker is configured: give appServerID and taskID",
	}
	errUnknownNode = &problem.Problem{Kind: problem.UnknownNode, Detail: "no node has this appServerID: check it"}
)

// call fetches the report under k, together with all other callers that ask for it.
func (rs *resolver) call(ctx context.Context, k task.Key, q query) (result, error) {
	nocache := q.nocache
	got, joined, err := rs.do(ctx, k, nocache, func(call context.Context, fresh bool) (fetchResult, error) {
		defer rs.closeIfRetired()
		q.nocache = fresh // a caller that joined may want no kept report
		// It may have been kept while this call waited for its turn.
		e, ok := rs.shared.get(k)
		if ok && !fresh {
			return fetchResult{entry: e}, nil
		}
		return rs.fetch(withSpanOf(call, ctx), k, e, q, fresh)
	})
	if joined {
		linkSpan(ctx, got.span)
	}
	return result{fetchResult: got, hit: got.stored, joined: joined, nocache: nocache}, err
}

// do runs a call under k for all callers that ask for it, unless there is one to join.
func (rs *resolver) do(ctx context.Context, k task.Key, fresh bool, call coalesce.Func[fetchResult]) (got fetchResult, joined bool, err error) {
	got, joined, err = rs.shared.calls.Do(ctx, rs.logger, callKey{k, rs.identity}, fresh, call)
	return got, joined, asProblem(err)
}

// closeIfRetired closes idle connections if Caddy has cleaned up the transport before.
func (rs *resolver) closeIfRetired() {
	if rs.retired.Load() {
		rs.closeIdleConnections()
	}
}

// fetch returns the report under k from the storage, or from the first upstream that knows it, and keeps it. kept is what memory
// has, or nil. A fresh fetch always asks the upstreams. A submission that was accepted through here has nothing to report yet until an upstream has
// known it.
func (rs *resolver) fetch(ctx context.Context, k task.Key, kept *entry, q query, fresh bool) (fetchResult, error) {
	if kept == nil && !rs.absent.has(k) {
		var err error
		kept, err = rs.loadStored(ctx, k, q.kind) // an upstream may know the report if the storage cannot be read
		if errors.Is(err, budget.ErrNoRoom) && !fresh {
			return fetchResult{}, problem.NoRoom
		}
		if kept != nil && !fresh {
			return fetchResult{entry: kept, stored: true}, nil
		}
	}
	a, err := rs.fetchFromUpstreams(ctx, q, fresh)
	if err == nil {
		e := rs.keep(k, q, a)
		if e.report.Finished() {
			rs.nudge(q)
		}
		return fetchResult{entry: e, from: a.from, span: lastSpan(ctx)}, nil
	}
	p, ok := errors.AsType[*problem.Problem](err)
	if ok && kept == nil && p.Kind != problem.SubmissionFailed {
		e, unreadable := rs.loadStored(ctx, k, q.kind)
		if e != nil && !fresh { // another instance has stored it meanwhile
			return fetchResult{entry: e, stored: true}, nil
		}
		err = rs.withStorageError(p, unreadable)
	}
	if rs.isAccepted(q, err) && (kept == nil || !kept.report.Known()) {
		e := rs.keep(k, q, answer{report: task.NotKnownYet(time.Now())})
		return fetchResult{entry: e, span: lastSpan(ctx)}, nil
	}
	return fetchResult{span: lastSpan(ctx)}, err
}

// answer is a report that an upstream gave.
type answer struct {
	report *task.Report
	from   *origin
	target *task.Key // of the task whose report it is, if that is another key than the one that was asked for
}

// fetchFromUpstreams returns the report from the first upstream that knows it. An upstream that fails is passed over like
// one that does not know it. If none knows it, the error is the first failure, or else that it is unknown.
func (rs *resolver) fetchFromUpstreams(ctx context.Context, q query, fresh bool) (answer, error) {
	if q.submitID != "" {
		report, err := rs.broker.fetchSubmitted(ctx, q, fresh)
		if errors.Is(err, errUnknown) {
			return rs.explainUnknown(ctx, q)
		}
		return answer{report: report, from: &rs.broker.origin}, err
	}
	var failed error
	for _, u := range [...]*upstream{rs.nodes[q.appServerID], rs.broker} {
		if u == nil {
			continue
		}
		report, err := u.fetchTask(ctx, q, fresh)
		if err == nil {
			return answer{report: report, from: &u.origin}, nil
		}
		if _, ok := errors.AsType[*problem.Problem](err); !ok && !errors.Is(err, errUnknown) {
			return answer{}, err // ctx has ended
		}
		if failed == nil && !errors.Is(err, errUnknown) {
			failed = err
		}
	}
	if failed != nil {
		return answer{}, failed
	}
	return answer{}, &problem.Problem{
		Kind:   problem.UnknownTask,
		Detail: "no upstream knows this task, or it has been deleted: check the IDs, or submit the file again",
	}
}

// explainUnknown finds out why the broker has no report of a submission. The submission may be queued, or it may be a
// task of a node. If the broker cannot be asked for the moment, that is told. An answer that cannot be used does not
// matter: the broker does not know the report.
func (rs *resolver) explainUnknown(ctx context.Context, q query) (answer, error) {
	sub, err := rs.broker.fetchSubmission(ctx, q.submitID)
	if ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	if p, ok := errors.AsType[*problem.Problem](err); ok && p.IsPassing() {
		return answer{}, p
	}
	detail := "the broker does not know this submission, or has deleted it: check submitID, or submit the file again"
	switch {
	case err != nil:
	case sub.Queued:
		return answer{report: task.NothingYet(time.Now()), from: &rs.broker.origin}, nil
	case sub.Failed:
		return answer{}, &problem.Problem{
			Kind:   problem.SubmissionFailed,
			Detail: "the broker could not give this submission to a node: submit the file again",
		}
	case rs.nodes[sub.AppServerID] != nil:
		return rs.fetchTaskOf(ctx, sub, q)
	case sub.AppServerID != "":
		detail = "the broker has no report of this submission, and its node is not configured here: the operator must add the node"
	}
	return answer{}, &problem.Problem{Kind: problem.UnknownSubmission, Detail: detail}
}

// fetchTaskOf returns the report of the task that a submission became. It is fetched together with callers that ask for
// the task.
func (rs *resolver) fetchTaskOf(ctx context.Context, sub task.Submission, q query) (answer, error) {
	q = query{appServerID: sub.AppServerID, taskID: sub.TaskID, kind: q.kind, nocache: q.nocache}
	k, node, p := rs.key(&q)
	if p != nil {
		return answer{}, p
	}
	if e, ok := rs.shared.get(k); ok && !q.nocache {
		return answer{e.report, node, &k}, nil
	}
	res, err := rs.call(ctx, k, q)
	if p, ok := errors.AsType[*problem.Problem](err); ok && p.Kind == problem.UnknownTask {
		return answer{}, &problem.Problem{
			Kind:   problem.UnknownSubmission,
			Detail: "the broker has no report of this submission, and its task is unknown, or has been deleted: submit the file again",
		}
	}
	if err != nil {
		return answer{}, err
	}
	return answer{res.entry.report, cmp.Or(res.from, node), &k}, nil
}

// keep keeps the answer to q under k. A finished report is stored as well. One that is not is kept until the follower asks again, or
// for the poll interval if that is shorter.
func (rs *resolver) keep(k task.Key, q query, a answer) *entry {
	if !a.report.Finished() {
		ttl := rs.pollInterval
		if rs.follower != nil {
			ttl = min(ttl, harvest.MaxAge)
		}
		return rs.shared.keep(k, a.report, kept{ttl: ttl})
	}
	rs.absent.remove(k)
	return rs.shared.keep(k, a.report, kept{ttl: rs.ttl, id: q.id(), kind: q.kind, target: a.target})
}

// fetchSystemInfo fetches what an upstream says about itself. An error means that ctx has ended.
func (rs *resolver) fetchSystemInfo(ctx context.Context, u *upstream) (response, systemInfo, error) {
	return u.fetchSystemInfo(ctx, rs.healthTimeout)
}

// check checks the health of an upstream.
func (rs *resolver) check(ctx context.Context, u *upstream) {
	if r, _, err := rs.fetchSystemInfo(ctx, u); err == nil {
		u.health.record(sourceCheck, r)
	}
}

// withStorageError adds to a problem that the storage cannot be read, or that there is no memory to do so. The caller must
// not take the report for unknown, or the upstream for the only cause, while the storage may have the report.
func (rs *resolver) withStorageError(p *problem.Problem, err error) error {
	switch {
	case err == nil:
		return p
	case errors.Is(err, budget.ErrNoRoom):
		return problem.NoRoom
	case p.Status() != http.StatusNotFound && p.Kind != problem.NotCached:
		return p.With("the storage that may have it cannot be read either")
	}
	detail := "no upstream knows it any more, and the storage that may have it cannot be read" + problem.TryAgain
	if !p.Requested() {
		detail = "memory does not have it, and the storage that may have it cannot be read" + problem.TryAgain
	}
	return &problem.Problem{Kind: problem.StorageUnavailable, RetryAfter: rs.failDuration, Detail: detail}
}

// loadStored returns what is stored under k, which memory keeps from then on. It returns nil if there is nothing.
func (rs *resolver) loadStored(ctx context.Context, k task.Key, kind task.Kind) (*entry, error) {
	if rs.archive == nil {
		return nil, nil
	}
	grow, release := rs.reserveStored()
	defer release()
	found, err := rs.archive.Load(ctx, k, grow)
	switch {
	case err != nil:
		return nil, err
	case found.Report == nil:
		rs.absent.add(k)
		return nil, nil
	}
	return rs.keepStored(k, kind, found), nil
}

// loadNewest returns the newest report of a file that is stored, which memory keeps from then on. It returns nil if there is
// none that is newer than what memory has.
func (rs *resolver) loadNewest(ctx context.Context, sum [sha256.Size]byte, kind task.Kind) (*entry, error) {
	var after time.Time
	if e := rs.shared.newest(sum, kind); e != nil {
		after = e.report.At()
	}
	grow, release := rs.reserveStored()
	defer release()
	found, err := rs.archive.Newest(ctx, sum, kind, after, grow)
	if err != nil || found.Report == nil {
		return nil, err
	}
	k := *found.Target
	found.Target = nil
	return rs.keepStored(k, kind, found), nil
}

// reserveStored reserves memory for a report that is read from the storage, like what is read from a node. It returns what
// extends the reservation, and what ends it.
func (rs *resolver) reserveStored() (grow func(held int64) error, release func()) {
	reading := rs.shared.budget.Reserve(&rs.shared.storage)
	return func(held int64) error {
		return reading.Grow(2 * held) // the stored value, and the report in it
	}, reading.Release
}

// keepStored keeps in memory what was found in the storage under k.
func (rs *resolver) keepStored(k task.Key, kind task.Kind, found archive.Found) *entry {
	rs.absent.remove(k)
	return rs.shared.keep(k, found.Report, kept{
		ttl: min(rs.ttl, found.TTL), kind: kind, target: found.Target, from: rs.archive, saved: !found.Queued,
	})
}

// mentionKept tells a nocache caller that gets a problem about a report that is kept.
func (rs *resolver) mentionKept(err error, k task.Key) error {
	p, ok := errors.AsType[*problem.Problem](err)
	if !ok {
		return err
	}
	e, ok := rs.shared.get(k)
	if !ok || e.report.IsEmpty() {
		return err
	}
	return p.With("a report is kept here: ask without nocache to get it")
}

// selection returns what a purge of q selects of the namespace, or what all namespaces have in common if q names nothing.
// ok reports whether an upstream can know it.
func (rs *resolver) selection(q query, common archive.Selection) (s archive.Selection, ok bool) {
	switch {
	case q.submitID != "" || q.taskID != "":
		for _, q.kind = range [...]task.Kind{task.Summary, task.Complete} {
			if k, _, p := rs.key(&q); p == nil {
				s.Keys = append(s.Keys, k)
			}
		}
		return s, s.Keys != nil
	case q.appServerID != "":
		source := task.NodeSource(rs.namespace, q.appServerID)
		return archive.Selection{Source: &source}, rs.nodes[q.appServerID] != nil || rs.broker != nil
	}
	return common, true
}

// follow follows the report that a client has asked for, and that is not finished. One that no upstream knows yet was
// followed when it was accepted.
func (rs *resolver) follow(q query, report *task.Report, client string) {
	if rs.follower != nil && q.sha256 == "" && report.Known() {
		rs.follower.Follow(harvest.Target{ID: q.id(), Client: client, Known: true, Accepted: time.Now()})
	}
}

// nudge tells the follower that a report is finished.
func (rs *resolver) nudge(q query) {
	if rs.follower != nil {
		rs.follower.Nudge(q.id())
	}
}

// isAccepted reports whether a problem means that no upstream knows a submission, although it was accepted through here.
func (rs *resolver) isAccepted(q query, err error) bool {
	p, ok := errors.AsType[*problem.Problem](err)
	return ok && p.Kind == problem.UnknownSubmission && rs.follower != nil && rs.follower.Accepted(q.submitID)
}

// firstUpstream returns the name of the upstream that is asked first for a target. It implements harvest.Source.
func (rs *resolver) firstUpstream(t harvest.Target) string {
	if u := rs.nodes[t.AppServerID]; u != nil && t.SubmitID == "" {
		return "node " + u.name
	}
	return "broker"
}

var (
	errNoRoom  = errors.New("max_size leaves no room for its report")
	errTooSlow = errors.New("the upstreams and the storage take too long")
)

// fetchFollowed fetches the report of a target. It implements harvest.Source.
func (rs *resolver) fetchFollowed(ctx context.Context, t harvest.Target, kind task.Kind) (harvest.Outcome, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, rs.questionTimeout, errTooSlow)
	defer cancel()
	res, err := rs.resolve(ctx, &query{submitID: t.SubmitID, appServerID: t.AppServerID, taskID: t.TaskID, kind: kind})
	p, isProblem := errors.AsType[*problem.Problem](err)
	switch {
	case err == nil && !res.entry.report.Known():
		return harvest.Outcome{State: harvest.Unknown}, nil
	case err == nil && !res.entry.report.Finished():
		return harvest.Outcome{State: harvest.Unfinished}, nil
	case err == nil && rs.archive == nil && res.entry.unkept:
		return harvest.Outcome{}, errNoRoom
	case err == nil:
		return harvest.Outcome{
			State: harvest.Finished, Report: res.entry.report, Saved: rs.shared.saving.isSaved(res.entry, rs.archive), Key: res.entry.key(),
		}, nil
	case !isProblem:
		return harvest.Outcome{}, err
	case p.Kind == problem.UnknownSubmission, p.Kind == problem.UnknownTask:
		return harvest.Outcome{State: harvest.Unknown}, nil
	case p.Kind == problem.SubmissionFailed:
		return harvest.Outcome{State: harvest.Failed}, nil
	}
	return harvest.Outcome{RetryAfter: p.RetryAfter}, errors.New(p.Code())
}

// asProblem returns the problem that an error means if a call has panicked, or else the error. What a storage has wrapped is a
// failure of the storage like any other.
func asProblem(err error) error {
	if err == guard.ErrPanic { //nolint:errorlint // on purpose
		return problem.Panicked
	}
	return err
}
