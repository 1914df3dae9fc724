package archive

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// What is lost is counted, and logged at once, then once a minute at most, and before the end. The log names some of it.
func TestLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		const reports = 150
		for i := range reports {
			f.Lose(fmt.Sprint("s", i), report(10))
			time.Sleep(time.Second)
		}
		if err := f.Drain(f.backend); err != nil {
			t.Error(err)
		}
		lines := f.lines("are lost").All()
		total := int64(0)
		for i, line := range lines {
			fields := line.ContextMap()
			lost, ids := fields["lost"].(int64), fields["ids"].([]any)
			total += lost
			if int64(len(ids)) != min(lost, maxLostIDs) || i == 0 && ids[0] != "s0" || !strings.Contains(line.Message, "max_size") {
				t.Errorf("%s: %d are lost: %v", line.Message, lost, ids)
			}
		}
		if len(lines) != 4 || total != reports || testutil.ToFloat64(f.Metrics.lost) != reports {
			t.Errorf("%d lines name %d reports, and %v are counted", len(lines), total, testutil.ToFloat64(f.Metrics.lost))
		}
	})
}

// What has no ID is named by the sum of its file, if that is known.
func TestLostWithoutAnID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture()
		defer f.Close()
		f.Lose("", reportOf(10, [32]byte{0xab}))
		time.Sleep(time.Minute)
		f.Lose("", report(10))
		time.Sleep(time.Minute)
		var named []any
		for _, line := range f.lines("are lost").All() {
			named = append(named, line.ContextMap()["ids"].([]any)...)
		}
		if want := "[sha256:ab" + strings.Repeat("0", 62) + "]"; fmt.Sprint(named) != want {
			t.Errorf("the log names %v, want %s", named, want)
		}
	})
}
