package logqueue

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A line is as it would be without the queue.
func TestLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zapcore.InfoLevel)
		direct := zap.New(core, zap.AddCaller(), zap.AddStacktrace(zapcore.ErrorLevel)).Named("tested").With(zap.Int("a", 1))
		var q Queue
		for _, logger := range []*zap.Logger{direct, q.Logger(direct)} {
			logger.Debug("not enabled")
			logger.With(zap.Int("b", 2)).Warn("warned", zap.Int("c", 3))
			logger.Named("more").Error("failed", zap.Error(errors.New("away")))
		}
		q.Flush()
		lines := log.All()
		if len(lines) != 4 || lines[1].Caller.Line == 0 || lines[1].Stack == "" || !reflect.DeepEqual(lines[:2], lines[2:]) {
			t.Errorf("the log has %+v", lines)
		}
	})
}

// messages returns the messages that a log has.
func messages(log *observer.ObservedLogs) (messages []string) {
	for _, line := range log.All() {
		messages = append(messages, line.Message)
	}
	return messages
}

// Lines that are logged while the log hangs are written when it goes on, in their order and with their times. Where there is
// no room for them, a line says so.
func TestLogThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zapcore.InfoLevel)
		hanging := testenv.NewHangingLog(core, "first")
		var q Queue
		logger := q.Logger(zap.New(hanging))
		logger.Info("first")
		<-hanging.Hangs()
		want := []string{"first"}
		for i := range maxLines + 7 {
			text := fmt.Sprint("line ", i)
			logger.Info(text)
			if i < maxLines {
				want = append(want, text)
			}
		}
		last := time.Now()
		time.Sleep(time.Hour)
		begun := time.Now()
		if q.Flush(); time.Since(begun) != patience {
			t.Errorf("a log that hangs was waited for, %s", time.Since(begun))
		}
		hanging.Release()
		if q.Flush(); time.Since(begun) != patience {
			t.Errorf("a log that goes on was waited for, %s", time.Since(begun)-patience)
		}
		logger.Info("the next")
		if err := logger.Sync(); err != nil {
			t.Error(err)
		}
		gap := log.FilterField(zap.Int("lines", 7)).FilterLevelExact(zapcore.WarnLevel).All()
		if len(gap) != 1 || !gap[0].Time.Equal(last) {
			t.Fatalf("the gap is %+v", gap)
		}
		if want = append(want, gap[0].Message, "the next"); !slices.Equal(messages(log), want) {
			t.Errorf("the log has %q", messages(log))
		}
	})
}

// faultyLog is a log that panics.
type faultyLog struct{ zapcore.Core }

func (l faultyLog) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return checked.AddCore(entry, l)
}

func (faultyLog) Write(zapcore.Entry, []zapcore.Field) error { panic("a fault") }

// A log that panics costs its own lines.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zapcore.InfoLevel)
		var q Queue
		q.Logger(zap.New(faultyLog{core})).Info("one")
		q.Logger(zap.New(core)).Info("two")
		q.Flush()
		if got := messages(log); !slices.Equal(got, []string{"two"}) {
			t.Errorf("the log has %q", got)
		}
	})
}
