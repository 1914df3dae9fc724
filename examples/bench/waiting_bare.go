package main

import (
	"errors"
	"net/http"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(bareWait))
	httpcaddyfile.RegisterHandlerDirective("bench_wait", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		b := new(bareWait)
		return b, b.UnmarshalCaddyfile(h.Dispenser)
	})
	httpcaddyfile.RegisterDirectiveOrder("bench_wait", httpcaddyfile.Before, "respond")
}

// bareWait is a minimal Caddy handler that holds all requests until it gets one for releasePath. Then it answers all with
// the same recorded response.
type bareWait struct {
	// The file of the response.
	File string `json:"file"`

	response recorded
	released chan struct{}
	release  func()
}

const (
	releasePath       = "/release"
	bareWaitersMetric = "bench_waiters"
)

var bareWaiters = prometheus.NewGauge(prometheus.GaugeOpts{Name: bareWaitersMetric, Help: "Callers that the bare handler holds."})

func (*bareWait) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.bench_wait", New: func() caddy.Module { return new(bareWait) }}
}

func (b *bareWait) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&b.File) {
		return d.ArgErr()
	}
	return nil
}

func (b *bareWait) Provision(ctx caddy.Context) error {
	b.released = make(chan struct{})
	b.release = sync.OnceFunc(func() { close(b.released) })
	err := ctx.GetMetricsRegistry().Register(bareWaiters)
	if _, already := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !already {
		return err
	}
	b.response, err = readResponse(b.File)
	return err
}

func (b *bareWait) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if r.URL.Path == releasePath {
		b.release()
		return nil
	}
	bareWaiters.Inc()
	defer bareWaiters.Dec()
	select {
	case <-b.released:
		return b.response.write(w, r)
	case <-r.Context().Done():
		return r.Context().Err()
	}
}
