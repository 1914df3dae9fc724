package main

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"net/http"
	"path/filepath"
	"strconv"

	"github.com/caddyserver/certmagic"
	"github.com/klauspost/compress/gzip"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(bareStored))
	httpcaddyfile.RegisterHandlerDirective("bench_stored", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		b := new(bareStored)
		return b, b.UnmarshalCaddyfile(h.Dispenser)
	})
	httpcaddyfile.RegisterDirectiveOrder("bench_stored", httpcaddyfile.Before, "respond")
}

// bareStored is a minimal Caddy handler. For each request, it loads a compressed report from Caddy's storage in files, by its
// task ID, and writes it with a recorded header. It keeps nothing.
type bareStored struct {
	// A folder of compressed reports.
	Folder string `json:"folder"`

	// A file with a response of the module, whose header is used.
	File string `json:"file"`

	storage  *certmagic.FileStorage
	response recorded
}

func (*bareStored) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.bench_stored", New: func() caddy.Module { return new(bareStored) }}
}

func (b *bareStored) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&b.Folder, &b.File) {
		return d.ArgErr()
	}
	return nil
}

func (b *bareStored) Provision(caddy.Context) error {
	b.storage = &certmagic.FileStorage{Path: b.Folder}
	var err error
	b.response, err = readResponse(b.File)
	return err
}

func (b *bareStored) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	body, err := b.storage.Load(r.Context(), r.URL.Query().Get("taskID"))
	if err != nil {
		return caddyhttp.Error(http.StatusNotFound, err)
	}
	header := w.Header()
	maps.Copy(header, b.response.Header)
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	_, err = w.Write(body) //nolint:gosec // it is a report, and no browser asks
	return err
}

// storedBare returns the bare handler with a folder of compressed reports.
func storedBare(folder string) *contender {
	return &contender{
		name:   bareHandler.name,
		config: caddyConfig("bare-stored", "", "bench_stored * "+folder+" {{.Dir}}/"+recordedName("15KB-gzip")),
	}
}

// filledBare returns a folder that has the reports that stored requests, each compressed.
func (h *harness) filledBare(ctx context.Context, size size) (string, error) {
	folder := filepath.Join(h.values, "bare-"+size.id())
	if h.kept[folder] {
		return folder, nil
	}
	progress.Printf("compressing %d reports of %s", h.options.stored, size.name)
	s, err := module.start(ctx, h)
	if err != nil {
		return "", err
	}
	zw, err := gzip.NewWriterLevel(nil, 6) // as the module does
	if err != nil {
		return "", err
	}
	err = h.record(ctx, s)
	s.process.stop()
	storage := &certmagic.FileStorage{Path: folder}
	for i, p := 0, h.stored(size, 1); err == nil && i < p.count; i++ {
		var body bytes.Buffer
		zw.Reset(&body)
		_, err = zw.Write(p.want(p.task(i)))
		err = errors.Join(err, zw.Close(), storage.Store(ctx, p.task(i), body.Bytes()))
	}
	h.kept[folder] = err == nil
	return folder, err
}
