package main

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

func init() {
	caddy.RegisterModule(new(gate))
	httpcaddyfile.RegisterHandlerDirective("bench_gate", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(gate), nil
	})
}

// gate is a Caddy handler that holds requests until it is opened.
type gate struct{}

var (
	atGate   chan struct{} // receives from each request that has come to the gate
	gateOpen chan struct{} // is closed when the gate is opened
)

func (*gate) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.bench_gate", New: func() caddy.Module { return new(gate) }}
}

func (*gate) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	atGate <- struct{}{}
	<-gateOpen
	return next.ServeHTTP(w, r)
}

// merged returns how many requests cache-handler holds because another one for the same URL is under way.
func merged() (n int) {
	var stacks bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2) // memory does not fail
	for stack := range bytes.SplitSeq(stacks.Bytes(), []byte("\n\n")) {
		if bytes.Contains(stack, []byte("singleflight.(*Group).Do(")) && bytes.Contains(stack, []byte("sync.(*WaitGroup).Wait(")) {
			n++
		}
	}
	return n
}

// cacheCaller is a caller of the module behind cache-handler.
type cacheCaller struct {
	field, value string // how it presents a secret
	client       string // that the secret is of; none if it is wrong
}

// TestSharedCache runs the module behind cache-handler, which merges requests for one URL if they have the same values in the
// fields that Vary names. It should not be run like that (see SECURITY.md). If it is, each caller still gets its own response.
func TestSharedCache(t *testing.T) {
	n, err := startNode(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.server.Close() })
	site := fmt.Sprintf("http://127.0.0.1:%d", testenv.Port(t))
	testsite.Run(t, fmt.Appendf(nil, `{
		admin off
		cache {
			ttl 24h
		}
	}
	%s {
		route {
			cache
			bench_gate
			header >X-Client {http.fsbroker.client}
			fsbroker_task {
				secret one %s
				secret two two-%[2]s
				node node-1 %s
				broker %[3]s {
					proxy
				}
			}
		}
	}`, site, secret, n.address))
	callers := []cacheCaller{
		{"Authorization", "Bearer " + secret, "one"},
		{"Authorization", "Bearer two-" + secret, "two"},
		{"Secret", secret, "one"},
		{"Secret", "two-" + secret, "two"},
		{"X-Api-Key", "two-" + secret, "two"},
		{"Authorization", "Bearer wrong", ""},
		{"Secret", "wrong", ""},
		{"X-Api-Key", "wrong", ""},
		{"Accept", "*/*", ""},
	}
	for _, path := range []string{"/task?" + nodeQuery("node-1", "small-%d"), "/submit-result?submitID=small-%d"} {
		for i, first := range callers {
			target := site + fmt.Sprintf(path, i)
			t.Run(fmt.Sprintf("%s by %s: %s", target, first.field, first.client), func(t *testing.T) {
				atGate, gateOpen = make(chan struct{}, 2*len(callers)), make(chan struct{})
				var responses sync.WaitGroup
				responses.Go(func() { first.ask(t, target) })
				<-atGate
				for j, other := range callers {
					if j != i {
						responses.Go(func() { other.ask(t, target) })
					}
				}
				for merged() < len(callers)-1 {
					time.Sleep(time.Millisecond)
				}
				close(gateOpen)
				responses.Wait()
				// cache-handler may have kept these responses.
				for _, caller := range callers {
					caller.ask(t, target)
				}
			})
		}
	}
}

// ask requests a target, and checks that the response is the caller's own.
func (c cacheCaller) ask(t *testing.T, target string) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, target, nil)
	if err != nil {
		t.Error(err)
		return
	}
	req.Header.Set(c.field, c.value)
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Error(err)
		return
	}
	_ = resp.Body.Close()
	want := http.StatusOK
	if c.client == "" {
		want = http.StatusUnauthorized
	}
	if client := resp.Header.Get("X-Client"); resp.StatusCode != want || client != c.client {
		t.Errorf("%s: %s: status %d for the client %q, want %d for %q: %v", c.field, c.value, resp.StatusCode, client, want, c.client, resp.Header["Cache-Status"])
	}
}
