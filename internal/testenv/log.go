package testenv

import (
	"strings"
	"sync"

	"go.uber.org/zap/zapcore"
)

// HangingLog is a log that hangs when a line is to be written, as it does on a disk that is full. The others are written.
type HangingLog struct {
	zapcore.Core
	text    string
	hangs   chan struct{}
	release chan struct{}
	once    *sync.Once
}

// NewHangingLog returns a log that hangs for lines whose messages have a text.
func NewHangingLog(core zapcore.Core, text string) HangingLog {
	return HangingLog{core, text, make(chan struct{}), make(chan struct{}), new(sync.Once)}
}

// Hangs returns a channel that is closed when the log hangs.
func (l HangingLog) Hangs() <-chan struct{} { return l.hangs }

// Release lets all lines be written. It must be called once.
func (l HangingLog) Release() { close(l.release) }

// With implements zapcore.Core.
func (l HangingLog) With(fields []zapcore.Field) zapcore.Core {
	l.Core = l.Core.With(fields)
	return l
}

// Check implements zapcore.Core.
func (l HangingLog) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !l.Enabled(entry.Level) {
		return checked
	}
	return checked.AddCore(entry, l)
}

// Write implements zapcore.Core.
func (l HangingLog) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	if strings.Contains(entry.Message, l.text) {
		l.once.Do(func() { close(l.hangs) })
		<-l.release
	}
	return l.Core.Write(entry, fields)
}
