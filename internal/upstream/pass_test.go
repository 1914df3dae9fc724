package upstream

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// That a caller has left is no failure, whatever has failed at the same time.
func TestCallerLeavesWhileConnectingFails(t *testing.T) {
	for name, failure := range map[string]error{
		"of this machine": syscall.EMFILE, "of the upstream": syscall.ECONNREFUSED, "that breaks off": context.Canceled,
	} {
		t.Run(name, func(t *testing.T) {
			core, log := observer.New(zapcore.InfoLevel)
			var leave context.CancelFunc
			u := New(Config{
				Origin: Origin{Role: problem.RoleBroker}, Base: &url.URL{Scheme: "http", Host: "broker:1"},
				Options: Options{
					Budget: budget.New(new(sync.Mutex), 0, func() bool { return false }), Timeout: time.Minute, FailDuration: time.Minute,
					Logger: zap.New(core), Metrics: NewMetrics(), Notify: func(_ *Upstream, event, _ string) { t.Error(event) },
					Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
						trace := httptrace.ContextClientTrace(req.Context())
						trace.GetConn("broker:1")
						trace.ConnectStart("tcp", "broker:1")
						trace.ConnectDone("tcp", "broker:1", failure)
						leave()
						return nil, failure
					}),
				},
			})
			defer u.Close()
			ask := map[string]func(context.Context) *problem.Problem{
				"pass": func(ctx context.Context) *problem.Problem {
					_, p := u.Pass(httptest.NewRequestWithContext(ctx, http.MethodGet, "/file", nil), nil)
					return p
				},
				"fetch": func(ctx context.Context) *problem.Problem {
					_, p := u.FetchSubmitted(ctx, "s1", task.Summary, false)
					return p
				},
				"check": func(ctx context.Context) *problem.Problem {
					_, p := u.SystemInfo(ctx)
					return p
				},
			}
			for way, f := range ask {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				leave = cancel
				if p := f(ctx); p != problem.Left {
					t.Errorf("%s: got %v", way, p)
				}
			}
			if status, last := u.Status(); status != Healthy || last != nil || u.Down() != nil || log.Len() > 0 || u.InFlight() != 0 {
				t.Errorf("the upstream is %s after %v, with %d requests; the log has %v", status, last, u.InFlight(), log.All())
			}
		})
	}
}
