package fsbroker

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// A poll that panics is a problem for all callers that wait. Others can wait again.
func TestPollThatPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zapcore.ErrorLevel)
		ps := newPollers(func(context.Context, *query) (result, error) { panic("a poll") }, time.Second, zap.New(core))
		defer ps.stop()
		var callers sync.WaitGroup
		for range 3 {
			callers.Go(func() {
				res := result{fetchResult: fetchResult{entry: unkept(task.NothingYet(time.Now()))}}
				_, err := ps.wait(t.Context(), query{submitID: "s1"}, res, time.Minute)
				if p, ok := errors.AsType[*problem](err); !ok || p.kind != problemInternal {
					t.Errorf("got %v", err)
				}
			})
		}
		callers.Wait()
		if len(ps.byQuery) > 0 || log.Len() != 1 {
			t.Errorf("%d pollers are left, and the log has %v", len(ps.byQuery), log.All())
		}
	})
}
