package fsbroker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

func init() {
	caddy.RegisterModule(new(App))
}

// App is the app of the `fsbroker_task` handlers of a configuration. It holds their sites, starts the health checks and
// emits the events. The handlers configure it: it has no options of its own, and need not be in a configuration.
type App struct {
	events    *events
	logger    *zap.Logger
	checks    context.Context    // of the health checks
	endChecks context.CancelFunc // nil until Provision
	checking  chan struct{}      // bounds the health checks that run at once
	sites     map[string]*site   // by namespace
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

// Provision sets up the app, without a site.
func (a *App) Provision(ctx caddy.Context) error {
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	a.events, a.logger = &events{app: app.(*caddyevents.App)}, ctx.Logger()
	a.checks, a.endChecks = context.WithCancel(context.Background())
	a.checking = make(chan struct{}, maxChecks)
	a.sites = make(map[string]*site)
	filterStdLog()
	return registerMetrics(ctx.GetMetricsRegistry(), liveStats)
}

// Start begins the health checks, and to follow what is pending.
func (a *App) Start() error {
	a.events.running.Store(true)
	for _, s := range a.sites {
		s.start()
		interval := time.Duration(s.first.HealthInterval)
		if interval <= 0 {
			continue
		}
		for u := range s.upstreams() {
			// Stop does not wait for the checks: an event handler may be waiting for a new configuration.
			go func() {
				defer s.closeIdleConnections()
				a.checkRegularly(u, interval)
			}()
		}
	}
	return nil
}

// checkRegularly checks the health of an upstream until the app stops. Checks of different upstreams are spread out.
func (a *App) checkRegularly(u *upstream.Upstream, interval time.Duration) {
	for wait := rand.N(min(interval, time.Second)); ; wait = interval - interval/10 + rand.N(interval/5) { //nolint:gosec // jitter
		select {
		case <-time.After(wait):
		case <-a.checks.Done():
			return
		}
		select {
		case a.checking <- struct{}{}:
			u.Check(a.checks)
			<-a.checking
		case <-a.checks.Done():
			return
		}
	}
}

// Stop ends the health checks, and to follow what is pending.
func (a *App) Stop() error {
	for _, s := range a.sites {
		s.stop()
	}
	a.events.running.Store(false)
	a.endChecks()
	return nil
}

// Cleanup releases what the sites share with other configurations. Requests under way are still answered.
func (a *App) Cleanup() error {
	if a.endChecks != nil {
		a.endChecks()
	}
	var err error
	for _, s := range a.sites {
		err = errors.Join(err, s.close())
	}
	return err
}

var namespaceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

var errNamespace = errors.New("namespace must be 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or a digit")

// siteOf returns the site of a handler. The first handler of a namespace makes it. The others must be configured alike.
func (a *App) siteOf(ctx caddy.Context, h *Handler) (*site, error) {
	name := h.Cache.Namespace
	if !namespaceName.MatchString(name) {
		return nil, errNamespace
	}
	place := "another route"
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		place = fmt.Sprintf("a route of the server on %v", server.Listen)
	}
	settings, err := newSettings(h)
	if err != nil {
		return nil, err
	}
	if s := a.sites[name]; s != nil {
		if option := settings.differsIn(s.settings); option != "" {
			return nil, errDiffers(name, option, s.place, place)
		}
		return s, nil
	}
	s, err := newSite(ctx, h, settings, place, a.events, a.logger.With(zap.String("namespace", name)))
	if err != nil {
		return nil, err
	}
	a.sites[name] = s
	return s, nil
}

// errDiffers says that two handlers of a namespace differ in an option.
func errDiffers(namespace, option, one, other string) error {
	return fmt.Errorf("the handlers of the namespace %q differ in %s, at %s and at %s: configure them alike, with a snippet and import, or give one a cache { namespace } of its own",
		namespace, option, one, other)
}

// Interface guards
var (
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)
