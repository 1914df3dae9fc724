package fsbroker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

func init() {
	caddy.RegisterModule(new(App))
}

// App is the app of the `fsbroker_task` handlers of a configuration. It holds their namespaces, starts the health checks
// and emits the events. The handlers configure it: it has no options of its own, and need not be in a configuration.
type App struct {
	events     *caddyevents.App
	logger     *zap.Logger
	checks     context.Context    // of the health checks
	endChecks  context.CancelFunc // nil until Provision
	checking   chan struct{}      // bounds the health checks that run at once
	namespaces map[string]*namespace

	mu      sync.Mutex // guards running
	running bool       // between Start and Stop; no events are emitted otherwise
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "fsbroker",
		New: func() caddy.Module { return new(App) },
	}
}

// maxChecks bounds the health checks that run at once.
const maxChecks = 16

// Provision sets up the app, without a namespace.
func (a *App) Provision(ctx caddy.Context) error {
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	a.events, a.logger = events.(*caddyevents.App), ctx.Logger()
	a.checks, a.endChecks = context.WithCancel(context.Background())
	a.checking = make(chan struct{}, maxChecks)
	a.namespaces = make(map[string]*namespace)
	filterStdLog()
	return registerMetrics(ctx.GetMetricsRegistry(), live.stats)
}

// Start begins the health checks, and to follow what is pending.
func (a *App) Start() error {
	a.setRunning(true)
	for _, ns := range a.namespaces {
		ns.startFollowing()
		if ns.options.HealthInterval <= 0 {
			continue
		}
		for u := range ns.resolver.upstreams() {
			// Stop does not wait for the checks: an event handler may be waiting for a new configuration.
			go func() {
				defer ns.resolver.closeIdleConnections()
				a.checkRegularly(ns, u)
			}()
		}
	}
	return nil
}

// checkRegularly checks the health of an upstream until the app stops. Checks of different upstreams are spread out.
func (a *App) checkRegularly(ns *namespace, u *upstream) {
	interval := time.Duration(ns.options.HealthInterval)
	for wait := rand.N(min(interval, time.Second)); ; wait = interval - interval/10 + rand.N(interval/5) { //nolint:gosec // jitter
		select {
		case <-time.After(wait):
		case <-a.checks.Done():
			return
		}
		select {
		case a.checking <- struct{}{}:
			ns.resolver.check(a.checks, u)
			<-a.checking
		case <-a.checks.Done():
			return
		}
	}
}

// Stop ends the health checks, and to follow what is pending.
func (a *App) Stop() error {
	for _, ns := range a.namespaces {
		ns.stopFollowing()
	}
	a.setRunning(false)
	a.endChecks()
	return nil
}

func (a *App) setRunning(running bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.running = running
}

// emit emits an event about an upstream. The reason is the code of the failure that began or ended. A handler that panics
// costs the response nothing, which made the event.
func (a *App) emit(ns *namespace, u *upstream, event, reason string) {
	a.mu.Lock()
	running := a.running
	a.mu.Unlock()
	if !running {
		return
	}
	_ = guard.Do(ns.logger, func() error {
		a.events.Emit(ns.ctx, event, map[string]any{
			"namespace": ns.name, "role": u.role.String(), "node": u.name, "address": u.base.Host, "reason": reason,
		})
		return nil
	})
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

// Cleanup releases what the namespaces share with other configurations. Requests under way are still answered.
func (a *App) Cleanup() error {
	if a.endChecks != nil {
		a.endChecks()
	}
	var err error
	for _, ns := range a.namespaces {
		err = errors.Join(err, ns.close())
	}
	return err
}

// namespace is what the handlers of a configuration that have the same namespace share.
type namespace struct {
	name     string
	options  *Handler // of the first handler; its secrets and MaxWait are its own
	settings settings
	place    string        // of the first handler
	ctx      caddy.Context // of the first handler, which is the origin of the events

	logger    *zap.Logger
	member    *member
	resolver  *resolver
	pollers   *pollers
	proxy     *proxy // nil if nothing is passed through
	archiveID string // in the pool of archives
	backend   *archive.Backend
	source    *harvest.Source // nil if nothing is followed
}

var namespaceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

var errNamespace = errors.New("namespace must be 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or a digit")

// namespaceOf returns the namespace of a handler. The first handler makes it. The others must be configured alike.
func (a *App) namespaceOf(ctx caddy.Context, h *Handler) (*namespace, error) {
	name := h.Cache.Namespace
	if !namespaceName.MatchString(name) {
		return nil, errNamespace
	}
	place := "another route"
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		place = fmt.Sprintf("a route of the server on %v", server.Listen)
	}
	s, err := newSettings(h)
	if err != nil {
		return nil, err
	}
	ns := a.namespaces[name]
	if ns == nil {
		ns = &namespace{name: name, options: h, settings: s, place: place, ctx: ctx}
		a.namespaces[name] = ns // before it can fail: Cleanup closes it
		return ns, a.provision(ctx, ns)
	}
	if option := s.differsIn(ns.settings); option != "" {
		return nil, errDiffers(name, option, ns.place, place)
	}
	return ns, nil
}

// errDiffers says that two handlers of a namespace differ in an option.
func errDiffers(namespace, option, one, other string) error {
	return fmt.Errorf("the handlers of the namespace %q differ in %s, at %s and at %s: configure them alike, with a snippet and import, or give one a cache { namespace } of its own",
		namespace, option, one, other)
}

// settings are the options in which the handlers of a namespace must not differ, as hashes of their JSON.
type settings map[string][sha256.Size]byte

// newSettings returns the settings of a handler, before its modules are loaded.
func newSettings(h *Handler) (settings, error) {
	with := *h // a copy, with defaults
	with.Cache = new(Cache)
	if h.Cache != nil {
		*with.Cache = *h.Cache
	}
	if h.Harvest != nil {
		followed := *h.Harvest
		with.Harvest = &followed
	}
	with.setDefaults()
	values := map[string]any{
		"transport":          with.TransportRaw,
		"timeout":            with.Timeout,
		"poll_interval":      with.PollInterval,
		"max_report":         with.MaxReport,
		"fail_duration":      with.FailDuration,
		"health_interval":    with.HealthInterval,
		"health_timeout":     with.HealthTimeout,
		"harvest":            with.Harvest,
		"ttl":                with.Cache.TTL,
		"max_size":           with.Cache.MaxSize,
		"storage":            with.Cache.StorageRaw,
		"retention":          with.Cache.Retention,
		"encryption_key":     with.Cache.EncryptionKeys,
		"accept_unencrypted": with.Cache.AcceptUnencrypted,
	}
	if b := with.Broker; b != nil {
		values["broker"], values["proxy"] = b.Endpoint, b.Proxy
	}
	for _, n := range with.Nodes {
		values[fmt.Sprintf("node %q", n.AppServerID)] = n
	}
	s := make(settings, len(values))
	for name, value := range values {
		text, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		var canonical any // members in one order
		if err := json.Unmarshal(text, &canonical); err != nil {
			return nil, err
		}
		if text, err = json.Marshal(canonical); err != nil {
			return nil, err
		}
		s[name] = sha256.Sum256(text)
	}
	return s, nil
}

// differsIn returns an option in which the settings differ. It is empty if there is none.
func (s settings) differsIn(other settings) string {
	names := maps.Clone(s)
	maps.Copy(names, other)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		one, has := s[name]
		two, hasToo := other[name]
		if has != hasToo || one != two {
			return name
		}
	}
	return ""
}

// provision sets up a namespace.
func (a *App) provision(ctx caddy.Context, ns *namespace) error {
	transport, err := loadTransport(ctx, ns.options)
	if err != nil {
		return err
	}
	notify := func(u *upstream, event, reason string) { a.emit(ns, u, event, reason) }
	if err := ns.setUp(transport, a.logger.With(zap.String("namespace", ns.name)), notify); err != nil {
		return err
	}
	if err := ns.openArchive(ctx); err != nil {
		return err
	}
	if err := a.openFollower(ns); err != nil {
		return err
	}
	if b := ns.options.Broker; b != nil && len(b.Proxy) > 0 {
		if ns.proxy, err = newProxy(ctx, ns.resolver, b.Proxy, ns.logger); err != nil {
			return fmt.Errorf("broker: %w", err)
		}
	}
	live.add(ns.resolver)
	return nil
}

// loadTransport loads the transport of a handler.
func loadTransport(ctx caddy.Context, h *Handler) (*reverseproxy.HTTPTransport, error) {
	mod, err := ctx.LoadModule(h, "TransportRaw")
	if err != nil {
		return nil, fmt.Errorf("loading the transport: %w", err)
	}
	transport, ok := mod.(*reverseproxy.HTTPTransport)
	if !ok { // other transports need the request of a caller
		return nil, fmt.Errorf("the transport %T is not supported: use http", mod)
	}
	if transport.ProxyProtocolEnabled() {
		return nil, errors.New("the transport's proxy_protocol is not supported: a request to a node has no single client whose address could be sent")
	}
	if transport.Transport.MaxResponseHeaderBytes == 0 {
		transport.Transport.MaxResponseHeaderBytes = maxResponseHeader
	}
	withPatientWrites(transport.Transport)
	return transport, nil
}

// maxResponseHeader is the default for the size of an upstream's response header, in bytes. The header does not count as
// memory for answers, and the default of net/http is 10 MB.
const maxResponseHeader = 64 << 10

// setUp sets up the upstreams and what answers with their reports.
func (ns *namespace) setUp(transport *reverseproxy.HTTPTransport, logger *zap.Logger, notify func(u *upstream, event, reason string)) error {
	o := ns.options
	ns.logger = logger
	var err error
	if ns.member, err = joinShared(ns.name, o.Cache.MaxSize); err != nil {
		return err
	}
	nodes, broker, err := newUpstreams(o, endpointOptions{
		upstreamOptions: upstreamOptions{
			transport: transport, budget: ns.member.budget, timeout: time.Duration(o.Timeout), maxAnswer: o.MaxReport, logger: logger,
		},
		tls: transport.TLS, failDuration: time.Duration(o.FailDuration), notify: notify,
	})
	if err != nil {
		return err
	}
	ns.resolver = newResolver(ns.name, nodes, broker, ns.member.shared, resolverOptions{
		ttl:                  time.Duration(o.Cache.TTL),
		pollInterval:         time.Duration(o.PollInterval),
		failDuration:         time.Duration(o.FailDuration),
		healthTimeout:        time.Duration(o.HealthTimeout),
		questionTimeout:      3*time.Duration(o.Timeout) + time.Minute, // the upstreams, one after the other, and the storage
		closeIdleConnections: transport.Transport.CloseIdleConnections,
		logger:               logger,
	})
	ns.pollers = newPollers(ns.resolver.resolve, time.Duration(o.PollInterval), logger)
	return nil
}

// newUpstreams returns the nodes by their application server IDs, and the broker if there is one.
func newUpstreams(h *Handler, o endpointOptions) (nodes map[string]*upstream, broker *upstream, err error) {
	if len(h.Nodes) == 0 && h.Broker == nil {
		return nil, nil, errNoUpstream
	}
	repl := caddy.NewReplacer()
	nodes = make(map[string]*upstream, len(h.Nodes))
	for i, n := range h.Nodes {
		if !task.ValidID(n.AppServerID) {
			return nil, nil, fmt.Errorf("node %d: the application server ID must be 1 to %d bytes without control characters", i+1, task.MaxIDLength)
		}
		if _, exists := nodes[n.AppServerID]; exists {
			return nil, nil, fmt.Errorf("node %q is configured twice", n.AppServerID)
		}
		if nodes[n.AppServerID], err = n.newUpstream(repl, problem.RoleNode, n.AppServerID, o); err != nil {
			return nil, nil, fmt.Errorf("node %q: %w", n.AppServerID, err)
		}
	}
	if h.Broker == nil {
		return nodes, nil, nil
	}
	if broker, err = h.Broker.newUpstream(repl, problem.RoleBroker, "", o); err != nil {
		return nil, nil, fmt.Errorf("broker: %w", err)
	}
	return nodes, broker, nil
}

// keyring returns the keys that reports are encrypted with in the storage. It is nil if there are none.
func (c *Cache) keyring() (*archive.Keyring, error) {
	repl := caddy.NewReplacer()
	var keys []string
	for i, key := range c.EncryptionKeys {
		value, err := resolveSecret(repl, key)
		if err != nil {
			return nil, fmt.Errorf("cache.encryption_keys: key %d: %w", i+1, err)
		}
		keys = append(keys, value)
	}
	ring, err := archive.NewKeyring(keys...)
	if err != nil {
		return nil, fmt.Errorf("cache.encryption_keys: %w", err)
	}
	if ring != nil {
		ring.AcceptUnsealed = c.AcceptUnencrypted
	}
	return ring, nil
}

// openArchive opens the archive if a storage is configured for it.
func (ns *namespace) openArchive(ctx caddy.Context) error {
	cache := ns.options.Cache
	if cache.StorageRaw == nil {
		return nil
	}
	id, storage := ns.name+" "+string(cache.StorageRaw), ctx.Storage()
	var module struct {
		Name string `json:"module"`
	}
	if err := json.Unmarshal(cache.StorageRaw, &module); err != nil {
		return fmt.Errorf(`cache.storage must be an object, such as {"module": "file_system", "root": "/var/lib/fsbroker"}: %w`, err)
	}
	if module.Name != "" {
		mod, err := ctx.LoadModule(cache, "StorageRaw")
		if err != nil {
			return fmt.Errorf("loading the storage %s: %w", module.Name, err)
		}
		if storage, err = mod.(caddy.StorageConverter).CertMagicStorage(); err != nil {
			return fmt.Errorf("opening the storage %s: %w", module.Name, err)
		}
	}
	name := cmp.Or(module.Name, storageName(storage))
	ring, err := cache.keyring()
	if err != nil {
		return err
	}
	backend := &archive.Backend{
		Name: name, Storage: storage, Logger: ns.logger.With(zap.String("storage", name)), Retention: time.Duration(cache.Retention), Keyring: ring,
	}
	opened, err := openArchive(ns.name, id, ns.member.shared, backend)
	if err != nil {
		return err
	}
	ns.resolver.archive, ns.archiveID, ns.backend = opened, id, backend
	return nil
}

// openFollower joins the follower of the namespace, which is not used before startFollowing.
func (a *App) openFollower(ns *namespace) error {
	o := ns.options
	if o.Harvest == nil {
		return nil
	}
	f, err := joinFollower(ns.name, ns.member.shared, ns.logger)
	if err != nil {
		return err
	}
	ns.resolver.follower = f
	ns.source = &harvest.Source{
		Fetch:        ns.resolver.fetchFollowed,
		Upstream:     ns.resolver.firstUpstream,
		Finished:     func(t harvest.Target) { a.emitFinished(ns, t) },
		Summary:      o.Harvest.Summary,
		Complete:     o.Harvest.Complete,
		PollInterval: time.Duration(o.PollInterval),
		For:          time.Duration(o.Harvest.For),
		Notes:        ns.resolver.archive,
		Logger:       ns.logger,
	}
	return nil
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

// storageName returns the name of the module of Caddy's own storage.
func storageName(storage certmagic.Storage) string {
	switch s := storage.(type) {
	case caddy.Module:
		return s.CaddyModule().ID.Name()
	case *certmagic.FileStorage: // not its module, filestorage.FileStorage
		return "file_system"
	}
	return fmt.Sprintf("%T", storage)
}

// shutDown ends waits, and begins to store what is queued. A server calls it at the beginning of its grace period.
func (ns *namespace) shutDown() {
	ns.pollers.stop()
	if ns.backend != nil {
		ns.resolver.archive.Flush(ns.backend)
	}
}

// drain waits until what is queued is stored, and what is pending is noted. A server calls it when it has shut down, while
// modules can still be used. The grace period may be over, so its context does not matter.
func (ns *namespace) drain(context.Context) error {
	if ns.backend == nil {
		return nil
	}
	err := ns.resolver.archive.Drain(ns.backend)
	if ns.source != nil {
		ns.resolver.follower.Flush()
	}
	return err
}

// close undoes provision, which may have failed.
func (ns *namespace) close() error {
	var err error
	if ns.pollers != nil {
		ns.pollers.stop()
		ns.resolver.retired.Store(true)
		for u := range ns.resolver.upstreams() {
			u.health.close()
		}
		live.remove(ns.resolver)
	}
	err = ns.closeFollower()
	if ns.backend != nil {
		err = errors.Join(err, closeArchive(ns.archiveID, ns.resolver.archive, ns.backend))
	}
	if ns.member != nil {
		err = errors.Join(err, ns.member.leave())
	}
	return err
}

// Interface guards
var (
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)
