package main

import (
	"encoding/json"
	"fmt"
	"maps"
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

// bare is a minimal Caddy handler. It writes a recorded header and body, selected by the query, and does nothing else. It
// responds with 304 if the client has the recorded ETag, and to HEAD without the body.
type bare struct {
	// A folder of recorded responses.
	Folder string `json:"folder"`

	responses responses
}

// recorded is a response of the module.
type recorded struct {
	Query       string
	Header      http.Header
	Body        []byte
	ETag        string
	NotModified http.Header // of the response to a client that has the ETag
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

// folders has the folders that have been read. The sites of a server share them, as the module's sites share its cache.
// This matters because the size of the heap determines how often Go collects garbage.
var folders = caddy.NewUsagePool()

type responses map[string]recorded

func (responses) Destruct() error { return nil }

func (b *bare) Provision(caddy.Context) error {
	read, _, err := folders.LoadOrNew(b.Folder, func() (caddy.Destructor, error) { return readResponses(b.Folder) })
	if err != nil {
		return err
	}
	b.responses = read.(responses)
	return nil
}

func (b *bare) Cleanup() error {
	_, err := folders.Delete(b.Folder)
	return err
}

func readResponses(folder string) (responses, error) {
	names, err := filepath.Glob(filepath.Join(folder, recordedName("*")))
	if err != nil {
		return nil, err
	}
	all := make(responses)
	for _, name := range names {
		r, err := readResponse(name)
		if err != nil {
			return nil, err
		}
		all[r.Query] = r
	}
	return all, nil
}

func readResponse(name string) (r recorded, err error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

func (b *bare) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	a, ok := b.responses[r.URL.RawQuery]
	if !ok {
		return caddyhttp.Error(http.StatusNotFound, nil)
	}
	return a.write(w, r)
}

// write writes the recorded response, as a request wants it.
func (a recorded) write(w http.ResponseWriter, r *http.Request) error {
	header := w.Header()
	if match := r.Header["If-None-Match"]; len(match) > 0 && match[0] == a.ETag {
		maps.Copy(header, a.NotModified)
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	maps.Copy(header, a.Header)
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err := w.Write(a.Body)
	return err
}
