package fsbroker

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// A follower is not answered for a whole poll interval with what is kept, if that is longer than it may be without an answer.
func TestUnfinishedIsKeptUntilTheFollowerAsks(t *testing.T) {
	for name, report := range map[string]*task.Report{"unfinished": task.NothingYet(time.Now()), "unknown": task.NotKnownYet(time.Now())} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := savingMemory(t, 1<<20)
				rs := newResolver(s.namespace, nil, nil, resolverOptions{pollInterval: time.Hour})
				rs.keep(numbered(1), target{}, report, nil)
				follower := harvest.New(harvest.Config{Namespace: "default"})
				defer follower.Close()
				rs = newResolver(s.namespace, nil, nil, resolverOptions{pollInterval: time.Hour, follower: follower})
				rs.keep(numbered(2), target{}, report, nil)
				time.Sleep(24 * time.Second) // the shortest delay between two questions in the end
				synctest.Wait()
				if _, ok := s.memory.get(numbered(1)); !ok {
					t.Error("without a follower, it is not kept for the poll interval")
				}
				if _, ok := s.memory.get(numbered(2)); ok {
					t.Error("the follower would get what is kept")
				}
			})
		})
	}
}
