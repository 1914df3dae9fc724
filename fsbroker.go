// Package fsbroker is a plugin for the Caddy web server. Its HTTP handler, fsbroker_task, serves the fsBroker Task API
// (GET /task): the report of a file-analysis task, fetched from the processor node that holds it and kept in memory,
// and in a storage where that is wanted.
//
// The Task API is the one of OPSWAT Filescan's fsBroker, documented at https://www.opswat.com/docs/filescan.
package fsbroker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

func init() {
	caddy.RegisterModule(new(Handler))
}

// Handler serves the fsBroker Task API, `GET /task`: it checks the caller's secret, and answers with the report of a
// file-analysis task: the one that it keeps, or else the one that the processor node has which holds it.
//
// Callers name the report by the submission (`submitID`), for which a broker has to be configured, or by the node and
// its task (`appServerID` and `taskID`), choose the complete one with `all=true`, get past what is kept with
// `nocache=true`, and have the answer wait for the report to be finished with `Prefer: wait=<seconds>`, or the query
// parameter `wait`. They authenticate with `Authorization: Bearer <secret>`, or with the query parameter `secret` or
// `serect`, which ends up in logs.
//
// A finished report is kept for the cache's TTL, whatever the node does with it meanwhile. One that is not finished is
// kept for the poll interval, so that any number of callers who poll or wait costs the node one question. Errors are
// never kept, and are answered as problem documents (RFC 9457) with a stable code.
//
// The placeholder `{http.fsbroker.client}` holds the name of the client whose secret was presented, as does
// `{http.auth.user.id}`, which Caddy's access log shows as `user_id`, unless another handler has set it before. When
// the answer is written, `{http.fsbroker.cache}` says what the cache did for it (`hit`, `storage`, `miss`, `bypass`,
// `collapsed`, `error` or `none`), and `{http.fsbroker.node}` names the node whose report it is. The access log has all
// three as `fsbroker_client`, `fsbroker_cache` and `fsbroker_node`.
//
// The handler answers every request that reaches it: put a path matcher in front of it, as the Caddyfile directive does
// by itself.
type Handler struct {
	// The secrets of the callers. At least one is needed.
	Secrets []Secret `json:"secrets,omitempty"`

	// The processor nodes whose reports are served. At least one is needed.
	Nodes []Node `json:"nodes,omitempty"`

	// The broker, which knows where a submission went. Without one, `submitID` is refused.
	Broker *Endpoint `json:"broker,omitempty"`

	// How the nodes and the broker are connected to: the `http` transport of `reverse_proxy`, without its
	// `proxy_protocol`. Default: `http` with its defaults
	TransportRaw json.RawMessage `json:"transport,omitempty" caddy:"namespace=http.reverse_proxy.transport inline_key=protocol"`

	// How long one question to a node or the broker may take, the body of its answer included. Default: `30s`
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// How long a report that is not finished is kept, and the answer that a submission is still queued. Where callers
	// wait for a report, it is asked for this often. Default: `2s`
	PollInterval caddy.Duration `json:"poll_interval,omitempty"`

	// How long a caller may have an answer wait for its report to be finished. Default: `60s`
	MaxWait caddy.Duration `json:"max_wait,omitempty"`

	// How many bytes an answer of a node or the broker may have, inflated. Default: 67108864 (64 MiB)
	MaxReport int64 `json:"max_report,omitempty"`

	// How long a node or the broker is not asked again when it could not be connected to. Default: `10s`
	FailDuration caddy.Duration `json:"fail_duration,omitempty"`

	// How often each node is asked for its `/system-info`, to see that it is well. One that cannot be connected to is
	// treated as one that failed to be asked for a report; one that answers with anything but a JSON object is logged,
	// and is still asked for reports. The events `fsbroker_node_unhealthy` and `fsbroker_node_healthy` tell of changes,
	// with `role`, `node`, `address` and `reason`, whether a check or a question has found them. Default: not at all
	HealthInterval caddy.Duration `json:"health_interval,omitempty"`

	// How long a node may take to answer that. Default: `5s`
	HealthTimeout caddy.Duration `json:"health_timeout,omitempty"`

	// What is kept, and for how long.
	Cache *Cache `json:"cache,omitempty"`

	ctx       caddy.Context
	events    *caddyevents.App
	started   atomic.Bool        // as is the configuration; there are no events before
	checks    context.Context    // ends with the handler
	endChecks context.CancelFunc // nil before there can be any
	logger    *zap.Logger
	transport *reverseproxy.HTTPTransport
	clients   clients
	nodes     map[string]*peer
	broker    *peer
	store     *store
	watches   *watches
	archive   *archive     // nil without a storage
	archiveID string       // under which it is pooled
	archived  *archiveUser // what this handler lets it use
	retired   atomic.Bool  // cleaned up; requests that came before may still be under way
}

const (
	defaultTimeout      = 30 * time.Second
	defaultPollInterval = 2 * time.Second
	defaultMaxWait      = time.Minute
	defaultMaxReport    = 64 << 20
	defaultFailDuration = 10 * time.Second

	defaultHealthTimeout = 5 * time.Second
)

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.fsbroker_task",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets up the handler.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	h.setDefaults()
	if err := h.provisionTransport(ctx); err != nil {
		return err
	}
	repl := caddy.NewReplacer()
	var err error
	if h.clients, err = newClients(repl, h.Secrets); err != nil {
		return err
	}
	if err := h.provisionPeers(repl); err != nil {
		return err
	}
	if h.store, err = joinStore(h); err != nil {
		return err
	}
	if err := h.provisionArchive(ctx); err != nil {
		return err
	}
	if err := registerMetrics(ctx.GetMetricsRegistry()); err != nil {
		return err
	}
	h.watches = newWatches()
	// Cleanup comes only after the grace period, which those who wait would use up.
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		server.RegisterOnShutdown(h.watches.stop)
	}
	live.add(h)
	return h.provisionHealth(ctx)
}

func (h *Handler) setDefaults() {
	if h.Cache == nil {
		h.Cache = new(Cache)
	}
	setDefault(&h.Timeout, caddy.Duration(defaultTimeout))
	setDefault(&h.PollInterval, caddy.Duration(defaultPollInterval))
	setDefault(&h.MaxWait, caddy.Duration(defaultMaxWait))
	setDefault(&h.MaxReport, defaultMaxReport)
	setDefault(&h.FailDuration, caddy.Duration(defaultFailDuration))
	setDefault(&h.HealthTimeout, caddy.Duration(defaultHealthTimeout))
	setDefault(&h.Cache.TTL, caddy.Duration(defaultTTL))
	setDefault(&h.Cache.MaxSize, defaultMaxSize)
	if h.Cache.StorageRaw != nil {
		setDefault(&h.Cache.Retention, caddy.Duration(defaultRetention))
	}
}

func setDefault[T comparable](option *T, value T) {
	var unset T
	if *option == unset {
		*option = value
	}
}

func (h *Handler) provisionTransport(ctx caddy.Context) error {
	if h.TransportRaw == nil {
		h.TransportRaw = json.RawMessage(`{"protocol":"http"}`)
	}
	mod, err := ctx.LoadModule(h, "TransportRaw")
	if err != nil {
		return fmt.Errorf("loading the transport: %w", err)
	}
	transport, ok := mod.(*reverseproxy.HTTPTransport)
	if !ok { // others rely on a caller's request, which a question is not
		return fmt.Errorf("the transport %T cannot be used: use http", mod)
	}
	if transport.ProxyProtocolEnabled() {
		return errors.New("the transport's proxy_protocol cannot be used: a question to a node has no one client whose address could be sent")
	}
	h.transport = transport
	return nil
}

// provisionArchive opens the archive, where a storage is configured for it.
func (h *Handler) provisionArchive(ctx caddy.Context) error {
	if h.Cache.StorageRaw == nil {
		return nil
	}
	id, storage := string(h.Cache.StorageRaw), ctx.Storage()
	var module struct {
		Name string `json:"module"`
	}
	if err := json.Unmarshal(h.Cache.StorageRaw, &module); err != nil {
		return fmt.Errorf("cache.storage wants to be an object: %w", err)
	}
	if module.Name != "" {
		mod, err := ctx.LoadModule(h.Cache, "StorageRaw")
		if err != nil {
			return fmt.Errorf("loading the storage: %w", err)
		}
		if storage, err = mod.(caddy.StorageConverter).CertMagicStorage(); err != nil {
			return fmt.Errorf("opening the storage: %w", err)
		}
	}
	user := &archiveUser{storage: storage, logger: h.logger, retention: time.Duration(h.Cache.Retention)}
	a, err := openArchive(id, user)
	if err != nil {
		return err
	}
	h.archive, h.archiveID, h.archived = a, id, user
	// The server runs this within its grace period, while modules are still there to be used.
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		server.RegisterOnStop(func(ctx context.Context) error { return a.drain(ctx, user) })
	}
	return nil
}

// peers are the nodes, and the broker if there is one.
func (h *Handler) peers() iter.Seq[*peer] {
	return func(yield func(*peer) bool) {
		for _, node := range h.nodes {
			if !yield(node) {
				return
			}
		}
		if h.broker != nil {
			yield(h.broker)
		}
	}
}

func (h *Handler) provisionPeers(repl *caddy.Replacer) error {
	if len(h.Nodes) == 0 {
		return errors.New("no node is configured: name at least one, with its application server ID and its address")
	}
	h.nodes = make(map[string]*peer, len(h.Nodes))
	for i, n := range h.Nodes {
		if !validID(n.AppServerID) {
			return fmt.Errorf("node %d: the application server ID wants 1 to %d bytes without control characters", i+1, maxIDLength)
		}
		if _, exists := h.nodes[n.AppServerID]; exists {
			return fmt.Errorf("node %q is configured twice", n.AppServerID)
		}
		node, err := h.newPeer(repl, roleNode, n.AppServerID, n.Endpoint)
		if err != nil {
			return fmt.Errorf("node %q: %w", n.AppServerID, err)
		}
		h.nodes[n.AppServerID] = node
	}
	if h.Broker == nil {
		return nil
	}
	var err error
	if h.broker, err = h.newPeer(repl, roleBroker, "", *h.Broker); err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	return nil
}

// Validate checks the numbers: those of a Caddyfile have been, those of JSON have not.
func (h *Handler) Validate() error {
	for name, value := range map[string]int64{
		"timeout":         int64(h.Timeout),
		"poll_interval":   int64(h.PollInterval),
		"max_wait":        int64(h.MaxWait),
		"max_report":      h.MaxReport,
		"fail_duration":   int64(h.FailDuration),
		"health_interval": int64(h.HealthInterval),
		"health_timeout":  int64(h.HealthTimeout),
		"cache.ttl":       int64(h.Cache.TTL),
		"cache.max_size":  h.Cache.MaxSize,
		"cache.retention": int64(h.Cache.Retention),
	} {
		if value < 0 {
			return fmt.Errorf("%s wants to be more than 0 (or left out, for its default)", name)
		}
	}
	if h.Cache.Retention > 0 && h.archive == nil {
		return errRetention
	}
	return nil
}

var errRetention = errors.New("retention is for what is stored: configure a storage beside it")

// Cleanup lets go of the store. Requests that came before may still be under way, and are answered.
func (h *Handler) Cleanup() error {
	h.retired.Store(true)
	live.remove(h)
	if h.watches != nil {
		h.watches.stop()
	}
	if h.endChecks != nil {
		h.endChecks()
	}
	var err error
	if h.archive != nil {
		err = h.archive.leave(h.archiveID, h.archived)
	}
	if h.store != nil {
		err = errors.Join(err, h.store.leave(h))
	}
	return err
}

// ServeHTTP answers with a report: the request is authenticated, the question read, its task found, the report got,
// waited for where it is not finished, and written.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	rec := newRecord(r)
	q := readQuestion(r.URL.RawQuery)
	if p := h.admit(r, q, rec); p != nil {
		h.answer(w, r, rec, finding{}, p)
		return nil
	}
	found, err := h.find(r.Context(), q)
	if err == nil && !found.entry.report().finished {
		found, err = h.wait(w, r, q, found)
	}
	h.answer(w, r, rec, found, err)
	return nil
}

// answer writes the report that was found, or why there is none, and counts the request.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, rec *record, found finding, err error) {
	p, _ := errors.AsType[*problem](err)
	rec.cache, rec.node = found.outcome(p), found.node
	var status int
	switch {
	case err == nil:
		status = h.write(w, r, found)
	case p != nil:
		status = p.write(w, r, found.cacheStatus(p))
	default: // the caller has left; this is for the access log
		status = statusClientClosedRequest
		w.WriteHeader(status)
	}
	countRequest(rec, status)
}

// admit finds out who asks, and says what keeps a request from being looked into: first of all, that it has no right
// secret.
func (h *Handler) admit(r *http.Request, q question, rec *record) *problem {
	c := h.clients.authenticate(r.Header, q)
	if c == nil {
		return &problem{
			status: http.StatusUnauthorized, code: "unauthorized",
			detail: "send a valid secret: Authorization: Bearer <secret>",
		}
	}
	rec.client = c
	if q.serect != "" || q.secret != "" {
		h.recommendBearer(c)
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &problem{
			status: http.StatusMethodNotAllowed, code: "method_not_allowed",
			detail: "a report can only be read: use GET or HEAD",
		}
	}
	return q.bad
}

// statusClientClosedRequest is what nginx and Caddy log for a client that did not wait.
const statusClientClosedRequest = 499

// finding is a report, and how it was come by.
type finding struct {
	fetched
	hit     bool // it was kept
	joined  bool // it came with the question of another caller
	nocache bool
	node    *peer // whose it is
}

// fetched is a node's answer as it is handed to all who wait for it.
type fetched struct {
	entry    *entry // what is kept of it
	recalled bool   // it was stored
}

// find looks up the report that q asks for.
func (h *Handler) find(ctx context.Context, q question) (finding, error) {
	if q.submitID != "" {
		found, err := h.findSubmission(ctx, q)
		if err != nil {
			return found, err
		}
		sub := found.entry.submission()
		if sub.queued {
			found.entry = &entry{value: nothingYet(sub.at), number: found.entry.number}
			return found, nil
		}
		q.appServerID, q.taskID = sub.appServerID, sub.taskID
	}
	node, ok := h.nodes[q.appServerID]
	if !ok {
		return finding{}, unknownNode(q)
	}
	found, err := h.lookUp(ctx, node, reportKey(node.address, q.taskID, q.all), q, (*Handler).fetchReport)
	found.node = node
	return found, err
}

// findSubmission looks up which task a submission became.
func (h *Handler) findSubmission(ctx context.Context, q question) (finding, error) {
	if h.broker == nil {
		return finding{}, &problem{
			status: http.StatusBadRequest, code: "no_broker",
			detail: "submitID cannot be looked up here, since no broker is configured: give appServerID and taskID",
		}
	}
	return h.lookUp(ctx, h.broker, submissionKey(h.broker.address, q.submitID), q, (*Handler).fetchSubmission)
}

// fetcher asks a peer for what q wants, and keeps the answer under k. A fresh one does not take what is only stored, if
// it may have changed.
type fetcher func(h *Handler, ctx context.Context, p *peer, k key, q question, fresh bool) (fetched, error)

// lookUp gives what is kept under k, if that will do, or else what p answers.
func (h *Handler) lookUp(ctx context.Context, p *peer, k key, q question, fetch fetcher) (finding, error) {
	if e, ok := h.store.get(k); ok && e.value.answers(q.nocache) {
		if h.archive != nil && e.unsaved.Load() {
			h.save(e)
		}
		return finding{fetched: fetched{entry: e}, hit: true}, nil
	}
	return h.ask(ctx, p, k, q, fetch)
}

// ask has p asked for what is wanted, together with all others who want the same.
func (h *Handler) ask(ctx context.Context, p *peer, k key, q question, fetch fetcher) (finding, error) {
	got, joined, err := h.store.flights.do(ctx, flightKey{k, p.identity}, q.nocache,
		func(ctx context.Context, fresh bool) (fetched, error) {
			// It may have come while this question waited for its turn.
			if e, ok := h.store.get(k); ok && e.value.answers(fresh) {
				return fetched{entry: e}, nil
			}
			return fetch(h, ctx, p, k, q, fresh)
		})
	if q.nocache {
		err = h.mentionKept(err, k)
	}
	if h.retired.Load() { // the transport has been cleaned up before
		h.transport.Transport.CloseIdleConnections()
	}
	return finding{fetched: got, hit: got.recalled, joined: joined, nocache: q.nocache}, err
}

// fetchReport is the fetcher of reports. One that is not finished does not replace one that is.
func (h *Handler) fetchReport(ctx context.Context, node *peer, k key, q question, fresh bool) (fetched, error) {
	var unreadable error
	if _, ok := h.store.get(k); !ok {
		e, err := h.recall(ctx, k)
		if e != nil && !fresh {
			return fetched{entry: e, recalled: true}, nil
		}
		unreadable = err
	}
	room := h.store.lease()
	defer room.release()
	r, err := node.askTask(ctx, q.taskID, q.all, room)
	if err != nil {
		return fetched{}, h.doubt(err, unreadable)
	}
	var got fetched
	switch kept, ok := h.store.get(k); {
	case r.finished:
		got.entry = h.store.put(k, r, time.Duration(h.Cache.TTL))
		h.save(got.entry)
	case ok && kept.report().finished:
		got.entry = &entry{value: r}
	default:
		got.entry = h.store.put(k, r, time.Duration(h.PollInterval))
	}
	return got, nil
}

// fetchSubmission is the fetcher of submissions. What one became never changes.
func (h *Handler) fetchSubmission(ctx context.Context, broker *peer, k key, q question, _ bool) (fetched, error) {
	e, unreadable := h.recall(ctx, k)
	if e != nil {
		return fetched{entry: e}, nil
	}
	room := h.store.lease()
	defer room.release()
	sub, err := broker.askSubmission(ctx, q.submitID, room)
	if err != nil {
		return fetched{}, h.doubt(err, unreadable)
	}
	if sub.queued {
		return fetched{entry: h.store.put(k, sub, time.Duration(h.PollInterval))}, nil
	}
	e = h.store.put(k, sub, time.Duration(h.Cache.TTL))
	h.save(e)
	return fetched{entry: e}, nil
}

// doubt keeps a caller from believing that something is unknown, or that only the peer fails, while what is wanted may
// well be in a storage that cannot be read.
func (h *Handler) doubt(err, unreadable error) error {
	p, ok := errors.AsType[*problem](err)
	switch {
	case !ok || unreadable == nil || p == errSubmissionFailed:
		return err
	case p.status != http.StatusNotFound:
		return p.adding("the storage that may have it cannot be read either")
	}
	return &problem{
		status: http.StatusServiceUnavailable, code: "storage_unavailable", asked: true,
		retryAfter: time.Duration(h.FailDuration),
		detail:     "it is not known any more where it came from, and the storage that may have it cannot be read: ask again after Retry-After",
	}
}

// recall gives what is stored under k, which memory keeps from then on, and nil where there is nothing.
func (h *Handler) recall(ctx context.Context, k key) (*entry, error) {
	if h.archive == nil {
		return nil, nil
	}
	value, left, err := h.archive.load(ctx, k, time.Duration(h.FailDuration))
	if err != nil || value == nil {
		return nil, err
	}
	return h.store.put(k, value, min(time.Duration(h.Cache.TTL), left)), nil
}

// save has an entry stored. Where there is no storage yet, or no room to wait for it, that is tried again when the entry
// is asked for.
func (h *Handler) save(e *entry) {
	e.unsaved.Store(h.archive == nil || !h.archive.save(e.key, e.value))
}

// unknownNode says which of the two has to be corrected: the question or the configuration.
func unknownNode(q question) *problem {
	p := &problem{status: http.StatusNotFound, code: "unknown_node", detail: "no node goes by this appServerID: check it"}
	if q.submitID != "" {
		p.detail = "the submission went to a node that is not configured here: the operator has to add it"
	}
	return p
}

// mentionKept tells a caller who wanted no kept report that there is one, when there is no other.
func (h *Handler) mentionKept(err error, k key) error {
	p, ok := errors.AsType[*problem](err)
	if !ok {
		return err
	}
	if e, ok := h.store.get(k); !ok || !e.value.isReport() {
		return err
	}
	return p.adding("a report is kept here: ask without nocache to get it")
}

// Interface guards
var (
	_ caddy.Module                = (*Handler)(nil)
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
