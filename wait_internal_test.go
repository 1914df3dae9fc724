package fsbroker

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// A wait counts from the start of the request, whatever the first answer has taken of it.
func TestWaitCountsFromTheStart(t *testing.T) {
	for name, test := range map[string]struct {
		wait         uint32
		writeTimeout time.Duration
		took         time.Duration // until the first answer
		ends         time.Duration
		applied      string
	}{
		"at once":                   {wait: 5, ends: 5 * time.Second, applied: "wait=5"},
		"within the wait":           {wait: 5, took: 4500 * time.Millisecond, ends: 5 * time.Second, applied: "wait=5"},
		"at its end":                {wait: 5, took: 5 * time.Second, ends: 5 * time.Second},
		"after it":                  {wait: 5, took: 20 * time.Second, ends: 20 * time.Second},
		"no wait":                   {wait: 0, took: time.Second, ends: time.Second},
		"more than max_wait":        {wait: 600, took: time.Second, ends: time.Minute, applied: "wait=60"},
		"the write timeout":         {wait: 60, writeTimeout: 10 * time.Second, took: 8 * time.Second, ends: 9 * time.Second, applied: "wait=9"},
		"soon to be cut off anyway": {wait: 60, writeTimeout: 10 * time.Second, took: 9500 * time.Millisecond, ends: 9500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				unfinished := func(context.Context, *query) result {
					return result{entry: unkept(task.NothingYet(time.Now()))}
				}
				ps := newPollers(unfinished, time.Second, zap.NewNop())
				defer ps.stop()
				h := &Handler{
					MaxWait: caddy.Duration(time.Minute),
					server:  &caddyhttp.Server{WriteTimeout: caddy.Duration(test.writeTimeout)},
					site:    &site{resolver: &resolver{ns: new(namespace)}, pollers: ps},
				}
				start := time.Now()
				ctx := context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{"start_time": start})
				r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/task", nil)
				w := httptest.NewRecorder()
				time.Sleep(test.took)
				first := unfinished(ctx, nil)
				if res := h.wait(w, r, &parsedQuery{wait: test.wait, given: paramWait}, first); res.problem != nil {
					t.Error(res.problem)
				}
				if ends := time.Since(start); ends != test.ends {
					t.Errorf("it ends after %s, want %s", ends, test.ends)
				}
				if applied := w.Header().Get("Preference-Applied"); applied != test.applied {
					t.Errorf("Preference-Applied is %q, want %q", applied, test.applied)
				}
			})
		})
	}
}

// A poll that panics is a problem for all callers that wait. Others can wait again.
func TestPollThatPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zapcore.ErrorLevel)
		ps := newPollers(func(context.Context, *query) result { panic("a poll") }, time.Second, zap.New(core))
		defer ps.stop()
		var callers sync.WaitGroup
		for range 3 {
			callers.Go(func() {
				res := result{entry: unkept(task.NothingYet(time.Now()))}
				if p := ps.wait(t.Context(), query{target: submission("s1")}, res, time.Minute).problem; p == nil || p.Kind != problem.Internal {
					t.Errorf("got %v", p)
				}
			})
		}
		callers.Wait()
		if len(ps.byQuery) > 0 || log.Len() != 1 {
			t.Errorf("%d pollers are left, and the log has %v", len(ps.byQuery), log.All())
		}
	})
}
