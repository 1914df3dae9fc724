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

	answers answers
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

// folders are those that have been read. The sites of a server share them, as the module's share what it keeps: what is
// in memory decides how often Go collects garbage.
var folders = caddy.NewUsagePool()

type answers map[string]recorded

func (answers) Destruct() error { return nil }

func (b *bare) Provision(caddy.Context) error {
	read, _, err := folders.LoadOrNew(b.Folder, func() (caddy.Destructor, error) { return readAnswers(b.Folder) })
	if err != nil {
		return err
	}
	b.answers = read.(answers)
	return nil
}

func (b *bare) Cleanup() error {
	_, err := folders.Delete(b.Folder)
	return err
}

func readAnswers(folder string) (answers, error) {
	names, err := filepath.Glob(filepath.Join(folder, "*.recorded"))
	if err != nil {
		return nil, err
	}
	all := make(answers)
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		var r recorded
		if err := json.Unmarshal(text, &r); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all[r.Query] = r
	}
	return all, nil
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
