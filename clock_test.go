package fsbroker

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// When the clock is stepped back, a report comes from the future. It is polled for all the same.
func TestPollingWhenTheClockStepsBack(t *testing.T) {
	const interval = 2 * time.Second
	ps := newPollers(nil, interval, nil)
	defer ps.stop()
	for ago, least := range map[time.Duration]time.Duration{
		-time.Hour: interval, 0: interval - interval/10, interval / 2: interval/2 - interval/10, time.Hour: 0,
	} {
		res := result{entry: unkept(task.NothingYet(time.Now().Add(-ago))), hit: true}
		if pause := ps.pause(res); pause < least || pause > least+interval/5+1 {
			t.Errorf("the pause after a report of %s ago is %s", ago, pause)
		}
	}
}

// A poller has no goroutine between two polls.
func TestPollersHaveNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const reports, interval = 1000, 2 * time.Second
		nothing := result{entry: unkept(task.NothingYet(time.Now()))}
		polls := 0
		var mu sync.Mutex
		ps := newPollers(func(context.Context, *query) result {
			mu.Lock()
			defer mu.Unlock()
			polls++
			return nothing
		}, interval, zap.NewNop())
		before := runtime.NumGoroutine()
		var waiting sync.WaitGroup
		for i := range reports {
			waiting.Go(func() { ps.wait(t.Context(), query{target: submission(fmt.Sprint(i))}, nothing, time.Hour) })
		}
		time.Sleep(10 * interval)
		synctest.Wait()
		if n := runtime.NumGoroutine() - before; n > reports+reports/10 {
			t.Errorf("%d goroutines wait for %d reports", n, reports)
		}
		if polls < 9*reports {
			t.Errorf("%d polls for %d reports", polls, reports)
		}
		ps.stop()
		waiting.Wait()
	})
}
