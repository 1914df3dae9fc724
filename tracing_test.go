package fsbroker_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/caddyserver/caddy/v2"
)

// collector is an OpenTelemetry collector that keeps the spans it gets.
type collector struct {
	*httptest.Server
	mu    sync.Mutex
	spans []*tracev1.Span
	raw   []byte
}

// startCollector starts a collector to which Caddy exports its spans.
func startCollector(t *testing.T) *collector {
	t.Helper()
	c := new(collector)
	c.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var request collectorv1.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(body, &request)
		}
		if err != nil {
			t.Error(err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw = append(c.raw, body...)
		for _, resource := range request.GetResourceSpans() {
			for _, scope := range resource.GetScopeSpans() {
				c.spans = append(c.spans, scope.GetSpans()...)
			}
		}
	}))
	t.Cleanup(c.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.URL)
	t.Setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
	return c
}

// traceparents records the traceparent of every request to a handler.
type traceparents struct {
	mu   sync.Mutex
	seen []string
}

func (tp *traceparents) of(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		tp.mu.Lock()
		tp.seen = append(tp.seen, r.Header.Get("Traceparent"))
		tp.mu.Unlock()
		next(w, r)
	}
}

const callersTrace, callersSpan = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

// With Caddy's tracing, a request to an upstream is a span below the request that started it. A caller that joins it gets
// a link.
func TestTracing(t *testing.T) {
	g, tp := newGate(), new(traceparents)
	node := newBackend(t, tp.of(g.then(responds(http.StatusOK, reportOf("t1", "SUCCESS")))))
	c := startCollector(t)
	s := startSite(t, "tracing {\nspan request\n}\n"+options(node, ""))

	first := s.goGet(pair, "Traceparent: 00-"+callersTrace+"-"+callersSpan+"-01")
	within(t, "the request", g.entered)
	second := s.goGet(pair)
	wantHeld(t, 2)
	close(g.open)
	for _, r := range []reply{<-first, <-second} {
		r.wantStatus(t, http.StatusOK)
	}
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	if err := caddy.Stop(); err != nil { // exports what is left
		t.Fatal(err)
	}
	var requests, fetches []*tracev1.Span
	for _, one := range c.spans {
		switch one.GetName() {
		case "request":
			requests = append(requests, one)
		case "fsbroker task":
			fetches = append(fetches, one)
		}
	}
	if len(fetches) != 1 || len(requests) < 3 {
		t.Fatalf("got the requests %v and the fetches %v", requests, fetches)
	}
	fetch := fetches[0]
	if want := fmt.Sprintf("00-%s-%x-01", callersTrace, fetch.GetSpanId()); len(tp.seen) != 1 || tp.seen[0] != want {
		t.Errorf("the node got the traceparents %q, want %s", tp.seen, want)
	}
	started, linked := 0, 0
	for _, r := range requests {
		isFirst := fmt.Sprintf("%x", r.GetTraceId()) == callersTrace && fmt.Sprintf("%x", r.GetParentSpanId()) == callersSpan
		if isFirst && bytes.Equal(r.GetSpanId(), fetch.GetParentSpanId()) {
			started++
		}
		for _, link := range r.GetLinks() {
			if !bytes.Equal(link.GetSpanId(), fetch.GetSpanId()) || isFirst {
				t.Errorf("the span %v has a wrong link", r)
			}
			linked++
		}
	}
	if started != 1 || linked != 1 {
		t.Errorf("%d requests started the fetch, %d are linked to it: %v", started, linked, requests)
	}
	s.wantNoSecretInLog()
	for _, secret := range allSecrets {
		if bytes.Contains(c.raw, []byte(secret)) {
			t.Error("a span holds a secret")
		}
	}
}

// Without tracing, nothing is sent, whatever the caller sends.
func TestWithoutTracing(t *testing.T) {
	tp := new(traceparents)
	node := newBackend(t, tp.of(responds(http.StatusOK, reportOf("t1", "SUCCESS"))))
	s := startSite(t, options(node, ""))
	s.get(pair, "Traceparent: 00-"+callersTrace+"-"+callersSpan+"-01").wantStatus(t, http.StatusOK)
	if len(tp.seen) != 1 || tp.seen[0] != "" {
		t.Errorf("the node got the traceparents %q", tp.seen)
	}
}
