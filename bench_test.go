package fsbroker

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// benchHandler is a handler with nodes, and kept reports of a size on the first of them, as tasks t0, t1, ….
func benchHandler(b *testing.B, nodes, reports, size int) *Handler {
	b.Helper()
	h := &Handler{
		Secrets: []Secret{{Client: "bench", Secret: "bench-secret"}},
		Broker:  &Endpoint{Address: "127.0.0.1:1"},
		Cache:   &Cache{MaxSize: 16 << 30},
		logger:  zap.NewNop(), transport: new(reverseproxy.HTTPTransport),
	}
	for i := range nodes {
		h.Nodes = append(h.Nodes, Node{AppServerID: fmt.Sprintf("node-%d", i), Endpoint: Endpoint{Address: fmt.Sprintf("10.0.0.1:%d", i+1)}})
	}
	h.setDefaults()
	repl := caddy.NewReplacer()
	var err error
	if h.clients, err = newClients(repl, h.Secrets); err != nil {
		b.Fatal(err)
	}
	if err := h.provisionPeers(repl); err != nil {
		b.Fatal(err)
	}
	if h.store, err = joinStore(h); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = h.Cleanup() })

	r, err := readReport(bytes.NewReader(benchDocument(size)))
	if err != nil {
		b.Fatal(err)
	}
	for i := range reports {
		one := &report{at: r.at, finished: true, hash: r.hash, plainSize: r.plainSize}
		one.gzipped.Store(r.gzipped.Load())
		h.store.put(reportKey(h.nodes["node-0"].address, fmt.Sprintf("t%d", i), false), one, time.Hour)
	}
	h.store.put(submissionKey(h.broker.address, "s0"), &submission{appServerID: "node-0", taskID: "t0"}, time.Hour)
	return h
}

// benchDocument is a report of about a size, which shrinks about as much as real ones do.
func benchDocument(size int) []byte {
	var doc strings.Builder
	doc.WriteString(`{"result":{"taskReference":{"state":"SUCCESS"},"resources":[`)
	for i := 0; doc.Len() < size; i++ {
		fmt.Fprintf(&doc, `{"resource":"%x","type":"FILE_HASH_SHA256","verdict":"INFORMATIONAL","threatLevel":0.1},`, newKey(fmt.Sprint(i)))
	}
	doc.WriteString(`{}]}}`)
	return []byte(doc.String())
}

// discard is a response that goes nowhere, and costs nothing.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(int)             {}

func benchRequest(query string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/task?"+query, nil)
	r.Header.Set("Authorization", "Bearer bench-secret")
	r.Header.Set("Accept-Encoding", "gzip")
	return r
}

func benchHit(b *testing.B, h *Handler, query string) {
	b.Helper()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		r := benchRequest(query)
		w := &discard{header: make(http.Header)}
		for pb.Next() {
			clear(w.header)
			if err := h.ServeHTTP(w, r, nil); err != nil || w.header.Get("Cache-Status") != "fsbroker; hit" {
				b.Error("measured something else", err, w.header)
			}
		}
	})
}

func BenchmarkHit(b *testing.B) {
	h := benchHandler(b, 1, 1, 41<<10)
	b.Run("pair", func(b *testing.B) { benchHit(b, h, "appServerID=node-0&taskID=t0") })
	b.Run("submission", func(b *testing.B) { benchHit(b, h, "submitID=s0") })
	b.Run("query-secret", func(b *testing.B) { benchHit(b, h, "appServerID=node-0&taskID=t0&secret=bench-secret") })
}

func BenchmarkHitByEntriesKept(b *testing.B) {
	for _, n := range []int{1, 1_000, 1_000_000} {
		h := benchHandler(b, 1, n, 15<<10)
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchHit(b, h, "appServerID=node-0&taskID=t0") })
	}
}

func BenchmarkHitBySize(b *testing.B) {
	for _, size := range []int{15 << 10, 41 << 10, 220 << 10, 2 << 20} {
		h := benchHandler(b, 1, 1, size)
		b.Run(fmt.Sprint(size), func(b *testing.B) { benchHit(b, h, "appServerID=node-0&taskID=t0") })
	}
}

func BenchmarkHitByCallers(b *testing.B) {
	h := benchHandler(b, 1, 1, 41<<10)
	for _, n := range []int{1, 10, 100, 1_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetParallelism(n)
			benchHit(b, h, "appServerID=node-0&taskID=t0")
		})
	}
}

func BenchmarkHitByNodes(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1_000} {
		h := benchHandler(b, n, 1, 41<<10)
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchHit(b, h, "appServerID=node-0&taskID=t0") })
	}
}

// BenchmarkMiss asks a node over HTTP every time. BenchmarkPlainGet is what there is to compare it with.
func BenchmarkMiss(b *testing.B) {
	for _, size := range []int{15 << 10, 41 << 10, 220 << 10, 2 << 20, 50 << 20} {
		document := benchDocument(size)
		node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(document)))
			_, _ = w.Write(document)
		}))
		b.Cleanup(node.Close)
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			h := benchHandler(b, 1, 0, size)
			transport := &http.Transport{DisableCompression: true}
			p := h.nodes["node-0"]
			p.transport = transport
			base, err := parseAddress(node.URL, "http")
			if err != nil {
				b.Fatal(err)
			}
			p.base = base
			b.SetBytes(int64(len(document)))
			b.ReportAllocs()
			r := benchRequest("appServerID=node-0&taskID=t0&nocache")
			w := &discard{header: make(http.Header)}
			for b.Loop() {
				clear(w.header)
				if err := h.ServeHTTP(w, r, nil); err != nil || w.header.Get("Cache-Status") != "fsbroker; fwd=request; stored" {
					b.Fatal(err, w.header)
				}
			}
			transport.CloseIdleConnections()
		})
		b.Run(fmt.Sprint(size)+"/copied", func(b *testing.B) {
			transport := &http.Transport{DisableCompression: true}
			client := &http.Client{Transport: transport}
			b.SetBytes(int64(len(document)))
			b.ReportAllocs()
			for b.Loop() {
				resp, err := client.Get(node.URL)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					b.Fatal(err)
				}
				_ = resp.Body.Close()
			}
			transport.CloseIdleConnections()
		})
	}
}

func BenchmarkJudge(b *testing.B) {
	for _, size := range []int{15 << 10, 2 << 20} {
		document := benchDocument(size)
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.SetBytes(int64(len(document)))
			b.ReportAllocs()
			for b.Loop() {
				if finished, err := judge(bytes.NewReader(document)); !finished || err != nil {
					b.Fatal(finished, err)
				}
			}
		})
	}
}

// BenchmarkRecord is what it costs a request that placeholders of it can be had, and that the access log tells of it: on
// top of the replacer and the fields that Caddy makes for every request.
func BenchmarkRecord(b *testing.B) {
	request := func(logs *caddyhttp.ServerLogConfig) *http.Request {
		r := httptest.NewRequest(http.MethodGet, "/task", nil)
		return r.WithContext(context.WithValue(r.Context(), caddyhttp.ServerCtxKey, &caddyhttp.Server{Logs: logs}))
	}
	for _, test := range []struct {
		name   string
		r      *http.Request
		record func(*http.Request) *record
	}{
		{"none", request(nil), func(*http.Request) *record { return nil }},
		{"placeholders", request(nil), newRecord},
		{"access-log", request(new(caddyhttp.ServerLogConfig)), newRecord},
	} {
		b.Run(test.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				repl := caddy.NewReplacer()
				repl.Map(func(string) (any, bool) { return nil, false }) // as Caddy's own, which has room for more after it
				ctx := context.WithValue(test.r.Context(), caddy.ReplacerCtxKey, repl)
				ctx = context.WithValue(ctx, caddyhttp.ExtraLogFieldsCtxKey, new(caddyhttp.ExtraLogFields))
				test.record(test.r.WithContext(ctx))
			}
		})
	}
}
