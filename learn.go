package fsbroker

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	// submitPath is the path of the endpoint whose answers name submissions.
	submitPath = "/submit"

	// maxHeld is how much of an answer is held until its submissions are noted in the storage, in bytes.
	maxHeld = 1 << 20

	// maxNoting is how long an answer is held until its submissions are noted.
	maxNoting = 500 * time.Millisecond

	// maxBatch is the number of submissions of a longer answer that are noted at once.
	maxBatch = 256
)

// learner reads which submissions the broker has accepted, while its answer goes to the caller. An answer is held until
// the submissions are noted, so a caller that has one can rely on it. One that is too long to be held, or for which there
// is no memory, is read as it passes.
type learner struct {
	follower *harvest.Follower
	client   string
	broker   *upstream

	body        io.ReadCloser
	reservation *reservation
	held        []byte
	err         error          // that ended what is held; io.EOF if that is the whole answer
	rest        *io.PipeWriter // to the reader of a longer answer; nil if there is none
}

// isSubmit reports whether a request submits files.
func isSubmit(req *http.Request) bool {
	return req.Method == http.MethodPost && strings.EqualFold(req.URL.Path, submitPath)
}

// learn replaces the body of the broker's answer to a submission by one that is read on the way. It returns when what the
// broker has accepted is noted, or cannot be noted in time.
func (t *proxyTransport) learn(ctx context.Context, resp *http.Response, client string) {
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return
	}
	l := &learner{follower: t.follower, client: client, broker: t.broker, body: resp.Body}
	l.reservation = t.broker.memory.reserve(&t.broker.share)
	resp.Body = l
	l.hold()
	if l.err == nil {
		reader, writer := io.Pipe()
		l.rest = writer
		go l.read(io.MultiReader(bytes.NewReader(l.held), reader), reader)
		return
	}
	var targets []harvest.Target
	err := task.ReadAccepted(bytes.NewReader(l.held), func(a task.Accepted) { targets = append(targets, l.target(a)) })
	l.warn(err)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), maxNoting)
	defer cancel()
	_ = l.follower.Add(ctx, targets) // what cannot be noted now is followed, and noted later
}

// hold reads what is held of the answer.
func (l *learner) hold() {
	for size := 4 << 10; size <= maxHeld && l.err == nil; size *= 4 {
		if !l.reservation.grow(int64(2 * size)) { // the old and the new
			return
		}
		held := make([]byte, size)
		n := copy(held, l.held)
		more, err := io.ReadFull(l.body, held[n:])
		l.held = held[:n+more]
		if l.err = err; errors.Is(err, io.ErrUnexpectedEOF) {
			l.err = io.EOF
		}
	}
}

// read reads a longer answer. It must read to the end, since the caller gets no more than it has read.
func (l *learner) read(answer io.Reader, rest *io.PipeReader) {
	var batch []harvest.Target
	err := task.ReadAccepted(answer, func(a task.Accepted) {
		if batch = append(batch, l.target(a)); len(batch) == maxBatch {
			l.follower.Follow(batch...)
			batch = nil
		}
	})
	l.follower.Follow(batch...)
	l.warn(err)
	_, _ = io.Copy(io.Discard, rest)
}

func (l *learner) target(a task.Accepted) harvest.Target {
	return harvest.Target{ID: harvest.ID{SubmitID: a.SubmitID}, Client: l.client, SHA256: a.SHA256, Name: a.Name, Accepted: time.Now()}
}

// warn logs that an answer cannot be read, from time to time.
func (l *learner) warn(err error) {
	if err != nil && l.broker.warnings.due(l.broker.health.failDuration) {
		l.broker.logger.Warn("the answer to a submission cannot be read to its end: what it does not name is not followed", zap.Error(err))
	}
}

// Read implements io.Reader.
func (l *learner) Read(p []byte) (int, error) {
	if len(l.held) > 0 {
		n := copy(p, l.held)
		l.held = l.held[n:]
		return n, nil
	}
	if l.err != nil {
		return 0, l.err
	}
	n, err := l.body.Read(p)
	_, _ = l.rest.Write(p[:n]) // its reader reads to the end
	return n, err
}

// Close implements io.Closer.
func (l *learner) Close() error {
	if l.rest != nil {
		_ = l.rest.Close()
	}
	l.reservation.release()
	return l.body.Close()
}
