package archive

import (
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// trace is what has happened.
type trace struct {
	begin   time.Time
	keep    bool
	lines   []string
	summary string
	out     func(string)
}

// note adds a line.
func (tr *trace) note(format string, args ...any) {
	if !tr.keep && tr.out == nil {
		return
	}
	line := fmt.Sprintf("%018d ", time.Since(tr.begin)) + fmt.Sprintf(format, args...)
	if tr.keep {
		tr.lines = append(tr.lines, line)
	}
	if tr.out != nil {
		tr.out(line)
	}
}

// logger is a zapcore.Core that reads what an instance logs.
type logger struct {
	zapcore.LevelEnabler
	inc *incarnation
}

func newLogger(inc *incarnation) *zap.Logger { return zap.New(logger{zapcore.DebugLevel, inc}) }

func (l logger) With([]zapcore.Field) zapcore.Core { return l }
func (l logger) Sync() error                       { return nil }

func (l logger) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return c.AddCore(e, l)
}

func (l logger) Write(e zapcore.Entry, fields []zapcore.Field) error {
	m := l.inc.sim.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var name string
	var err error
	for _, f := range fields {
		switch f.Key {
		case "key":
			name = f.String
		case "error":
			err, _ = f.Interface.(error)
		}
	}
	m.note("%s: %s %s (%s, %s)", l.inc, e.Level, e.Message, m.short(name), m.shortError(err))
	if strings.Contains(e.Message, "given up") {
		m.gaveUp(l.inc, name)
	}
	return nil
}
