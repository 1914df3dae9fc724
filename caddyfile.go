package fsbroker

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

func init() {
	httpcaddyfile.RegisterDirective("fsbroker_task", parseDirective)
	httpcaddyfile.RegisterDirectiveOrder("fsbroker_task", httpcaddyfile.Before, "respond")
}

// parseDirective returns a route for the directive. Without a matcher it matches /task and the paths of proxy.
func parseDirective(helper httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	helper.Next() // the directive's name
	place := fmt.Sprintf("%s:%d", helper.File(), helper.Line())
	matchers, given, err := helper.MatcherToken()
	if err != nil {
		return nil, err
	}
	if given {
		helper.Delete()
	}
	helper.Reset()
	if doubt := doubtMatcher(matchers); given && doubt != "" {
		caddy.Log().Named("http.handlers.fsbroker_task").Warn(doubt, zap.String("at", place))
	}

	h := new(Handler)
	if err := h.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	if !given {
		matchers = caddy.ModuleMap{"path": helper.JSON(caddyhttp.MatchPath(h.served()))}
	}
	if err := compareWithOthers(helper, h, place); err != nil {
		return nil, err
	}
	return helper.NewRoute(matchers, h), nil
}

// configured is a handler in a Caddyfile, for comparison with others of its namespace.
type configured struct {
	settings settings
	place    string
}

// compareWithOthers checks that a handler is configured like the others of its namespace. The handlers check that again
// when they are provisioned, but know no lines then.
func compareWithOthers(helper httpcaddyfile.Helper, h *Handler, place string) error {
	namespace := defaultNamespace
	if h.Cache != nil && h.Cache.Namespace != "" {
		namespace = h.Cache.Namespace
	}
	s, err := newSettings(h)
	if err != nil {
		return err
	}
	key := "fsbroker namespace " + namespace
	first, ok := helper.State[key].(configured)
	if !ok {
		helper.State[key] = configured{s, place}
		return nil
	}
	if option := s.differsIn(first.settings); option != "" {
		return errDiffers(namespace, option, first.place, place)
	}
	return nil
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. docs/DIRECTIVE.md has the syntax.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if d.CountRemainingArgs() > 0 {
		return d.Err("fsbroker_task takes no arguments but a matcher: put its options into a block")
	}
	var places []caddyfile.Dispenser // of the secrets
	known := make(map[string]bool)   // the application server IDs of the nodes
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		place := *d
		if err := h.unmarshalOption(d); err != nil {
			return err
		}
		if len(places) < len(h.Secrets) {
			places = append(places, place)
		}
		if n := len(h.Nodes); n > len(known) {
			id := h.Nodes[n-1].AppServerID
			if known[id] {
				return place.Errf("node %s is configured twice", id)
			}
			known[id] = true
		}
	}
	if len(h.Secrets) == 0 {
		return d.Err("fsbroker_task requires at least one secret to let a client in")
	}
	if len(h.Nodes) == 0 && h.Broker == nil {
		return d.WrapErr(errNoUpstream)
	}
	return h.checkAllow(places)
}

// checkAllow checks what the clients may use, given the places of their secrets in the Caddyfile. That depends on the
// broker's options, which may follow.
func (h *Handler) checkAllow(places []caddyfile.Dispenser) error {
	allowed := make(map[string][]string)
	for i, s := range h.Secrets {
		allow, err := newAllow(s.Allow, h.served())
		if err != nil {
			return places[i].WrapErr(err)
		}
		name := cmp.Or(s.Client, defaultClient)
		if first, ok := allowed[name]; !ok {
			allowed[name] = allow
		} else if !slices.Equal(allow, first) {
			return places[i].WrapErr(errAllowDiffers(name))
		}
	}
	return nil
}

func (h *Handler) unmarshalOption(d *caddyfile.Dispenser) error {
	switch option := d.Val(); option {
	case "secret":
		return h.unmarshalSecret(d)
	case "node":
		return h.unmarshalNode(d)
	case "broker":
		return h.unmarshalBroker(d)
	case "transport":
		return h.unmarshalTransport(d)
	case "timeout":
		return unmarshalDuration(d, &h.Timeout)
	case "poll_interval":
		return unmarshalDuration(d, &h.PollInterval)
	case "max_wait":
		return unmarshalDuration(d, &h.MaxWait)
	case "max_report":
		return unmarshalSize(d, &h.MaxReport)
	case "fail_duration":
		return unmarshalDuration(d, &h.FailDuration)
	case "health_interval":
		return unmarshalDuration(d, &h.HealthInterval)
	case "health_timeout":
		return unmarshalDuration(d, &h.HealthTimeout)
	case "harvest":
		return h.unmarshalHarvest(d)
	case "cache":
		return h.unmarshalCache(d)
	default:
		return d.Errf("unknown option %s: the options of fsbroker_task are secret, node, broker, transport, timeout, poll_interval, max_wait, max_report, fail_duration, health_interval, health_timeout, harvest and cache", option)
	}
}

// arguments reads between least and most arguments. Unlike that of d.ArgErr, its error does not show an argument, which
// may be a secret.
func arguments(d *caddyfile.Dispenser, least, most int, syntax string) ([]string, error) {
	args := d.RemainingArgs()
	if len(args) < least || len(args) > most {
		return nil, d.Errf("wrong number of arguments: expected %s", syntax)
	}
	return args, nil
}

func (h *Handler) unmarshalSecret(d *caddyfile.Dispenser) error {
	args, err := arguments(d, 1, 2, "secret [<client name>] <secret>")
	if err != nil {
		return err
	}
	s := Secret{Secret: args[len(args)-1]}
	switch {
	case s.Secret == "":
		return d.Err("the secret is empty")
	case len(args) == 2 && !clientName.MatchString(args[0]):
		return d.WrapErr(errClientName)
	case len(args) == 2:
		s.Client = args[0]
	case !strings.Contains(s.Secret, "{"): // an unset {$NAME} has left the client's name alone
		return d.Err("a secret that is not a placeholder must follow a client's name: secret <client name> <secret>; if there is a name, the secret after it is empty")
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch option := d.Val(); {
		case option != "allow":
			return d.Err("a secret has no option but allow")
		case s.Allow != nil:
			return d.Err("allow is given more than once")
		}
		if s.Allow, err = arguments(d, 1, math.MaxInt, "allow <endpoint>..."); err != nil {
			return err
		}
	}
	h.Secrets = append(h.Secrets, s)
	return nil
}

func (h *Handler) unmarshalNode(d *caddyfile.Dispenser) error {
	args, err := arguments(d, 2, 3, "node <appServerID> <address> [<secret>]")
	if err != nil {
		return err
	}
	n := Node{AppServerID: args[0]}
	if !task.ValidID(n.AppServerID) {
		return d.Errf("the application server ID must be 1 to %d bytes without control characters", task.MaxIDLength)
	}
	if err := n.unmarshal(d, args[1:], nil); err != nil {
		return err
	}
	h.Nodes = append(h.Nodes, n)
	return nil
}

func (h *Handler) unmarshalBroker(d *caddyfile.Dispenser) error {
	if h.Broker != nil {
		return d.Err("broker is given more than once")
	}
	args, err := arguments(d, 1, 2, "broker <address> [<secret>]")
	if err != nil {
		return err
	}
	h.Broker = new(Broker)
	return h.Broker.unmarshal(d, args, &h.Broker.Proxy)
}

// unmarshalProxy reads the paths that are passed through to the broker.
func unmarshalProxy(d *caddyfile.Dispenser, proxy *[]string) error {
	if *proxy != nil {
		return d.Err("proxy is given more than once")
	}
	*proxy = d.RemainingArgs()
	if len(*proxy) == 0 {
		*proxy = slices.Clone(defaultProxy)
	}
	if err := checkProxy(*proxy); err != nil {
		return d.WrapErr(err)
	}
	return noBlock(d, "proxy")
}

// unmarshal reads the options of a node or the broker, including the block. Only the broker has proxy: it is nil for a
// node.
func (e *Endpoint) unmarshal(d *caddyfile.Dispenser, args []string, proxy *[]string) error {
	e.Address = args[0]
	if !strings.Contains(e.Address, "{") { // a placeholder is checked when it is resolved
		if _, err := parseAddress(e.Address, func(string) string { return "https" }); err != nil {
			return d.WrapErr(err)
		}
	}
	hasSecret := len(args) == 2
	if hasSecret {
		e.Secret = args[1]
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch option := d.Val(); option {
		case "secret":
			if hasSecret {
				return d.Err("the secret is given more than once")
			}
			args, err := arguments(d, 1, 1, "secret <secret>")
			if err != nil {
				return err
			}
			e.Secret, hasSecret = args[0], true
		case "secret_in":
			if e.SecretIn != nil {
				return d.Err("secret_in is given more than once")
			}
			args, err := arguments(d, 1, len(secretPlaces), "secret_in header|secret|serect...")
			if err != nil {
				return err
			}
			e.SecretIn = args
			if _, err := e.newSecret(""); err != nil {
				return d.WrapErr(err)
			}
		case "proxy":
			if proxy == nil {
				return d.Err("proxy is an option of the broker")
			}
			if err := unmarshalProxy(d, proxy); err != nil {
				return err
			}
		case "secret_param":
			return d.Err("secret_param is not an option any more: use secret_in, which also takes header")
		default:
			if proxy != nil {
				return d.Errf("unknown option %s: the options are secret, secret_in and proxy", option)
			}
			return d.Errf("unknown option %s: the options are secret and secret_in", option)
		}
	}
	if hasSecret && e.Secret == "" {
		return d.Err("the secret is empty: leave it out if the upstream requires none")
	}
	return nil
}

func (h *Handler) unmarshalTransport(d *caddyfile.Dispenser) error {
	if h.TransportRaw != nil {
		return d.Err("transport is given more than once")
	}
	if !d.NextArg() || d.Val() != "http" {
		return d.Err("transport must be http, optionally with a block as in reverse_proxy")
	}
	transport := new(reverseproxy.HTTPTransport)
	if err := transport.UnmarshalCaddyfile(d.NewFromNextSegment()); err != nil {
		return err
	}
	h.TransportRaw = caddyconfig.JSONModuleObject(transport, "protocol", "http", nil)
	return nil
}

func (h *Handler) unmarshalHarvest(d *caddyfile.Dispenser) error {
	if h.Harvest != nil {
		return d.Err("harvest is given more than once")
	}
	h.Harvest = new(Harvest)
	for _, kind := range d.RemainingArgs() {
		var wanted *bool
		switch kind {
		case "summary":
			wanted = &h.Harvest.Summary
		case "complete":
			wanted = &h.Harvest.Complete
		default:
			return d.Err("harvest takes summary, complete, or both; without an argument, it is both")
		}
		if *wanted {
			return d.Errf("harvest: %s is given more than once", kind)
		}
		*wanted = true
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if option := d.Val(); option != "for" {
			return d.Errf("unknown option %s: the option of harvest is for", option)
		}
		if err := unmarshalDuration(d, &h.Harvest.For); err != nil {
			return err
		}
	}
	return nil
}

func (h *Handler) unmarshalCache(d *caddyfile.Dispenser) error {
	if h.Cache != nil {
		return d.Err("cache is given more than once")
	}
	if _, err := arguments(d, 0, 0, "cache { … }"); err != nil {
		return err
	}
	h.Cache = new(Cache)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch option := d.Val(); option {
		case "namespace":
			err = h.Cache.unmarshalNamespace(d)
		case "ttl":
			err = unmarshalDuration(d, &h.Cache.TTL)
		case "max_size":
			err = unmarshalSize(d, &h.Cache.MaxSize)
		case "storage":
			err = h.Cache.unmarshalStorage(d)
		case "retention":
			err = unmarshalDuration(d, &h.Cache.Retention)
		case "encryption_key":
			err = h.Cache.unmarshalKeys(d)
		case "accept_unencrypted":
			err = h.Cache.unmarshalAcceptUnencrypted(d)
		default:
			err = d.Errf("unknown option %s: the options of cache are namespace, ttl, max_size, storage, retention, encryption_key and accept_unencrypted", option)
		}
		if err != nil {
			return err
		}
	}
	if err := h.Cache.check(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

func (c *Cache) unmarshalNamespace(d *caddyfile.Dispenser) error {
	if c.Namespace != "" {
		return d.Err("namespace is given more than once")
	}
	args, err := arguments(d, 1, 1, "namespace <name>")
	if err != nil {
		return err
	}
	if c.Namespace = args[0]; !namespaceName.MatchString(c.Namespace) {
		return d.WrapErr(errNamespace)
	}
	return noBlock(d, "namespace")
}

// unmarshalStorage reads the storage. Without a name it is the one that the server is configured with.
func (c *Cache) unmarshalStorage(d *caddyfile.Dispenser) error {
	if c.StorageRaw != nil {
		return d.Err("storage is given more than once")
	}
	if !d.NextArg() {
		c.StorageRaw = json.RawMessage("{}")
		return noBlock(d, "storage without a module")
	}
	name := d.Val()
	if strings.ContainsAny(name, `/\`) {
		return d.Errf("storage takes the name of a module, not a folder: write storage file_system %s", name)
	}
	mod, err := caddyfile.UnmarshalModule(d, "caddy.storage."+name)
	if err != nil {
		return err
	}
	if _, ok := mod.(caddy.StorageConverter); !ok {
		return d.Errf("module %s is no storage", name)
	}
	c.StorageRaw = caddyconfig.JSONModuleObject(mod, "module", name, nil)
	return nil
}

func (c *Cache) unmarshalKeys(d *caddyfile.Dispenser) error {
	if c.EncryptionKeys != nil {
		return d.Err("encryption_key is given more than once: give all keys at once, the newest first")
	}
	args, err := arguments(d, 1, math.MaxInt, "encryption_key <key> [<older key>...]")
	if err != nil {
		return err
	}
	if slices.Contains(args, "") {
		return d.Err("an encryption key is empty")
	}
	c.EncryptionKeys = args
	return noBlock(d, "encryption_key")
}

func (c *Cache) unmarshalAcceptUnencrypted(d *caddyfile.Dispenser) error {
	if c.AcceptUnencrypted {
		return d.Err("accept_unencrypted is given more than once")
	}
	if _, err := arguments(d, 0, 0, "accept_unencrypted"); err != nil {
		return err
	}
	c.AcceptUnencrypted = true
	return noBlock(d, "accept_unencrypted")
}

func unmarshalDuration(d *caddyfile.Dispenser, option *caddy.Duration) error {
	return unmarshalOnce(d, option, "a duration of at least 1ms, such as 30s or 24h", func(s string) (caddy.Duration, error) {
		duration, err := caddy.ParseDuration(s)
		if duration < leastDuration {
			return 0, err
		}
		return caddy.Duration(duration), err
	})
}

func unmarshalSize(d *caddyfile.Dispenser, option *int64) error {
	return unmarshalOnce(d, option, "a size with its unit, such as 64MiB", func(s string) (int64, error) {
		size, err := humanize.ParseBytes(s)
		if _, unitless := strconv.Atoi(s); unitless == nil && size < maxUnitless {
			return 0, err
		}
		if size > math.MaxInt64 {
			return 0, errors.New("too large")
		}
		return int64(size), err
	})
}

// unmarshalOnce reads an option with one value, which may be given once. parse returns 0 for one that is not acceptable.
func unmarshalOnce[T ~int64](d *caddyfile.Dispenser, option *T, wanted string, parse func(string) (T, error)) error {
	name := d.Val()
	if *option != 0 {
		return d.Errf("%s is given more than once", name)
	}
	args, err := arguments(d, 1, 1, name+" with "+wanted)
	if err != nil {
		return err
	}
	value, err := parse(args[0])
	if err != nil || value <= 0 {
		return d.Errf("%s must be %s, not %s", name, wanted, args[0])
	}
	*option = value
	return noBlock(d, name)
}

// noBlock returns an error if an option that takes no block is followed by one.
func noBlock(d *caddyfile.Dispenser, name string) error {
	if d.NextBlock(d.Nesting()) {
		return d.Errf("%s takes no block", name)
	}
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
