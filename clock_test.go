package fsbroker

import (
	"testing"
	"time"

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
		res := result{fetchResult: fetchResult{entry: unkept(task.NothingYet(time.Now().Add(-ago)))}, hit: true}
		if pause := ps.pause(res); pause < least || pause > least+interval/5+1 {
			t.Errorf("the pause after a report of %s ago is %s", ago, pause)
		}
	}
}
