package archive

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

// Who operates a storage that is not swept any more is told after three failures, every ten minutes, and when it is over.
func TestSweepThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixtureWith(func(f *fixture, _ *Config) { f.backend.Retention = 8 * time.Minute }) // a sweep every two minutes
		defer f.Close()
		time.Sleep(time.Minute)
		f.storage.Set(storagetest.On(storagetest.Failing(errAway), storagetest.List))
		const fails, works = "what is older than its retention is not deleted", "a background task works again"
		time.Sleep(2 * 3 * time.Minute)
		if n := f.logged(fails); n > 1 || f.logged(works) != 0 {
			t.Errorf("after six minutes, it is logged %d times", n)
		}
		time.Sleep(time.Hour - 6*time.Minute)
		told := f.lines(fails)
		if n := told.Len(); n < 4 || n > 6 {
			t.Errorf("in an hour, it is logged %d times", n)
		}
		if fields := told.All()[0].ContextMap(); fields["failures"] != int64(3) || fields["task"] != "sweep" || !strings.Contains(fields["error"].(string), errAway.Error()) {
			t.Errorf("the first time, it is logged with %v", fields)
		}
		if n := testutil.ToFloat64(f.Metrics.background.WithLabelValues("sweep")); n < 25 || n > 35 {
			t.Errorf("%v failures are counted", n)
		}
		f.storage.Mend()
		time.Sleep(10 * time.Minute)
		if n := f.logged(works); n != 1 {
			t.Errorf("that it works again is logged %d times", n)
		}
	})
}

// What fails now and then is not told, but counted.
func TestTaskThatFailsNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		for i := range 99 {
			err := errAway
			if i%3 == 2 {
				err = nil
			}
			f.NoteTask(TaskLook, err)
			time.Sleep(time.Second)
		}
		if n := f.logged("task"); n != 0 {
			t.Errorf("it is logged %d times", n)
		}
		if n := testutil.ToFloat64(f.Metrics.background.WithLabelValues("look")); n != 66 {
			t.Errorf("%v failures are counted", n)
		}
	})
}
