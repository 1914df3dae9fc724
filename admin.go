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
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI is a module that provides endpoints of Caddy's admin API: /fsbroker/nodes tells how the nodes and the brokers
// of all fsbroker_task handlers are, and /fsbroker/cache how full the cache is. A DELETE of the latter purges it.
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

// adminMethod gives what is answered, as JSON.
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
			return adminError(http.StatusInternalServerError, fmt.Errorf("writing the answer: %w", err))
		}
		return nil
	})}
}

func adminError(status int, err error) error { return caddy.APIError{HTTPStatus: status, Err: err} }

// nodeStatus is how a node or a broker is.
type nodeStatus struct {
	Role        string      `json:"role"`
	Node        string      `json:"node,omitempty"`
	Address     string      `json:"address"`
	State       string      `json:"state"`
	LastProblem *lapse      `json:"last_problem,omitempty"`
	Questions   int64       `json:"questions"` // in flight
	SystemInfo  *systemInfo `json:"system_info,omitempty"`

	// SystemInfoProblem is the code of why there is no SystemInfo. A broker has none anyway.
	SystemInfoProblem string `json:"system_info_problem,omitempty"`
}

// showNodes tells how the nodes and the brokers are, and asks the nodes themselves.
func showNodes(r *http.Request) (any, error) {
	all := live.peers()
	statuses := make([]nodeStatus, 0, len(all))
	for id := range all {
		statuses = append(statuses, nodeStatus{Role: id.role, Node: id.name, Address: id.host})
	}
	slices.SortFunc(statuses, func(a, b nodeStatus) int {
		return cmp.Or(-cmp.Compare(a.Role, b.Role), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Address, b.Address))
	})
	var asking sync.WaitGroup
	for i := range statuses {
		s := &statuses[i]
		asking.Go(func() { s.fill(r.Context(), all[peerID{s.Role, s.Node, s.Address}]) })
	}
	asking.Wait()
	return statuses, nil
}

// fill asks one of those that several handlers have of one node, and puts together what they know of it.
func (s *nodeStatus) fill(ctx context.Context, peers []livePeer) {
	if s.Role == roleNode {
		x, info, err := peers[0].handler.askSystemInfo(ctx, peers[0].peer)
		switch {
		case err != nil: // who asked has left
			return
		case x.trouble != nil:
			s.SystemInfoProblem = x.trouble.code
		default:
			s.SystemInfo = &info
		}
		peers[0].note(byAdmin, x)
	}
	worst := healthy
	for _, p := range peers {
		worst = max(worst, p.condition(time.Now()))
		s.Questions += p.asking.Load()
		if last := p.last.Load(); last != nil && (s.LastProblem == nil || last.At.After(s.LastProblem.At)) {
			s.LastProblem = last
		}
	}
	s.State = worst.String()
}

// cacheStatus is how full the cache is, and the queue to the storage.
type cacheStatus struct {
	memoryFigures
	Storage *storageFigures `json:"storage,omitempty"` // where there is one
}

func showCache(*http.Request) (any, error) {
	memory, storage := live.cacheFigures()
	status := cacheStatus{memoryFigures: memory}
	if len(live.archives()) > 0 {
		status.Storage = &storage
	}
	return status, nil
}

// purged counts what went from where. A report may have been in several places.
type purged struct {
	Memory  int `json:"memory"`
	Queue   int `json:"queue"`
	Storage int `json:"storage"`
}

// purgeCache purges everything, or the reports of one task. A query that is not understood must not purge everything.
func purgeCache(r *http.Request) (any, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, adminError(http.StatusBadRequest, errors.New("the query is not well-formed"))
	}
	if len(query) == 0 {
		return purge(r.Context(), nil)
	}
	appServerID, taskID := query["appServerID"], query["taskID"]
	if len(query) != 2 || len(appServerID) != 1 || len(taskID) != 1 || !validID(appServerID[0]) || !validID(taskID[0]) {
		return nil, adminError(http.StatusBadRequest,
			errors.New("give appServerID and taskID together, once each, to purge the reports of a task, or nothing to purge everything"))
	}
	keys := live.reportKeys(appServerID[0], taskID[0])
	if len(keys) == 0 {
		return nil, adminError(http.StatusNotFound, errors.New("no node goes by this appServerID: check it"))
	}
	return purge(r.Context(), keys)
}

// purge takes what is kept under keys, or everything for nil, out of memory and all storages. Memory is purged before and
// after the storages: a hit may save what a storage had no room for, and a miss may recall what is still stored.
func purge(ctx context.Context, keys []key) (purged, error) {
	var sum purged
	sum.Memory += live.purgeMemory(keys)
	var failed error
	for _, a := range live.archives() {
		queued, stored, err := a.purge(ctx, keys)
		sum.Queue += queued
		sum.Storage += stored
		failed = errors.Join(failed, err)
	}
	sum.Memory += live.purgeMemory(keys)
	if failed != nil {
		return sum, adminError(http.StatusBadGateway,
			fmt.Errorf("memory is purged, but the storage is not, at least not all of it: try again: %w", failed))
	}
	return sum, nil
}

// Interface guards
var (
	_ caddy.Module      = adminAPI{}
	_ caddy.AdminRouter = adminAPI{}
)
