package fsbroker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI is a module that provides endpoints of Caddy's admin API. `GET /fsbroker/nodes` returns the state of the nodes
// and brokers of all fsbroker_task handlers. `GET /fsbroker/cache` returns how full the cache is, and `DELETE` purges it.
// `GET /fsbroker/harvest` returns what is followed until its report is finished, and `DELETE` gives one up.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.fsbroker",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes returns the routes of the endpoints.
func (adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		adminRoute(cli.NodesPath, map[string]adminMethod{http.MethodGet: showNodes}),
		adminRoute(cli.CachePath, map[string]adminMethod{http.MethodGet: showCache, http.MethodDelete: purgeCache}),
		adminRoute(cli.HarvestPath, map[string]adminMethod{http.MethodGet: showPending, http.MethodDelete: giveUp}),
	}
}

// adminMethod returns a value that is sent as JSON.
type adminMethod func(r *http.Request) (any, error)

func adminRoute(pattern string, methods map[string]adminMethod) caddy.AdminRoute {
	allowed := strings.Join(slices.Sorted(maps.Keys(methods)), ", ")
	return caddy.AdminRoute{Pattern: pattern, Handler: caddy.AdminHandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		method, ok := methods[r.Method]
		if !ok {
			w.Header().Set("Allow", allowed)
			return adminError(http.StatusMethodNotAllowed, fmt.Errorf("method not allowed: use %s", allowed))
		}
		value, err := method(r)
		if err != nil {
			return err
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(value); err != nil {
			return adminError(http.StatusInternalServerError, fmt.Errorf("writing the response: %w", err))
		}
		return nil
	})}
}

func adminError(status int, err error) error { return caddy.APIError{HTTPStatus: status, Err: err} }

// showNodes returns the state of the nodes and brokers. It asks each for its system information.
func showNodes(r *http.Request) (any, error) {
	all := liveUpstreams()
	ids := slices.SortedFunc(maps.Keys(all), func(a, b upstreamID) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.role, b.role), cmp.Compare(a.name, b.name), cmp.Compare(a.host, b.host))
	})
	states := make([]cli.Node, len(ids))
	var fetches sync.WaitGroup
	for i, id := range ids {
		states[i] = cli.Node{Namespace: id.namespace, Role: id.role.String(), Node: id.name, Address: id.host}
		fetches.Go(func() { fillNode(r.Context(), &states[i], all[id]) })
	}
	fetches.Wait()
	return states, nil
}

// fillNode combines what several sites know of one node or broker. It asks it through the first of them.
func fillNode(ctx context.Context, s *cli.Node, upstreams []*upstream.Upstream) {
	info, p := upstreams[0].SystemInfo(ctx)
	s.SystemInfo = info
	if p != nil {
		if p.Kind == problem.CallerLeft {
			return
		}
		s.SystemInfoProblem = p.Code()
	}
	worst := upstream.Healthy
	for _, u := range upstreams {
		s.Questions += u.InFlight()
		status, last := u.Status()
		if last != nil && (s.LastProblem == nil || status > worst || status == worst && last.At.After(s.LastProblem.At)) {
			s.LastProblem = last
		}
		worst = max(worst, status)
	}
	if p != nil && p.Role != problem.RoleNone { // not a problem of this machine
		worst = max(worst, upstream.Degraded)
	}
	s.State = worst.String()
}

// showCache returns how full the cache of each namespace is, and its queue to the storage.
func showCache(*http.Request) (any, error) { return liveStats().caches, nil }

var (
	errPurge = errors.New("give submitID, or appServerID and taskID together, or appServerID, sha256 or older_than alone, once each, to purge some of the reports, or nothing to purge everything")
	errFrom  = fmt.Errorf("from must be the next of the step before: a number up to %d", archive.Partitions)
)

// purgeRequest is what to purge.
type purgeRequest struct {
	id        harvest.ID        // a submission, a task or a node; empty if it is none of these
	selection archive.Selection // otherwise
	from      int               // where to go on
}

// parsePurge parses a query. A malformed one must not purge everything.
func parsePurge(rawQuery string) (p purgeRequest, err error) {
	values, err := url.ParseQuery(rawQuery)
	if err != nil {
		return p, errors.New("the query is malformed")
	}
	for _, v := range values {
		if len(v) != 1 {
			return p, errPurge
		}
	}
	if values.Has("from") {
		if p.from, err = strconv.Atoi(values.Get("from")); err != nil || p.from < 0 || p.from > archive.Partitions {
			return p, errFrom
		}
		values.Del("from")
	}
	switch names := strings.Join(slices.Sorted(maps.Keys(values)), " "); names {
	case "":
	case "submitID", "appServerID", "appServerID taskID":
		p.id = harvest.ID{SubmitID: values.Get("submitID"), AppServerID: values.Get("appServerID"), TaskID: values.Get("taskID")}
		for name := range values {
			if !task.ValidID(values.Get(name)) {
				return p, errPurge
			}
		}
	case "sha256":
		sum, ok := parseSum(values.Get(names))
		if !ok {
			return p, errors.New("sha256 must be 64 hexadecimal digits")
		}
		p.selection.File = &sum
	case "older_than":
		age, err := caddy.ParseDuration(values.Get(names))
		if err != nil || age <= 0 {
			return p, errors.New("older_than must be a duration of more than 0, such as 24h or 30d")
		}
		p.selection.Before = time.Now().Add(-age)
	default:
		return p, errPurge
	}
	return p, nil
}

// purgeCache purges everything, or some of the reports. What takes long is done in several steps.
func purgeCache(r *http.Request) (any, error) {
	p, err := parsePurge(r.URL.RawQuery)
	if err != nil {
		return nil, adminError(http.StatusBadRequest, err)
	}
	targets := purgeTargets(p.id, p.selection)
	if len(targets) == 0 && p.id != (harvest.ID{}) {
		return nil, adminError(http.StatusNotFound, errors.New("no upstream is configured that can know it: check appServerID, or configure a broker"))
	}
	return purge(r.Context(), targets, p.from)
}

// purge removes the targets from memory and all storages. Memory is purged before and after the storages: what it has may be
// queued to be stored, and a miss may load what is still stored.
func purge(ctx context.Context, targets []purgeTarget, from int) (cli.Purged, error) {
	sum := cli.Purged{Memory: purgeMemory(targets)}
	done, err := purgeArchives(ctx, targets, from)
	sum.Memory += purgeMemory(targets)
	sum.Queue, sum.Storage = done.Queued, done.Stored
	if done.Next < archive.Partitions {
		sum.Next = &done.Next
	}
	if err != nil {
		return sum, adminError(http.StatusBadGateway,
			fmt.Errorf("memory is purged, but the storage is not, or only in part: try again with from=%d: %w", done.Next, err))
	}
	return sum, nil
}

func purgeMemory(targets []purgeTarget) (n int) {
	for _, t := range targets {
		n += t.ns.memory.purge(t.selection.Matches)
	}
	return n
}

// purgeArchives makes one step in all archives at once, each from the same place on. So the next step begins where the
// slowest has come to.
func purgeArchives(ctx context.Context, targets []purgeTarget, from int) (archive.Purged, error) {
	selections := make(map[*archive.Archive]archive.Selection) // during a reload, two resolvers may share one archive
	for _, t := range targets {
		if t.archive != nil {
			selections[t.archive] = t.selection
		}
	}
	sum := archive.Purged{Next: archive.Partitions}
	var failed error
	var mu sync.Mutex // guards both
	var steps sync.WaitGroup
	for a, selection := range selections {
		steps.Go(func() {
			done, err := a.Purge(ctx, selection, from)
			mu.Lock()
			defer mu.Unlock()
			sum.Queued += done.Queued
			sum.Stored += done.Stored
			sum.Next = min(sum.Next, done.Next)
			failed = errors.Join(failed, err)
		})
	}
	steps.Wait()
	return sum, failed
}

func newPending(p harvest.Pending) cli.Pending {
	r := cli.Pending{
		Client: p.Client, SubmitID: p.SubmitID, Node: p.AppServerID, TaskID: p.TaskID, SHA256: p.SHA256, Name: p.Name,
		State: "accepted", Accepted: p.Accepted, AgeSeconds: int64(p.Age.Seconds()),
		Questions: p.Questions, LastProblem: p.Problem, Noted: p.Noted,
	}
	switch {
	case p.Finished:
		r.State = "finished" // and not stored, or not told to an event handler, yet
	case p.Known:
		r.State = "unfinished"
	}
	return r
}

// showPending returns what each namespace that follows anything follows, by client, the oldest first.
func showPending(*http.Request) (any, error) {
	all := make(map[string][]cli.Pending)
	for namespace, f := range liveFollowers() {
		list := []cli.Pending{}
		for _, p := range f.List() {
			list = append(list, newPending(p))
		}
		slices.SortStableFunc(list, func(a, b cli.Pending) int { return cmp.Compare(a.Client, b.Client) })
		all[namespace] = list
	}
	return all, nil
}

var errGiveUp = errors.New("give submitID, or appServerID and taskID together, once each, to give one up")

// giveUp ends the following of a submission or a task, in every namespace.
func giveUp(r *http.Request) (any, error) {
	p, err := parsePurge(r.URL.RawQuery)
	if err != nil || p.from != 0 || p.id.SubmitID == "" && p.id.TaskID == "" {
		return nil, adminError(http.StatusBadRequest, errGiveUp)
	}
	var done cli.GivenUp
	for _, f := range liveFollowers() {
		if f.GiveUp(p.id) {
			done.GivenUp++
		}
	}
	if done.GivenUp == 0 {
		return nil, adminError(http.StatusNotFound, errors.New("it is not pending: check the ID, or list what is with GET /fsbroker/harvest"))
	}
	return done, nil
}

// Interface guards
var (
	_ caddy.Module      = adminAPI{}
	_ caddy.AdminRouter = adminAPI{}
)
