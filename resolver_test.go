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
				rs := newResolver("default", nil, nil, s, resolverOptions{pollInterval: time.Hour})
				rs.keep(numbered(1), query{}, answer{report: report})
				rs.follower = harvest.New(harvest.Config{Namespace: "default"})
				defer rs.follower.Close()
				rs.keep(numbered(2), query{}, answer{report: report})
				time.Sleep(24 * time.Second) // the shortest delay between two questions in the end
				synctest.Wait()
				if _, ok := s.get(numbered(1)); !ok {
					t.Error("without a follower, it is not kept for the poll interval")
				}
				if _, ok := s.get(numbered(2)); ok {
					t.Error("the follower would get what is kept")
				}
			})
		})
	}
}
