package fsbroker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// benchHandler returns a handler with nodes, and with kept reports of a size of the first node, as tasks t0, t1, ….
func benchHandler(b testing.TB, nodes, reports, size int) *Handler {
	b.Helper()
	var addresses []string
	for i := range nodes {
		addresses = append(addresses, fmt.Sprintf("10.0.0.1:%d", i+1))
	}
	return benchSite(b, addresses, nil, reports, size)
}

// benchSite is like benchHandler, with the addresses of the nodes, and a storage if there is one.
func benchSite(b testing.TB, addresses []string, s *storage, reports, size int) *Handler {
	b.Helper()
	h := &Handler{
		Secrets: []Secret{{Client: "bench", Secret: "bench-secret"}},
		Broker:  &Broker{Endpoint: Endpoint{Address: "127.0.0.1:1"}},
		Cache:   &Cache{MaxSize: 16 << 30},
		logger:  zap.NewNop(),
	}
	for i, address := range addresses {
		h.Nodes = append(h.Nodes, Node{AppServerID: fmt.Sprintf("node-%d", i), Endpoint: Endpoint{Address: address}})
	}
	h.setDefaults()
	repl := caddy.NewReplacer()
	var err error
	if h.clients, err = newClients(repl, h.Secrets, h.served()); err != nil {
		b.Fatal(err)
	}
	parts := siteParts{first: h, transport: &reverseproxy.HTTPTransport{Transport: new(http.Transport)}, storage: s, logger: h.logger}
	if h.site, err = joinNamespace(caddy.Context{}, parts); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = h.site.close() })
	h.responder = responder{memory: h.site.ns.memory, logger: h.logger}

	r, err := task.ReadReport(bytes.NewReader(benchDocument(size)), func(int64) error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	rs := h.site
	for i := range reports {
		rs.ns.memory.keep(task.ReportKey(rs.nodes["node-0"].source, fmt.Sprintf("t%d", i), task.Summary), task.NewReport(r.Document()), kept{ttl: time.Hour})
	}
	rs.ns.memory.keep(task.SubmissionKey(rs.submitted, "s0", task.Summary), task.NewReport(r.Document()), kept{ttl: time.Hour})
	return h
}

// benchDocument returns a report of about a size, which compression shrinks about as much as a real one.
func benchDocument(size int) []byte {
	var doc strings.Builder
	doc.WriteString(`{"result":{"taskReference":{"state":"SUCCESS"},"resources":[`)
	for i := 0; doc.Len() < size; i++ {
		fmt.Fprintf(&doc, `{"resource":"%x","type":"FILE_HASH_SHA256","verdict":"INFORMATIONAL","threatLevel":0.1},`, task.NewKey(fmt.Sprint(i)))
	}
	doc.WriteString(`{}]}}`)
	return []byte(doc.String())
}

// discard is a response that is dropped at no cost.
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

// BenchmarkUnauthorized measures what a caller without a valid secret costs, for comparison with BenchmarkHit. It asks for
// a report that is kept.
func BenchmarkUnauthorized(b *testing.B) {
	h := benchHandler(b, 1, 1, 41<<10)
	const query = "appServerID=node-0&taskID=t0"
	for _, test := range []struct{ name, query, authorization string }{
		{"wrong-bearer", query, "Bearer wrong-secret"},
		{"none", query, ""},
		{"wrong-query-secret", query + "&secret=wrong-secret", ""},
	} {
		b.Run(test.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				r := benchRequest(test.query)
				r.Header.Del("Authorization")
				if test.authorization != "" {
					r.Header.Set("Authorization", test.authorization)
				}
				w := &discard{header: make(http.Header)}
				for pb.Next() {
					clear(w.header)
					if err := h.ServeHTTP(w, r, nil); err != nil || w.header.Get("Cache-Status") != "fsbroker; detail=unauthorized" {
						b.Error("measured something else", err, w.header)
					}
				}
			})
		})
	}
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

// BenchmarkCostPerReport measures what a small finished report that is kept costs beside its document. Each report is that
// of another file. An operation is a whole garbage collection.
func BenchmarkCostPerReport(b *testing.B) {
	const size = 80 // a size class of Go's allocator, which does not round it up
	for _, n := range []int{200_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			before := heapAfterCollection()
			m := newMemory(16 << 30)
			for i := range n {
				d := inflatedReport(size).Document()
				d.File = [sha256.Size]byte(numbered(i))
				m.keep(numbered(i), task.NewReport(d), kept{ttl: time.Hour})
			}
			after := heapAfterCollection()
			for b.Loop() {
				runtime.GC()
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n)-size, "bytes/report")
			b.ReportMetric(float64(after.HeapObjects-before.HeapObjects)/float64(n)-1, "objects/report")
			m.close()
		})
	}
}

// BenchmarkMiss fetches from a node over HTTP. Its sub-benchmarks "copied" only read the same answer, for comparison.
func BenchmarkMiss(b *testing.B) {
	for _, size := range []int{15 << 10, 41 << 10, 220 << 10, 2 << 20, 50 << 20} {
		document := benchDocument(size)
		node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(document)))
			_, _ = w.Write(document)
		}))
		b.Cleanup(node.Close)
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			h := benchSite(b, []string{node.URL}, nil, 0, size)
			transport := &http.Transport{DisableCompression: true}
			h.site.nodes["node-0"].Transport = transport
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

// BenchmarkRequestInfo measures what placeholders and the fields of the access log cost a request, on top of the replacer
// and the fields that Caddy makes for every request.
func BenchmarkRequestInfo(b *testing.B) {
	r := httptest.NewRequest(http.MethodGet, "/task", nil)
	for _, test := range []struct {
		name   string
		logs   *caddyhttp.ServerLogConfig
		attach func(*http.Request, *caddyhttp.Server) *requestInfo
	}{
		{"none", nil, func(*http.Request, *caddyhttp.Server) *requestInfo { return nil }},
		{"placeholders", nil, newRequestInfo},
		{"access-log", new(caddyhttp.ServerLogConfig), newRequestInfo},
	} {
		server := &caddyhttp.Server{Logs: test.logs}
		b.Run(test.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				repl := caddy.NewReplacer()
				repl.Map(func(string) (any, bool) { return nil, false }) // as Caddy's own, which leaves room for more
				ctx := context.WithValue(r.Context(), caddy.ReplacerCtxKey, repl)
				ctx = context.WithValue(ctx, caddyhttp.ExtraLogFieldsCtxKey, new(caddyhttp.ExtraLogFields))
				test.attach(r.WithContext(ctx), server)
			}
		})
	}
}

// BenchmarkStored measures a request for a report that is in a storage in the file system, and not in memory. Each report is
// that of another file. The page cache has what is stored.
func BenchmarkStored(b *testing.B) {
	const reports = 5_000
	h := benchSite(b, []string{"10.0.0.1:1"}, &storage{Backend: &archive.Backend{
		Storage: &certmagic.FileStorage{Path: b.TempDir()}, Logger: zap.NewNop(), Retention: defaultRetention,
	}}, 0, 15<<10)
	rs, a := h.site, h.site.archive
	r, err := task.ReadReport(bytes.NewReader(benchDocument(15<<10)), func(int64) error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	for i := range reports {
		d := r.Document()
		d.File = [sha256.Size]byte(numbered(i))
		rs.ns.memory.keep(task.ReportKey(rs.nodes["node-0"].source, fmt.Sprintf("t%d", i), task.Summary), task.NewReport(d), kept{ttl: time.Hour})
	}
	for a.Stats().Queued > 0 {
		time.Sleep(time.Millisecond)
	}
	var requests []*http.Request
	for i := range reports {
		requests = append(requests, benchRequest(fmt.Sprintf("appServerID=node-0&taskID=t%d", i)))
	}
	b.ReportAllocs()
	w := &discard{header: make(http.Header)}
	for i := 0; b.Loop(); i++ {
		if i%reports == 0 {
			b.StopTimer()
			rs.ns.memory.purge(archive.Selection{}.Matches)
			b.StartTimer()
		}
		clear(w.header)
		if err := h.ServeHTTP(w, requests[i%reports], nil); err != nil || w.header.Get("Cache-Status") != "fsbroker; hit; detail=storage" {
			b.Fatal("measured something else", err, w.header)
		}
	}
}
