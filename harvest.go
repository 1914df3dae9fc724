package fsbroker

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
)

// Harvest configures that submissions and tasks are followed until their reports are finished, so that the reports are kept
// although nobody asks for them in time: each submission whose answer passes through here, and each report that is asked
// for and is not finished. With a storage, what is followed is noted there: it is resumed after a restart, and taken over by
// another instance if this one has ended for 30 seconds.
//
// When a report of a submission or a task is finished for the first time and kept, the event `fsbroker_report_finished` is
// emitted, with `namespace`, `client`, `submit_id` or `node` and `task_id`, `sha256` and `name`. After a crash it may be
// emitted again.
type Harvest struct {
	// Whether the high-level report is wanted. Default: true unless `complete` is set
	Summary bool `json:"summary,omitempty"`

	// Whether the complete report is wanted. Default: true unless `summary` is set
	Complete bool `json:"complete,omitempty"`

	// How long a submission or a task is followed. Then it is given up, which is logged. Default: `24h`
	For caddy.Duration `json:"for,omitempty"`
}

const defaultHarvestFor = 24 * time.Hour

func (h *Harvest) setDefaults() {
	if !h.Summary && !h.Complete {
		h.Summary, h.Complete = true, true
	}
	setDefault(&h.For, caddy.Duration(defaultHarvestFor))
}

// followers pools the followers of a process by namespace: what is followed outlives a configuration.
var followers = caddy.NewUsagePool()

var harvestMetrics = harvest.NewMetrics()

// pooledFollower is a follower in a pool, and what it shares with the rest of its namespace.
type pooledFollower struct {
	*harvest.Follower
	shared *shared
}

// Destruct implements caddy.Destructor.
func (p pooledFollower) Destruct() error {
	p.shared.follower.CompareAndSwap(p.Follower, nil)
	p.Close()
	return nil
}

// openFollower joins the follower of the namespace, which is not used before startFollowing.
func (ns *namespace) openFollower(told func(harvest.Target)) error {
	o := ns.options
	if o.Harvest == nil {
		return nil
	}
	v, _, err := followers.LoadOrNew(ns.name, func() (caddy.Destructor, error) {
		// Now, and not when it starts: Caddy's own first call, from its start on, must not write another name to the file.
		instance, lockDir, err := instanceName()
		if err != nil {
			ns.logger.Warn("this instance has no name that lasts: after a restart, it takes a while until what was pending is resumed", zap.Error(err))
		}
		f := harvest.New(harvest.Config{Namespace: ns.name, Instance: instance, LockDir: lockDir, Metrics: harvestMetrics})
		ns.member.shared.follower.Store(f)
		return pooledFollower{f, ns.member.shared}, nil
	})
	if err != nil {
		return err
	}
	ns.resolver.follower = v.(pooledFollower).Follower
	ns.source = &harvest.Source{
		Fetch:        ns.resolver.fetchFollowed,
		Upstream:     ns.resolver.firstUpstream,
		Finished:     told,
		Summary:      o.Harvest.Summary,
		Complete:     o.Harvest.Complete,
		PollInterval: time.Duration(o.PollInterval),
		For:          time.Duration(o.Harvest.For),
		Notes:        ns.resolver.archive,
		Logger:       ns.logger,
	}
	return nil
}

// instanceName returns the name of this instance, which lasts, and the directory for the locks that tell processes apart
// which have the same name.
func instanceName() (name, lockDir string, err error) {
	id, err := caddy.InstanceID()
	if err != nil {
		return uuid.NewString(), "", err
	}
	return id.String(), filepath.Join(caddy.AppDataDir(), "fsbroker"), nil
}

// startFollowing begins to follow what is pending, and what is noted in the storage.
func (ns *namespace) startFollowing() {
	if ns.source != nil {
		ns.resolver.follower.Attach(ns.source)
	}
}

// stopFollowing ends the questions of startFollowing. What is accepted meanwhile is still noted.
func (ns *namespace) stopFollowing() {
	if ns.source != nil {
		ns.resolver.follower.Pause(ns.source)
	}
}

// closeFollower undoes openFollower. It must come before the archive is closed.
func (ns *namespace) closeFollower() error {
	if ns.source == nil {
		return nil
	}
	ns.resolver.follower.Detach(ns.source)
	_, err := followers.Delete(ns.name)
	return err
}

// emitFinished emits the event that a report is finished and kept. The end of the configuration does not interrupt it: the
// event is emitted once, so its handlers would miss it.
func (a *App) emitFinished(ns *namespace, t harvest.Target) {
	ctx := ns.ctx
	ctx.Context = context.WithoutCancel(ctx.Context)
	a.events.Emit(ctx, "fsbroker_report_finished", map[string]any{
		"namespace": ns.name, "client": t.Client, "submit_id": t.SubmitID,
		"node": t.AppServerID, "task_id": t.TaskID, "sha256": t.SHA256, "name": t.Name,
	})
}

// follow follows the report that a client has asked for, and that is not finished.
func (rs *resolver) follow(q query, client string) {
	if rs.follower != nil && q.sha256 == "" {
		rs.follower.Follow(harvest.Target{ID: q.id(), Client: client, Known: true, Accepted: time.Now()})
	}
}

// nudge tells the follower that a report is finished.
func (rs *resolver) nudge(q query) {
	if rs.follower != nil {
		rs.follower.Nudge(q.id())
	}
}

// id returns the submission, or the node and its task, that a query names.
func (q query) id() harvest.ID {
	if q.submitID != "" {
		return harvest.ID{SubmitID: q.submitID}
	}
	return harvest.ID{AppServerID: q.appServerID, TaskID: q.taskID}
}

// isAccepted reports whether a problem means that no upstream knows a submission, although it was accepted through here.
func (rs *resolver) isAccepted(q query, err error) bool {
	p, ok := errors.AsType[*problem](err)
	return ok && p.kind == problemUnknownSubmission && rs.follower != nil && rs.follower.Accepted(q.submitID)
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
func (rs *resolver) fetchFollowed(ctx context.Context, t harvest.Target, all bool) (harvest.Outcome, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, rs.questionTimeout, errTooSlow)
	defer cancel()
	res, err := rs.find(ctx, query{submitID: t.SubmitID, appServerID: t.AppServerID, taskID: t.TaskID, all: all})
	p, isProblem := errors.AsType[*problem](err)
	switch {
	case err == nil && !res.entry.report.Finished():
		return harvest.Outcome{State: harvest.Unfinished}, nil
	case err == nil && rs.archive == nil && res.entry.unkept:
		return harvest.Outcome{}, errNoRoom
	case err == nil:
		return harvest.Outcome{
			State: harvest.Finished, Report: res.entry.report, Saved: rs.shared.isSaved(res.entry, rs.archive), Key: res.entry.key(),
		}, nil
	case !isProblem:
		return harvest.Outcome{}, err
	case p.kind == problemUnknownSubmission, p.kind == problemUnknownTask:
		return harvest.Outcome{State: harvest.Unknown}, nil
	case p.kind == problemSubmissionFailed:
		return harvest.Outcome{State: harvest.Failed}, nil
	}
	return harvest.Outcome{RetryAfter: p.retryAfter}, errors.New(p.code())
}

// Interface guard
var _ caddy.Destructor = pooledFollower{}
