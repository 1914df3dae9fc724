// Package fsbroker is a plugin for the Caddy web server. Its HTTP handler, fsbroker_task, serves the fsBroker Task API
// (GET /task): the report of a file-analysis task. The report is fetched from the broker or from a processor node. It is kept
// in memory and, if configured, in a storage. The rest of the broker's API can be passed through.
//
// The Task API is that of OPSWAT Filescan's fsBroker, documented at https://www.opswat.com/docs/filescan.
package fsbroker

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

func init() {
	caddy.RegisterModule(new(Handler))
}

// Handler serves the fsBroker Task API, `GET /task`. It checks the caller's secret and responds with the report of a
// file-analysis task. It has the report in memory or in a storage, or else
// [asks the broker or a processor node](https://github.com/caddy-fsbroker/caddy-fsbroker/blob/main/docs/API.md#where-a-report-comes-from).
//
// A caller identifies the report by the submission (`submitID`), which requires a broker, or by the node and its task
// (`appServerID` and `taskID`). With `sha256`, it gets the newest finished report of a file that is kept. With `all=true` it
// asks for the complete report, and with `nocache=true` for the upstream's current one, whatever is kept. With
// `Prefer: wait=<seconds>`, or the query parameter `wait`, the response is held until the report is finished. The caller
// authenticates with `Authorization: Bearer <secret>`, with the header `secret` or `X-Api-Key`, or with the query parameter
// `secret` or `serect`, which ends up in logs.
//
// A finished report is kept for the cache's TTL, whatever the node does with it meanwhile. An unfinished report is kept
// for the poll interval, so any number of callers that poll or wait cost an upstream one request. Errors are never kept.
// They are problem documents (RFC 9457) with a stable code.
//
// The broker's other endpoints, such as `/submit`, can be passed through, for the same secret of the caller. Bodies are
// streamed in both directions.
//
// The placeholder `{http.fsbroker.client}` is the name of the client whose secret was presented. So is
// `{http.auth.user.id}`, which Caddy's access log shows as `user_id`, unless another handler has set it before. When the
// response is written, `{http.fsbroker.cache}` is what the cache did for the request (`hit`, `storage`, `miss`, `bypass`,
// `collapsed`, `error` or `none`), `{http.fsbroker.node}` is the node whose report it is, if that is known, and
// `{http.fsbroker.upstream}` is `node` or `broker` if that was asked for it. The access log has all four as
// `fsbroker_client`, `fsbroker_cache`, `fsbroker_node` and `fsbroker_upstream`.
//
// The handler responds to every request that reaches it: put a path matcher in front of it, as the Caddyfile directive
// does by default.
type Handler struct {
	// The secrets of the callers. At least one is required.
	Secrets []Secret `json:"secrets,omitempty"`

	// The processor nodes. A report that is named by its node and task is fetched from that node first. A node or a broker is
	// required.
	Nodes []Node `json:"nodes,omitempty"`

	// The broker. It is asked for the reports of submissions, and for those that no configured node has. Without a broker,
	// `submitID` is rejected.
	Broker *Broker `json:"broker,omitempty"`

	// How the nodes and the broker are connected to: the `http` transport of `reverse_proxy`, without its
	// `proxy_protocol`. Default: `http` with its defaults
	TransportRaw json.RawMessage `json:"transport,omitempty" caddy:"namespace=http.reverse_proxy.transport inline_key=protocol"`

	// The maximum duration of a request to a node or the broker, including the body of its answer. Waiting in line for one of
	// the 64 requests that each of them gets at a time does not count. Default: `30s`
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// How long an unfinished report is kept, and the answer that a submission is queued, or was accepted and is not known yet.
	// With `harvest`, that is 24 seconds at the most. While callers wait for a report, it is fetched at this interval. Default: `2s`
	PollInterval caddy.Duration `json:"poll_interval,omitempty"`

	// The maximum time for which a caller can have the response held until the report is finished. It counts from the start of
	// the request. A wait also ends at nine tenths of the server's write timeout, if there is one. Default: `60s`
	MaxWait caddy.Duration `json:"max_wait,omitempty"`

	// The maximum size of an answer of a node or the broker, inflated, in bytes. Default: 67108864 (64 MiB)
	MaxReport int64 `json:"max_report,omitempty"`

	// How long a node or the broker is not asked again after it could not be connected to. It is also the `Retry-After` of
	// problems that may pass, and how long no request may fail before a node or the broker is healthy again. Default: `10s`
	FailDuration caddy.Duration `json:"fail_duration,omitempty"`

	// The interval at which each node and the broker are asked for their `/system-info`, to check their health. One that
	// cannot be connected to is treated as if a request for a report had not connected. One that answers too late, or with
	// anything but a JSON object, is unhealthy. That is logged, and it is still asked for reports. The events
	// `fsbroker_node_unhealthy` and `fsbroker_node_healthy` are emitted when the state changes, with `namespace`, `role`, `node`,
	// `address` and `reason`, whether a check or a request has found it. Default: no checks
	HealthInterval caddy.Duration `json:"health_interval,omitempty"`

	// The maximum duration of a health check, and of a request for `/system-info` by the admin API. Default: `5s`
	HealthTimeout caddy.Duration `json:"health_timeout,omitempty"`

	// If it is given, submissions and tasks are followed until their reports are finished, although nobody asks for them.
	// Default: they are not followed
	Harvest *Harvest `json:"harvest,omitempty"`

	// What is kept, and for how long.
	Cache *Cache `json:"cache,omitempty"`

	logger    *zap.Logger
	server    *caddyhttp.Server // in whose routes the handler is; nil in a test without one
	clients   clients
	site      *site
	responder responder
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
	doubts := h.doubts()
	h.setDefaults()
	if err := h.validate(); err != nil {
		return err
	}
	var err error
	if h.clients, err = newClients(caddy.NewReplacer(), h.Secrets, h.served()); err != nil {
		return err
	}
	app, err := ctx.App("fsbroker")
	if err != nil {
		return fmt.Errorf("getting the fsbroker app: %w", err)
	}
	if h.site, err = app.(*App).siteOf(ctx, h); err != nil {
		return err
	}
	if h.site.first == h { // the others are alike
		for _, doubt := range doubts {
			h.logger.Warn(doubt, zap.String("namespace", h.site.ns.name))
		}
	}
	h.responder = responder{memory: h.site.ns.memory, retryAfter: time.Duration(h.PollInterval), logger: h.logger}
	var ok bool
	if h.server, ok = ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		// Cleanup comes only after the grace period, which waiting callers would use up.
		h.server.RegisterOnShutdown(h.site.shutDown)
		h.server.RegisterOnStop(h.site.drain)
	}
	return nil
}

// served returns the paths of all endpoints that the handler serves.
func (h *Handler) served() []string {
	if h.Broker == nil {
		return servedPaths(nil)
	}
	return servedPaths(h.Broker.Proxy)
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
	if h.TransportRaw == nil {
		h.TransportRaw = json.RawMessage(`{"protocol":"http"}`)
	}
	if h.Harvest != nil {
		h.Harvest.setDefaults()
	}
	setDefault(&h.Cache.Namespace, defaultNamespace)
	setDefault(&h.Cache.TTL, caddy.Duration(defaultTTL))
	setDefault(&h.Cache.MaxSize, defaultMaxSize)
	if h.Cache.StorageRaw != nil {
		setDefault(&h.Cache.Retention, caddy.Duration(defaultRetention))
	}
}

func (h *Harvest) setDefaults() {
	if !h.Summary && !h.Complete {
		h.Summary, h.Complete = true, true
	}
	setDefault(&h.For, caddy.Duration(defaultHarvestFor))
}

func setDefault[T comparable](option *T, value T) {
	var unset T
	if *option == unset {
		*option = value
	}
}

// validate checks the options. Those of a Caddyfile have been checked before.
func (h *Handler) validate() error {
	var harvestFor caddy.Duration
	if h.Harvest != nil {
		harvestFor = h.Harvest.For
	}
	for name, d := range map[string]caddy.Duration{
		"harvest.for":     harvestFor,
		"timeout":         h.Timeout,
		"poll_interval":   h.PollInterval,
		"max_wait":        h.MaxWait,
		"fail_duration":   h.FailDuration,
		"health_interval": h.HealthInterval,
		"health_timeout":  h.HealthTimeout,
		"cache.ttl":       h.Cache.TTL,
		"cache.retention": h.Cache.Retention,
	} {
		if err := checkDuration(name, d); err != nil {
			return err
		}
	}
	if err := cmp.Or(checkSign("max_report", h.MaxReport), checkSign("cache.max_size", h.Cache.MaxSize)); err != nil {
		return err
	}
	return h.Cache.check()
}

// doubts returns what in the configuration is possible, but is probably not meant. It must be called before the defaults are
// filled in.
func (h *Handler) doubts() (doubts []string) {
	for _, short := range []struct {
		name         string
		value, least caddy.Duration
		effect       string
	}{
		{"timeout", h.Timeout, caddy.Duration(100 * time.Millisecond), "an upstream hardly answers in that time"},
		{"poll_interval", h.PollInterval, caddy.Duration(100 * time.Millisecond), "an upstream is asked that often for each unfinished report"},
		{"max_wait", h.MaxWait, caddy.Duration(time.Second), "callers wait for whole seconds"},
		{"health_interval", h.HealthInterval, caddy.Duration(time.Second), "each upstream is checked that often"},
	} {
		if short.value > 0 && short.value < short.least {
			doubts = append(doubts, fmt.Sprintf("%s is only %s: %s; perhaps %ds is meant",
				short.name, time.Duration(short.value), short.effect, time.Duration(short.value).Milliseconds()))
		}
	}
	doubts = append(doubts, doubtSize("max_report", h.MaxReport, smallestReport, "hardly a report is that small")...)
	if h.Cache != nil {
		doubts = append(doubts, doubtSize("max_size", h.Cache.MaxSize, smallestCache, "hardly a report is kept in memory")...)
		if h.Cache.AcceptUnencrypted {
			doubts = append(doubts, "accept_unencrypted is set: whoever can write to the storage can forge reports without a key; remove it when the retention has passed since encryption_key was set")
		}
	}
	if h.HealthTimeout > 0 && h.HealthInterval == 0 {
		doubts = append(doubts, "health_timeout is set, but nothing is checked without health_interval: set that as well; only the request of the admin API's /fsbroker/nodes has that timeout")
	}
	return doubts
}

// check checks that what an option needs is configured as well.
func (c *Cache) check() error {
	switch {
	case c.Retention > 0 && c.StorageRaw == nil:
		return errRetention
	case len(c.EncryptionKeys) > 0 && c.StorageRaw == nil:
		return errEncryptionKey
	case c.AcceptUnencrypted && len(c.EncryptionKeys) == 0:
		return errAcceptUnencrypted
	}
	return nil
}

var (
	errNoUpstream        = errors.New("no upstream is configured: at least one node or broker is required")
	errRetention         = errors.New("retention needs a storage: configure storage as well")
	errEncryptionKey     = errors.New("encryption_key needs a storage: configure storage as well")
	errAcceptUnencrypted = errors.New("accept_unencrypted needs a key: configure encryption_key as well")
)

// ServeHTTP responds with a report. It authenticates the request, parses the query, resolves it, waits for an unfinished
// report if the caller asks for that, and writes the response.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	info := newRequestInfo(r, h.server)
	info.addVary(w.Header())
	if r.ContentLength == 0 { // as most requests
		h.serve(w, r, info)
		return nil
	}
	body := newCallerBody(r.Body)
	r.Body = body
	if r.ProtoMajor == 1 {
		w = &closingWriter{&caddyhttp.ResponseWriterWrapper{ResponseWriter: w}, body}
	}
	defer body.stop(w)
	h.serve(w, r, info)
	if info.client == nil {
		body.linger(w, r, lingerForOthers)
	} else {
		body.linger(w, r, lingerForClients)
	}
	return nil
}

// serve responds to a request.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request, info *requestInfo) {
	e := h.site.proxy.match(r)
	switch {
	case r.Method == http.MethodOptions:
		countRequest(writeOptions(w, e), outcomeNone, "", e)
		return
	case e != taskEndpoint:
		h.pass(w, r, info, e)
		return
	}
	q := parseQuery(r.URL.RawQuery)
	q.direct(r.Header)
	if p := h.admit(r, &q, info, e); p != nil {
		h.respond(w, r, info, failed(p))
		return
	}
	res := h.site.resolve(r.Context(), &q.query)
	if res.problem == nil && !res.entry.report.Finished() {
		h.site.follow(&q.query, res.entry.report, info.clientName())
		res = h.wait(w, r, &q, res)
	}
	h.respond(w, r, info, res)
}

// admit authenticates the request and returns the problem that keeps it from being served, if there is one.
func (h *Handler) admit(r *http.Request, q *parsedQuery, info *requestInfo, e *endpoint) *problem.Problem {
	info.client = h.clients.authenticate(r.Header, q)
	if info.client == nil {
		return &problem.Problem{Kind: problem.Unauthorized, Detail: "send a valid secret in a header: Authorization: Bearer <secret> (a field of a form is not read)"}
	}
	if q.given&paramsSecret != 0 {
		info.client.warnOfQuery(h.logger)
	}
	if !info.client.may(e) {
		return &problem.Problem{Kind: problem.Forbidden, Detail: "this client may not use " + e.path + ": its operator can allow that"}
	}
	if !slices.Contains(e.methods, r.Method) {
		return &problem.Problem{Kind: problem.MethodNotAllowed, Detail: "this endpoint does not have the method: use one that the header Allow names", Methods: e.methods}
	}
	return q.problem
}

// wait waits for an unfinished report for as long as the caller asks for, up to MaxWait. That counts from the start of the
// request: there is no wait if the first answer has taken all of it.
func (h *Handler) wait(w http.ResponseWriter, r *http.Request, q *parsedQuery, res result) result {
	seconds := q.wait
	if q.given&paramWait == 0 {
		seconds = preferredWait(r.Header)
	}
	start, granted := startOf(r), min(time.Duration(seconds)*time.Second, time.Duration(h.MaxWait))
	if deadline := h.writeDeadline(r); !deadline.IsZero() {
		// Leave time to write the response. Caddy's idle timeout enforces the deadline, so it cannot be extended.
		granted = min(granted, deadline.Sub(start)*9/10)
	}
	left := time.Until(start.Add(granted))
	if left <= 0 {
		return res
	}
	w.Header().Set("Preference-Applied", "wait="+wholeSeconds(granted))
	h.site.ns.waiters.Add(1)
	defer h.site.ns.waiters.Add(-1)
	return h.site.pollers.wait(r.Context(), q.query, res, left)
}

// startOf returns when the server began to serve a request. Without a server, that is now.
func startOf(r *http.Request) time.Time {
	if start, ok := caddyhttp.GetVar(r.Context(), "start_time").(time.Time); ok {
		return start
	}
	return time.Now()
}

// writeDeadline returns when the server's write timeout ends the response. It is zero if there is none.
func (h *Handler) writeDeadline(r *http.Request) time.Time {
	if h.server == nil || h.server.WriteTimeout <= 0 {
		return time.Time{}
	}
	return startOf(r).Add(time.Duration(h.server.WriteTimeout))
}

// undelivered reports whether a response was too late for the server's write timeout. It may be buffered still, so only a
// flush shows that.
func (h *Handler) undelivered(w http.ResponseWriter, r *http.Request) bool {
	deadline := h.writeDeadline(r)
	if deadline.IsZero() || time.Now().Before(deadline) {
		return false
	}
	err := http.NewResponseController(w).Flush()
	return err != nil && !errors.Is(err, http.ErrNotSupported)
}

// respond writes the response for a result, and counts the request.
func (h *Handler) respond(w http.ResponseWriter, r *http.Request, info *requestInfo, res result) {
	info.cache, info.node = res.outcome(), res.node
	if res.from != nil {
		info.upstream = res.from.Role
	}
	var status int
	switch p := res.problem; {
	case p == nil:
		status = h.responder.write(w, r, &res)
	case p.Kind == problem.CallerLeft: // this is for the access log
		status = p.Status()
		w.WriteHeader(status)
	default:
		status = writeProblem(w, r, p, cacheStatus(&res))
	}
	if h.undelivered(w, r) {
		status = problem.StatusCallerLeft
	}
	if info.cache == outcomeHit && info.client.hits.count(status) {
		return
	}
	countRequest(status, info.cache, info.clientName(), taskEndpoint)
}

// pass passes a request to the broker, and the broker's response to the caller.
func (h *Handler) pass(w http.ResponseWriter, r *http.Request, info *requestInfo, e *endpoint) {
	q, rest := cutSecrets(r.URL.RawQuery)
	p := h.admit(r, &q, info, e)
	if p == nil {
		p = h.site.proxy.broker.Down()
	}
	recorder := caddyhttp.NewResponseRecorder(w, nil, nil)
	call := &proxiedCall{client: info.clientName()}
	defer func() {
		countRequest(call.status(recorder.Status(), h.undelivered(w, r)), outcomeNone, info.clientName(), e)
	}()
	if p == nil {
		info.upstream = problem.RoleBroker
		p = h.site.proxy.serve(recorder, r, e, rest, call)
	}
	if p != nil {
		writeProblem(recorder, r, p, bypassStatus(p))
	}
	call.returned = true
}

// Interface guards
var (
	_ caddy.Module                = (*Handler)(nil)
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
