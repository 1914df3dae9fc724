package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(bare))
	httpcaddyfile.RegisterHandlerDirective("bench_bare", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		b := new(bare)
		return b, b.UnmarshalCaddyfile(h.Dispenser)
	})
	httpcaddyfile.RegisterDirectiveOrder("bench_bare", httpcaddyfile.Before, "respond")
}

// bare is the least that a handler in Caddy can do: it writes a header and a body that are ready, by the query, and
// nothing else.
type bare struct {
	// A folder of recorded answers.
	Folder string `json:"folder"`

	answers map[string]recorded
}

// recorded is an answer of the module as it was got from it.
type recorded struct {
	Query  string
	Header http.Header
	Body   []byte
}

func (*bare) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.bench_bare", New: func() caddy.Module { return new(bare) }}
}

func (b *bare) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&b.Folder) {
		return d.ArgErr()
	}
	return nil
}

func (b *bare) Provision(caddy.Context) error {
	names, err := filepath.Glob(filepath.Join(b.Folder, "*.recorded"))
	if err != nil {
		return err
	}
	b.answers = make(map[string]recorded)
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var r recorded
		if err := json.Unmarshal(text, &r); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		b.answers[r.Query] = r
	}
	return nil
}

func (b *bare) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	a, ok := b.answers[r.URL.RawQuery]
	if !ok {
		return caddyhttp.Error(http.StatusNotFound, nil)
	}
	header := w.Header()
	for name, values := range a.Header {
		header[name] = values
	}
	w.WriteHeader(http.StatusOK)
	_, err := w.Write(a.Body)
	return err
}
