// Package logqueue lets lines be logged by those who must not wait for the log, such as the holders of locks. A log may hang:
// its disk may be full, or its server away.
package logqueue

import (
	"context"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
)

const (
	// maxLines is how many lines wait at the most while others are written.
	maxLines = 1000

	// patience is how long Flush waits.
	patience = time.Second
)

// Queue has lines of logs until they are written. One goroutine writes them, in their order, and ends when there are none.
// Where there is no room, lines are missing, and a line says how many. The zero value is an empty queue.
type Queue struct {
	mu      sync.Mutex
	lines   []line
	missing int           // lines for which there was no room after those
	written chan struct{} // closed when all lines are written; nil while there are none
}

// Logger returns a logger whose lines go through the queue. What their fields refer to must not change.
func (q *Queue) Logger(logger *zap.Logger) *zap.Logger {
	return logger.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return core{c, q} }))
}

// Flush waits until all lines are written, but only for a second: the log may hang.
func (q *Queue) Flush() {
	q.mu.Lock()
	written := q.written
	q.mu.Unlock()
	if written == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	select {
	case <-written:
	case <-ctx.Done():
	}
}

// add queues a line.
func (q *Queue) add(l line) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.lines) >= maxLines {
		q.missing++
		return
	}
	q.lines = append(q.lines, l)
	if q.written == nil {
		q.written = make(chan struct{})
		go q.write()
	}
}

// write writes lines until there are none.
func (q *Queue) write() {
	for lines := q.take(); len(lines) > 0; lines = q.take() {
		for _, l := range lines {
			l.write()
		}
	}
}

// take takes all lines out of the queue. If there are none, it ends the writing.
func (q *Queue) take() []line {
	q.mu.Lock()
	defer q.mu.Unlock()
	lines := q.lines
	if len(lines) == 0 {
		close(q.written)
		q.written = nil
	}
	if q.missing > 0 {
		lines = append(lines, lines[len(lines)-1].gap(q.missing))
	}
	q.lines, q.missing = nil, 0
	return lines
}

// line is a line of a log.
type line struct {
	core   zapcore.Core
	entry  zapcore.Entry
	fields []zapcore.Field
}

// gap returns the line that says that lines are missing after this one.
func (l line) gap(missing int) line {
	entry := zapcore.Entry{
		Level: zapcore.WarnLevel, Time: l.entry.Time, LoggerName: l.entry.LoggerName,
		Message: "lines are missing here: the log has taken them too slowly",
	}
	return line{l.core, entry, []zapcore.Field{zap.Int("lines", missing)}}
}

// stderr has what is wrong with a log, as in zap.
var (
	stderr = zapcore.Lock(os.Stderr)
	faults = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), stderr, zapcore.ErrorLevel))
)

// write writes the line. The parts of a log are modules of others.
func (l line) write() {
	_ = guard.Do(faults, func() error {
		if checked := l.core.Check(l.entry, nil); checked != nil {
			checked.ErrorOutput = stderr
			checked.Write(l.fields...)
		}
		return nil
	})
}

// core is a zapcore.Core whose lines go through a queue.
type core struct {
	zapcore.Core
	queue *Queue
}

// With implements zapcore.Core.
func (c core) With(fields []zapcore.Field) zapcore.Core { return core{c.Core.With(fields), c.queue} }

// Check implements zapcore.Core. The core behind the queue checks the entry when it is written.
func (c core) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(entry.Level) {
		return checked
	}
	return checked.AddCore(entry, c)
}

// Write implements zapcore.Core.
func (c core) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	c.queue.add(line{c.Core, entry, slices.Clone(fields)})
	return nil
}

// Sync implements zapcore.Core.
func (c core) Sync() error {
	c.queue.Flush()
	return c.Core.Sync()
}
