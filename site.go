package fsbroker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// site is a configuration's use of a namespace. All handlers of the configuration with that namespace share it.
type site struct {
	*resolver
	first    *Handler // its options are those of the site, but for its secrets and MaxWait
	settings settings
	place    string // of the first handler

	pollers *pollers
	proxy   *proxy          // nil if nothing is passed through
	storage *storage        // nil without one
	source  *harvest.Source // nil if nothing is followed
}

// storage is the storage of a site.
type storage struct {
	*archive.Backend
	id string // its configuration as JSON: sites with the same one share an archive
}

// siteParts are what a site is made of.
type siteParts struct {
	first     *Handler
	settings  settings
	place     string
	transport *reverseproxy.HTTPTransport
	storage   *storage
	events    *events
	logger    *zap.Logger
}

// newSite returns the site of a handler. It must be closed.
func newSite(ctx caddy.Context, h *Handler, s settings, place string, events *events, logger *zap.Logger) (*site, error) {
	transport, err := loadTransport(ctx, h)
	if err != nil {
		return nil, err
	}
	storage, err := openStorage(ctx, h.Cache, logger)
	if err != nil {
		return nil, err
	}
	return joinNamespace(ctx, siteParts{h, s, place, transport, storage, events, logger})
}

// joinNamespace makes a site and adds it to its namespace.
func joinNamespace(ctx caddy.Context, parts siteParts) (_ *site, err error) {
	h := parts.first
	ns, err := useNamespace(h.Cache.Namespace)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ns.disuse())
		}
	}()
	emitter := &emitter{events: parts.events, namespace: ns.name, ctx: ctx, logger: parts.logger}
	nodes, broker, err := newUpstreams(h, endpointOptions{
		Options: upstream.Options{
			Transport: parts.transport, Budget: ns.memory.budget, Metrics: upstreamMetrics, Logger: parts.logger, Notify: emitter.changed,
			Timeout: time.Duration(h.Timeout), CheckTimeout: time.Duration(h.HealthTimeout), MaxAnswer: h.MaxReport, FailDuration: time.Duration(h.FailDuration),
		},
		tls: parts.transport.TLS,
	})
	if err != nil {
		return nil, err
	}
	reverse, err := loadReverseProxy(ctx, h.Broker, broker)
	if err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}

	// Nothing fails from here on.
	options := resolverOptions{
		ttl:                  time.Duration(h.Cache.TTL),
		pollInterval:         time.Duration(h.PollInterval),
		failDuration:         time.Duration(h.FailDuration),
		questionTimeout:      3*time.Duration(h.Timeout) + time.Minute, // the upstreams, one after the other, and the storage
		closeIdleConnections: parts.transport.Transport.CloseIdleConnections,
		logger:               parts.logger,
	}
	if parts.storage != nil {
		options.archive = ns.openArchive(parts.storage.id, parts.storage.Backend)
	}
	if h.Harvest != nil {
		options.follower = ns.openFollower(parts.logger)
	}
	rs := newResolver(ns, nodes, broker, options)
	ns.join(rs, h.Cache.MaxSize)
	return &site{
		resolver: rs, first: h, settings: parts.settings, place: parts.place, storage: parts.storage,
		pollers: newPollers(rs.resolve, rs.pollInterval, rs.logger),
		proxy:   newProxy(reverse, rs, h.Broker),
		source:  newSource(rs, h.Harvest, emitter.finished),
	}, nil
}

// newSource returns what a follower uses of a site. It is nil if nothing is followed.
func newSource(rs *resolver, h *Harvest, finished func(harvest.Target)) *harvest.Source {
	if h == nil {
		return nil
	}
	return &harvest.Source{
		Fetch:        rs.fetchFollowed,
		Upstream:     rs.firstUpstream,
		Finished:     finished,
		Summary:      h.Summary,
		Complete:     h.Complete,
		PollInterval: rs.pollInterval,
		For:          time.Duration(h.For),
		Notes:        rs.archive,
		Logger:       rs.logger,
	}
}

// start lets the follower ask, and take up what is noted in the storage.
func (s *site) start() {
	if s.source != nil {
		s.follower.Attach(s.source)
	}
}

// stop ends the follower's questions. What is accepted from then on is still noted.
func (s *site) stop() {
	if s.source != nil {
		s.follower.Pause(s.source)
	}
}

// shutDown ends waits, and begins to store what is queued. A server calls it at the beginning of its grace period.
func (s *site) shutDown() {
	s.pollers.stop()
	if s.storage != nil {
		s.archive.Flush(s.storage.Backend)
	}
}

// drain waits until what is queued is stored, and what is pending is noted. A server calls it when it has shut down, while
// modules can still be used. The grace period may be over, so its context does not matter.
func (s *site) drain(context.Context) error {
	if s.storage == nil {
		return nil
	}
	err := s.archive.Drain(s.storage.Backend)
	if s.source != nil {
		s.follower.Flush()
	}
	return err
}

// close undoes newSite. Requests under way are still answered.
func (s *site) close() error {
	s.pollers.stop()
	s.retired.Store(true)
	for u := range s.upstreams() {
		u.Close()
	}
	s.ns.leave(s.resolver)
	if s.source != nil {
		s.follower.Detach(s.source)
		s.ns.closeFollower()
	}
	if s.storage != nil {
		s.ns.closeArchive(s.storage.id, s.storage.Backend)
	}
	return s.ns.disuse()
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
	upstream.WithPatientWrites(transport.Transport)
	return transport, nil
}

// maxResponseHeader is the default for the size of an upstream's response header, in bytes. The header does not count as
// memory for answers, and the default of net/http is 10 MB.
const maxResponseHeader = 64 << 10

// newUpstreams returns the nodes by their application server IDs, and the broker if there is one.
func newUpstreams(h *Handler, o endpointOptions) (nodes map[string]*upstream.Upstream, broker *upstream.Upstream, err error) {
	if len(h.Nodes) == 0 && h.Broker == nil {
		return nil, nil, errNoUpstream
	}
	repl := caddy.NewReplacer()
	nodes = make(map[string]*upstream.Upstream, len(h.Nodes))
	for i, n := range h.Nodes {
		if !task.ValidID(n.AppServerID) {
			return nil, nil, fmt.Errorf("node %d: the application server ID must be 1 to %d bytes without control characters", i+1, task.MaxIDLength)
		}
		if _, exists := nodes[n.AppServerID]; exists {
			return nil, nil, fmt.Errorf("node %q is configured twice", n.AppServerID)
		}
		if nodes[n.AppServerID], err = n.newUpstream(repl, upstream.Origin{Role: problem.RoleNode, Name: n.AppServerID}, o); err != nil {
			return nil, nil, fmt.Errorf("node %q: %w", n.AppServerID, err)
		}
	}
	if h.Broker == nil {
		return nodes, nil, nil
	}
	if broker, err = h.Broker.newUpstream(repl, upstream.Origin{Role: problem.RoleBroker}, o); err != nil {
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

// openStorage opens the storage that a cache is configured with. It returns nil if there is none.
func openStorage(ctx caddy.Context, c *Cache, logger *zap.Logger) (*storage, error) {
	if c.StorageRaw == nil {
		return nil, nil
	}
	opened := ctx.Storage()
	var module struct {
		Name string `json:"module"`
	}
	if err := json.Unmarshal(c.StorageRaw, &module); err != nil {
		return nil, fmt.Errorf(`cache.storage must be an object, such as {"module": "file_system", "root": "/var/lib/fsbroker"}: %w`, err)
	}
	id := string(c.StorageRaw) // before it is loaded
	if module.Name != "" {
		mod, err := ctx.LoadModule(c, "StorageRaw")
		if err != nil {
			return nil, fmt.Errorf("loading the storage %s: %w", module.Name, err)
		}
		if opened, err = mod.(caddy.StorageConverter).CertMagicStorage(); err != nil {
			return nil, fmt.Errorf("opening the storage %s: %w", module.Name, err)
		}
	}
	name := cmp.Or(module.Name, storageName(opened))
	ring, err := c.keyring()
	if err != nil {
		return nil, err
	}
	return &storage{id: id, Backend: &archive.Backend{
		Name: name, Storage: opened, Logger: logger.With(zap.String("storage", name)), Retention: time.Duration(c.Retention), Keyring: ring,
	}}, nil
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
