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

	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/coalesce"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// resolver is the one way of a site to a report. It looks into memory first, then into the storage. Then it asks the
// upstreams, one after the other. What an upstream answers is kept.
type resolver struct {
	resolverOptions
	ns        *namespace
	nodes     map[string]node
	broker    *upstream.Upstream // nil without a broker
	identity  task.Key           // of all upstreams: resolvers with the same identity share calls
	submitted task.Source
	absent    recentKeys  // of reports that the storage did not have lately
	retired   atomic.Bool // the configuration has ended, although requests may still be under way
}

// node is a configured node.
type node struct {
	*upstream.Upstream
	source task.Source // of its reports: it begins their keys
}

// resolverOptions are what a resolver needs of its site.
type resolverOptions struct {
	archive  *archive.Archive  // nil without a storage
	follower *harvest.Follower // nil if nothing is followed

	ttl, pollInterval, failDuration time.Duration
	questionTimeout                 time.Duration // for one question of the follower, with all that it causes
	closeIdleConnections            func()
	logger                          *zap.Logger
}

// newResolver returns a resolver for a namespace, with nodes by their application server IDs, and a broker, if there is one.
func newResolver(ns *namespace, nodes map[string]*upstream.Upstream, broker *upstream.Upstream, o resolverOptions) *resolver {
	rs := &resolver{
		resolverOptions: o, ns: ns, nodes: make(map[string]node, len(nodes)), broker: broker, submitted: task.SubmissionSource(ns.name),
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		rs.nodes[name] = node{nodes[name], task.NodeSource(ns.name, name)}
		identity := nodes[name].Identity()
		parts = append(parts, name, string(identity[:]))
	}
	if broker != nil {
		identity := broker.Identity()
		parts = append(parts, "", string(identity[:]))
	}
	rs.identity = task.NewKey(parts...)
	return rs
}

// result is what a request gets: a report and where it came from, or the problem that took its place.
type result struct {
	problem *problem.Problem   // nil if there is a report
	entry   *entry             // the report; nil if there is a problem, unless its caller has left
	node    *upstream.Origin   // whose report it is; nil if that is not known
	from    *upstream.Origin   // the upstream whose report was fetched; nil if what was asked for was kept
	span    *trace.SpanContext // of the request to the upstream; nil if nothing is traced

	hit     bool // it came from memory
	stored  bool // it came from the storage
	joined  bool // it came with the call of another caller
	nocache bool // its caller wanted no kept report
}

// kept reports whether the report was kept before it was asked for.
func (r *result) kept() bool { return r.hit || r.stored }

// outcome returns what the cache did for a request.
func (r *result) outcome() outcome {
	switch p := r.problem; {
	case p != nil && p.Requested():
		return outcomeError
	case p != nil && p.Kind != problem.CallerLeft, r.entry == nil:
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

// failed returns the result of a request that gets a problem.
func failed(p *problem.Problem) result { return result{problem: p} }

// upstreams iterates over the nodes, and the broker if there is one.
func (rs *resolver) upstreams() iter.Seq[*upstream.Upstream] {
	return func(yield func(*upstream.Upstream) bool) {
		for _, node := range rs.nodes {
			if !yield(node.Upstream) {
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
func (rs *resolver) resolve(ctx context.Context, q *query) result {
	if q.sha256 != "" {
		return rs.resolveFile(ctx, q.sha256, q.kind)
	}
	k, node, p := rs.key(&q.target)
	if p != nil {
		return failed(p)
	}
	if e, ok := rs.ns.memory.get(k); ok && !q.nocache {
		return result{entry: e, hit: true, node: node}
	}
	return rs.find(ctx, k, node, q)
}

// find returns the report under k, which memory does not have, or which is wanted from an upstream.
func (rs *resolver) find(ctx context.Context, k task.Key, node *upstream.Origin, q *query) (res result) {
	if q.onlyCached {
		res = rs.resolveStored(ctx, k, q)
	} else {
		res = rs.call(ctx, k, q.target, q.nocache)
		switch p := res.problem; {
		case p == nil || ctx.Err() != nil:
		case q.nocache:
			res.problem = rs.mentionKept(p, k)
		case res.joined:
			// The call may be that of a caller with nocache, which gets no stored report.
			if e, _ := rs.loadStored(ctx, k, q.kind); e != nil {
				res = result{entry: e, stored: true}
			}
		}
	}
	res.node = node
	if res.from != nil && res.from.Role == problem.RoleNode {
		res.node = res.from
	}
	return res
}

// resolveStored returns the report that is stored under k. It asks no upstream.
func (rs *resolver) resolveStored(ctx context.Context, k task.Key, q *query) result {
	if q.nocache { // which leaves nothing
		return failed(errNotCached)
	}
	e, err := rs.loadStored(ctx, k, q.kind)
	switch {
	case e != nil:
		return result{entry: e, stored: true}
	case ctx.Err() != nil:
		return failed(problem.Left)
	}
	return failed(rs.withStorageError(errNotCached, err))
}

// resolveFile returns the newest finished report of a file that is kept. It asks no upstream. Another instance may have
// stored a newer one than memory has, so the storage is looked into in any case. A storage that cannot be read only matters
// if memory has none.
func (rs *resolver) resolveFile(ctx context.Context, fileSum string, kind task.Kind) result {
	sum, _ := parseSum(fileSum) // the query has been checked
	stored := failed(errUnknownFile)
	if rs.archive != nil {
		k := task.FileKey(task.FileSource(rs.ns.name, sum, kind), task.Key{})
		stored = rs.do(ctx, k, false, func(call context.Context, _ bool) (result, error) {
			e, err := rs.loadNewest(call, sum, kind)
			if e == nil {
				return failed(rs.withStorageError(errUnknownFile, err)), nil
			}
			return result{entry: e, stored: true}, nil
		})
		if ctx.Err() != nil {
			return failed(problem.Left)
		}
	}
	// Memory is looked into last: the call may have begun before the caller's own report was kept.
	e := rs.ns.memory.newest(sum, kind)
	switch {
	case stored.entry != nil && (e == nil || e.report.At().Before(stored.entry.report.At()) || e == stored.entry):
		return result{entry: stored.entry, stored: true, node: rs.nodeOf(stored.entry.key())}
	case e != nil:
		return result{entry: e, hit: true, node: rs.nodeOf(e.key())}
	}
	return failed(stored.problem)
}

// nodeOf returns the node whose report is under k, if that is a configured one.
func (rs *resolver) nodeOf(k task.Key) *upstream.Origin {
	for _, n := range rs.nodes {
		if n.source == k.Source() {
			return &n.Origin
		}
	}
	return nil
}

// key returns the key of a report, and its node if that is configured.
func (rs *resolver) key(t *target) (k task.Key, node *upstream.Origin, p *problem.Problem) {
	switch n := rs.nodes[t.AppServerID]; {
	case rs.broker == nil && t.SubmitID != "":
		return k, nil, errNoBroker
	case t.SubmitID != "":
		return task.SubmissionKey(rs.submitted, t.SubmitID, t.kind), nil, nil
	case n.Upstream != nil:
		return task.ReportKey(n.source, t.TaskID, t.kind), &n.Origin, nil
	case rs.broker == nil:
		return k, nil, errUnknownNode
	}
	return rs.keyOfOther(t), nil, nil
}

// keyOfOther is key for a task of a node that is not configured.
func (rs *resolver) keyOfOther(t *target) task.Key {
	return task.ReportKey(task.NodeSource(rs.ns.name, t.AppServerID), t.TaskID, t.kind)
}

var (
	errNoBroker = &problem.Problem{
		Kind:   problem.NoBroker,
		Detail: "submitID cannot be resolved because no broker is configured: give appServerID and taskID",
	}
	errUnknownNode = &problem.Problem{Kind: problem.UnknownNode, Detail: "no node has this appServerID: check it"}
	errUnknownTask = &problem.Problem{
		Kind:   problem.UnknownTask,
		Detail: "no upstream knows this task, or it has been deleted: check the IDs, or submit the file again",
	}
	errUnknownFile = &problem.Problem{
		Kind:   problem.UnknownFile,
		Detail: "no finished report of this file is kept: ask by submitID, or by appServerID and taskID, or submit the file",
	}
	errNotCached = &problem.Problem{Kind: problem.NotCached, Detail: "no report is kept: ask without Cache-Control: only-if-cached"}
)

// call fetches the report under k, together with all other callers that ask for it. The call is fresh if one of them wants no
// kept report.
func (rs *resolver) call(ctx context.Context, k task.Key, t target, nocache bool) result {
	res := rs.do(ctx, k, nocache, func(call context.Context, fresh bool) (result, error) {
		defer rs.closeIfRetired()
		// It may have been kept while this call waited for its turn.
		e, ok := rs.ns.memory.get(k)
		if ok && !fresh {
			return result{entry: e}, nil
		}
		return rs.fetch(upstream.WithSpanOf(call, ctx), k, e, t, fresh), nil
	})
	if res.joined {
		upstream.LinkSpan(ctx, res.span)
	}
	res.nocache = nocache
	return res
}

// do runs a call under k for all callers that ask for it, unless there is one to join.
func (rs *resolver) do(ctx context.Context, k task.Key, fresh bool, call coalesce.Func[result]) result {
	res, joined, err := rs.ns.calls.Do(ctx, rs.logger, callKey{k, rs.identity}, fresh, call)
	if err != nil {
		res = failed(problemOf(err))
	}
	res.joined = joined
	return res
}

// problemOf returns the problem of a call that has no result: it has panicked, or its caller has left.
func problemOf(err error) *problem.Problem {
	if errors.Is(err, guard.ErrPanic) {
		return problem.Panicked
	}
	return problem.Left
}

// closeIfRetired closes idle connections if Caddy has cleaned up the transport before.
func (rs *resolver) closeIfRetired() {
	if rs.retired.Load() {
		rs.closeIdleConnections()
	}
}

// fetch returns the report under k from the storage, or from the first upstream that knows it, and keeps it. kept is what
// memory has, or nil. A fresh fetch always asks the upstreams. A submission that was accepted through here has nothing to report
// yet until an upstream has known it.
func (rs *resolver) fetch(ctx context.Context, k task.Key, kept *entry, t target, fresh bool) result {
	if kept == nil && !rs.absent.has(k) {
		var err error
		kept, err = rs.loadStored(ctx, k, t.kind) // an upstream may know the report if the storage cannot be read
		switch {
		case fresh:
		case errors.Is(err, budget.ErrNoRoom):
			return failed(problem.NoRoom)
		case kept != nil:
			return result{entry: kept, stored: true}
		}
	}
	res := rs.ask(ctx, k, t, fresh)
	res.span = upstream.LastSpan(ctx)
	switch p := res.problem; {
	case p == nil:
		if res.entry.report.Finished() {
			rs.nudge(t)
		}
		return res
	case p.Kind == problem.CallerLeft:
		return res
	case kept == nil && p.Kind != problem.SubmissionFailed:
		e, unreadable := rs.loadStored(ctx, k, t.kind)
		if e != nil && !fresh { // another instance has stored it meanwhile
			return result{entry: e, stored: true}
		}
		res.problem = rs.withStorageError(p, unreadable)
	}
	if rs.isAccepted(t, res.problem) && (kept == nil || !kept.report.Known()) {
		res.entry, res.problem = rs.keep(k, t, task.NotKnownYet(time.Now()), nil), nil
	}
	return res
}

// ask asks the upstreams, one after the other, for the report under k, and keeps it. An upstream that fails is passed over like
// one that does not know it. If none knows it, the problem is the first failure, or else that it is unknown.
func (rs *resolver) ask(ctx context.Context, k task.Key, t target, fresh bool) result {
	if t.SubmitID != "" {
		switch report, p := rs.broker.FetchSubmitted(ctx, t.SubmitID, t.kind, fresh); {
		case p != nil:
			return failed(p)
		case report != nil:
			return result{entry: rs.keep(k, t, report, nil), from: &rs.broker.Origin}
		}
		return rs.explainUnknown(ctx, k, t, fresh)
	}
	var first *problem.Problem
	for _, u := range [...]*upstream.Upstream{rs.nodes[t.AppServerID].Upstream, rs.broker} {
		if u == nil {
			continue
		}
		switch report, p := u.FetchTask(ctx, t.AppServerID, t.TaskID, t.kind, fresh); {
		case report != nil:
			return result{entry: rs.keep(k, t, report, nil), from: &u.Origin}
		case p != nil && p.Kind == problem.CallerLeft:
			return failed(p)
		default:
			first = cmp.Or(first, p)
		}
	}
	return failed(cmp.Or(first, errUnknownTask))
}

// explainUnknown finds out why the broker has no report of a submission. The submission may be queued, or it may be a
// task of a node. If the broker cannot be asked for the moment, that is told. An answer that cannot be used does not
// matter: the broker does not know the report.
func (rs *resolver) explainUnknown(ctx context.Context, k task.Key, t target, fresh bool) result {
	sub, p := rs.broker.FetchSubmission(ctx, t.SubmitID)
	if p != nil && (p.Kind == problem.CallerLeft || p.IsPassing()) {
		return failed(p)
	}
	detail := "the broker does not know this submission, or has deleted it: check submitID, or submit the file again"
	switch {
	case sub == nil:
	case sub.Queued:
		return result{entry: rs.keep(k, t, task.NothingYet(time.Now()), nil), from: &rs.broker.Origin}
	case sub.Failed:
		return failed(&problem.Problem{
			Kind:   problem.SubmissionFailed,
			Detail: "the broker could not give this submission to a node: submit the file again",
		})
	case rs.nodes[sub.AppServerID].Upstream != nil:
		return rs.fetchTaskOf(ctx, k, t, sub, fresh)
	case sub.AppServerID != "":
		detail = "the broker has no report of this submission, and its node is not configured here: the operator must add the node"
	}
	return failed(&problem.Problem{Kind: problem.UnknownSubmission, Detail: detail})
}

// fetchTaskOf returns the report of the task that a submission became, and keeps it under k as well. It is fetched together with
// callers that ask for the task.
func (rs *resolver) fetchTaskOf(ctx context.Context, k task.Key, t target, sub *task.Submission, fresh bool) result {
	of := target{harvest.ID{AppServerID: sub.AppServerID, TaskID: sub.TaskID}, t.kind}
	ofTask, node, _ := rs.key(&of) // which is of a configured node
	var res result
	if e, ok := rs.ns.memory.get(ofTask); ok && !fresh {
		res.entry = e
	} else {
		res = rs.call(ctx, ofTask, of, fresh)
	}
	switch p := res.problem; {
	case p == nil:
		return result{entry: rs.keep(k, t, res.entry.report, &ofTask), from: cmp.Or(res.from, node)}
	case p.Kind == problem.UnknownTask:
		return failed(&problem.Problem{
			Kind:   problem.UnknownSubmission,
			Detail: "the broker has no report of this submission, and its task is unknown, or has been deleted: submit the file again",
		})
	}
	return failed(res.problem)
}

// keep keeps a report under k. If ofTask is not nil, the report is that of a task, and ofTask is its own key. A finished report
// is stored as well. An unfinished one is kept for the poll interval. If there is a follower, it is kept no longer than
// harvest.MaxAge, so that the follower gets a new one.
func (rs *resolver) keep(k task.Key, t target, report *task.Report, ofTask *task.Key) *entry {
	if !report.Finished() {
		ttl := rs.pollInterval
		if rs.follower != nil {
			ttl = min(ttl, harvest.MaxAge)
		}
		return rs.ns.memory.keep(k, report, kept{ttl: ttl})
	}
	rs.absent.remove(k)
	return rs.ns.memory.keep(k, report, kept{ttl: rs.ttl, id: t.ID, kind: t.kind, target: ofTask})
}

// withStorageError adds to a problem that the storage cannot be read, or that there is no memory to do so. The caller must
// not take the report for unknown, or the upstream for the only cause, while the storage may have the report.
func (rs *resolver) withStorageError(p *problem.Problem, err error) *problem.Problem {
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

// loadNewest returns the newest report of a file that is stored, which memory keeps from then on. It returns nil if memory has
// one that is as new, or if there is none.
func (rs *resolver) loadNewest(ctx context.Context, sum [sha256.Size]byte, kind task.Kind) (*entry, error) {
	var after time.Time
	if e := rs.ns.memory.newest(sum, kind); e != nil {
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

// reserveStored reserves memory for a report that is read from the storage, as for the answer of an upstream. It returns what
// extends the reservation, and what ends it.
func (rs *resolver) reserveStored() (grow func(held int64) error, release func()) {
	reading := rs.ns.memory.budget.Reserve(&rs.ns.storage)
	return func(held int64) error {
		return reading.Grow(2 * held) // the stored value, and the report in it
	}, reading.Release
}

// keepStored keeps in memory what was found in the storage under k.
func (rs *resolver) keepStored(k task.Key, kind task.Kind, found archive.Found) *entry {
	rs.absent.remove(k)
	return rs.ns.memory.keep(k, found.Report, kept{
		ttl: min(rs.ttl, found.TTL), kind: kind, target: found.Target, from: rs.archive, saved: !found.Queued,
	})
}

// mentionKept tells a nocache caller that gets a problem about a report that is kept.
func (rs *resolver) mentionKept(p *problem.Problem, k task.Key) *problem.Problem {
	if e, ok := rs.ns.memory.get(k); !ok || e.report.IsEmpty() {
		return p
	}
	return p.With("a report is kept here: ask without nocache to get it")
}

// selection returns what a purge of an ID selects of the namespace, or what all namespaces have in common if it names nothing.
// ok reports whether an upstream can know it.
func (rs *resolver) selection(id harvest.ID, common archive.Selection) (s archive.Selection, ok bool) {
	switch {
	case id.SubmitID != "" || id.TaskID != "":
		for _, kind := range [...]task.Kind{task.Summary, task.Complete} {
			if k, _, p := rs.key(&target{id, kind}); p == nil {
				s.Keys = append(s.Keys, k)
			}
		}
		return s, s.Keys != nil
	case id.AppServerID != "":
		source := task.NodeSource(rs.ns.name, id.AppServerID)
		return archive.Selection{Source: &source}, rs.nodes[id.AppServerID].Upstream != nil || rs.broker != nil
	}
	return common, true
}

// follow follows the report that a client has asked for, and that is not finished. One that no upstream knows yet was
// followed when it was accepted.
func (rs *resolver) follow(q *query, report *task.Report, client string) {
	if rs.follower != nil && q.sha256 == "" && report.Known() {
		rs.follower.Follow(harvest.Target{ID: q.ID, Client: client, Known: true, Accepted: time.Now()})
	}
}

// nudge tells the follower that a report is finished.
func (rs *resolver) nudge(t target) {
	if rs.follower != nil {
		rs.follower.Nudge(t.ID)
	}
}

// isAccepted reports whether a problem means that no upstream knows a submission, although it was accepted through here.
func (rs *resolver) isAccepted(t target, p *problem.Problem) bool {
	return p.Kind == problem.UnknownSubmission && rs.follower != nil && rs.follower.Accepted(t.SubmitID)
}

// firstUpstream returns the name of the upstream that is asked first for a target. It is the Upstream of a harvest.Source.
func (rs *resolver) firstUpstream(t harvest.Target) string {
	if n := rs.nodes[t.AppServerID]; n.Upstream != nil && t.SubmitID == "" {
		return "node " + n.Name
	}
	return "broker"
}

var (
	errNoRoom  = errors.New("max_size leaves no room for its report")
	errTooSlow = errors.New("the upstreams and the storage take too long")
)

// fetchFollowed fetches the report of a target. It is the Fetch of a harvest.Source.
func (rs *resolver) fetchFollowed(ctx context.Context, followed harvest.Target, kind task.Kind) (harvest.Outcome, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, rs.questionTimeout, errTooSlow)
	defer cancel()
	res := rs.resolve(ctx, &query{target: target{followed.ID, kind}})
	if p := res.problem; p != nil {
		switch p.Kind {
		case problem.CallerLeft:
			return harvest.Outcome{}, context.Cause(ctx)
		case problem.UnknownSubmission, problem.UnknownTask:
			return harvest.Outcome{State: harvest.Unknown}, nil
		case problem.SubmissionFailed:
			return harvest.Outcome{State: harvest.Failed}, nil
		}
		return harvest.Outcome{RetryAfter: p.RetryAfter}, errors.New(p.Code())
	}
	e := res.entry
	switch {
	case !e.report.Known():
		return harvest.Outcome{State: harvest.Unknown}, nil
	case !e.report.Finished():
		return harvest.Outcome{State: harvest.Unfinished}, nil
	case rs.archive == nil && e.unkept:
		return harvest.Outcome{}, errNoRoom
	}
	return harvest.Outcome{State: harvest.Finished, Report: e.report, Saved: rs.ns.memory.saving.isSaved(e, rs.archive), Key: e.key()}, nil
}
