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
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI is a module that provides endpoints of Caddy's admin API. `GET /fsbroker/nodes` returns the state of the nodes
// and brokers of all fsbroker_task handlers. `GET /fsbroker/cache` returns how full the cache is, and `DELETE` purges it.
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
		adminRoute("/fsbroker/nodes", map[string]adminMethod{http.MethodGet: showNodes}),
		adminRoute("/fsbroker/cache", map[string]adminMethod{http.MethodGet: showCache, http.MethodDelete: purgeCache}),
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

// nodeState is the state of a node or a broker.
type nodeState struct {
	Namespace   string      `json:"namespace"`
	Role        string      `json:"role"`
	Node        string      `json:"node,omitempty"`
	Address     string      `json:"address"`
	State       string      `json:"state"`
	LastProblem *failure    `json:"last_problem,omitempty"`
	Questions   int64       `json:"questions"` // requests under way
	SystemInfo  *systemInfo `json:"system_info,omitempty"`

	// SystemInfoProblem is the code of the problem that took the place of SystemInfo.
	SystemInfoProblem string `json:"system_info_problem,omitempty"`
}

// showNodes returns the state of the nodes and brokers. It asks each for its system information.
func showNodes(r *http.Request) (any, error) {
	all := live.upstreams()
	ids := slices.SortedFunc(maps.Keys(all), func(a, b upstreamID) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.role, b.role), cmp.Compare(a.name, b.name), cmp.Compare(a.host, b.host))
	})
	states := make([]nodeState, len(ids))
	var fetches sync.WaitGroup
	for i, id := range ids {
		states[i] = nodeState{Namespace: id.namespace, Role: id.role.String(), Node: id.name, Address: id.host}
		fetches.Go(func() { states[i].fill(r.Context(), all[id]) })
	}
	fetches.Wait()
	return states, nil
}

// fill combines what several resolvers know of one node or broker. It asks it through the first of them.
func (s *nodeState) fill(ctx context.Context, upstreams []liveUpstream) {
	first := upstreams[0]
	r, info, err := first.resolver.fetchSystemInfo(ctx, first.upstream)
	switch {
	case err != nil: // the caller has left
		return
	case r.problem != nil:
		s.SystemInfoProblem = r.problem.code()
	default:
		s.SystemInfo = &info
	}
	first.health.record(sourceOther, r)
	worst := statusHealthy
	for _, u := range upstreams {
		s.Questions += u.inFlight.Load()
		status, last := u.health.status(time.Now())
		if last != nil && (s.LastProblem == nil || status > worst || status == worst && last.At.After(s.LastProblem.At)) {
			s.LastProblem = last
		}
		worst = max(worst, status)
	}
	if r.problem != nil && r.problem.role != roleNone { // not a problem of this machine
		worst = max(worst, statusDegraded)
	}
	s.State = worst.String()
}

// showCache returns how full the cache of each namespace is, and its queue to the storage.
func showCache(*http.Request) (any, error) { return live.stats().caches, nil }

// purged counts what was removed from each tier. A report may have been in several.
type purged struct {
	Memory  int `json:"memory"`
	Queue   int `json:"queue"`
	Storage int `json:"storage"`
}

var errPurge = errors.New("give submitID, or appServerID and taskID together, once each, to purge the reports of a submission or a task, or nothing to purge everything")

// purgeCache purges everything, or the reports of one submission or task. A malformed query must not purge everything.
func purgeCache(r *http.Request) (any, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, adminError(http.StatusBadRequest, errors.New("the query is malformed"))
	}
	if len(values) == 0 {
		return purge(r.Context(), live.everything())
	}
	q := query{submitID: values.Get("submitID"), appServerID: values.Get("appServerID"), taskID: values.Get("taskID")}
	names := []string{"submitID"}
	if q.submitID == "" {
		names = []string{"appServerID", "taskID"}
	}
	for _, name := range names {
		if len(values) != len(names) || len(values[name]) != 1 || !task.ValidID(values.Get(name)) {
			return nil, adminError(http.StatusBadRequest, errPurge)
		}
	}
	targets := live.reports(q)
	if len(targets) == 0 {
		return nil, adminError(http.StatusNotFound, errors.New("no upstream is configured that can know it: check appServerID, or configure a broker"))
	}
	return purge(r.Context(), targets)
}

// purge removes the targets from memory and all storages. Memory is purged before and after the storages: a hit may save
// what the queue had no room for, and a miss may load what is still stored.
func purge(ctx context.Context, targets []purgeTarget) (purged, error) {
	var sum purged
	byArchive := make(map[*archive.Archive][]task.Key) // during a reload, two resolvers may share one
	for _, t := range targets {
		sum.Memory += t.shared.purge(t.keys)
		if t.archive != nil {
			byArchive[t.archive] = append(byArchive[t.archive], t.keys...)
		}
	}
	var failed error
	for a, keys := range byArchive {
		queued, stored, err := a.Purge(ctx, keys)
		sum.Queue += queued
		sum.Storage += stored
		failed = errors.Join(failed, err)
	}
	for _, t := range targets {
		sum.Memory += t.shared.purge(t.keys)
	}
	if failed != nil {
		return sum, adminError(http.StatusBadGateway,
			fmt.Errorf("memory is purged, but the storage is not, or only in part: try again: %w", failed))
	}
	return sum, nil
}

// Interface guards
var (
	_ caddy.Module      = adminAPI{}
	_ caddy.AdminRouter = adminAPI{}
)
