package fsbroker

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

const (
	// submitPath is the path of the endpoint whose answers name submissions.
	submitPath = "/submit"

	// maxHeld is how much of an answer is held until its submissions are noted in the storage, in bytes.
	maxHeld = 1 << 20

	// chunkSize is how much of an answer is read at once, in bytes.
	chunkSize = 8 << 10

	// maxNoting is how long an answer is held until its submissions are noted.
	maxNoting = 500 * time.Millisecond

	// maxBatch is the number of submissions of a longer answer that are noted at once.
	maxBatch = 256
)

// learner reads which submissions the broker has accepted, while its answer goes to the caller. An answer is held until
// the submissions are noted, so a caller that has one can rely on it. One that is too long or too slow to be held, or for
// which there is no memory, is read as it passes.
type learner struct {
	follower *harvest.Follower
	client   string
	broker   *upstream.Upstream

	body        io.ReadCloser
	reads       *backgroundReader // of the body
	reservation *budget.Reservation
	held        []byte
	err         error          // that ended what is held; io.EOF if that is the whole answer
	rest        *io.PipeWriter // to the reader of what follows; nil if there is none
}

// isSubmit reports whether a request submits files.
func isSubmit(req *http.Request) bool {
	return req.Method == http.MethodPost && strings.EqualFold(req.URL.Path, submitPath)
}

// learn replaces the body of the broker's answer to a client's submission by one that is read on the way. It returns when
// what the broker has accepted is noted, or cannot be read and noted in time.
func learn(ctx context.Context, f *harvest.Follower, broker *upstream.Upstream, client string, resp *http.Response) {
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return
	}
	l := &learner{
		follower: f, client: client, broker: broker,
		body: resp.Body, reads: newBackgroundReader(resp.Body, chunkSize),
	}
	l.reservation = broker.Reserve()
	resp.Body = l
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), maxNoting)
	defer cancel()
	l.hold(ctx)
	if l.err == nil {
		reader, writer := io.Pipe()
		l.rest = writer
		go l.read(io.MultiReader(bytes.NewReader(l.held), reader), reader)
		return
	}
	var targets []harvest.Target
	err := task.ReadAccepted(bytes.NewReader(l.held), func(a task.Accepted) { targets = append(targets, l.target(a)) })
	l.warn(err)
	_ = l.follower.Add(ctx, targets) // what cannot be noted now is followed, and noted later
}

// hold receives what is held of the answer.
func (l *learner) hold(ctx context.Context) {
	for len(l.held) < maxHeld && l.err == nil && l.reservation.Grow(int64(2*(len(l.held)+chunkSize))) == nil { // the old and the new
		c, ok := l.reads.next(ctx.Done())
		if !ok {
			return
		}
		l.held, l.err = append(l.held, c.data...), c.err
	}
}

// read reads an answer that is not held. It must read to the end, since the caller gets no more than it has read.
func (l *learner) read(answer io.Reader, rest *io.PipeReader) {
	var mu sync.Mutex // guards batch
	var batch []harvest.Target
	follow := func() {
		mu.Lock()
		defer mu.Unlock()
		l.follower.Follow(batch...)
		batch = nil
	}
	err := task.ReadAccepted(answer, func(a task.Accepted) {
		mu.Lock()
		batch = append(batch, l.target(a))
		size := len(batch)
		mu.Unlock()
		switch size {
		case 1:
			time.AfterFunc(maxNoting, follow) // what comes next may take its time
		case maxBatch:
			follow()
		}
	})
	follow()
	l.warn(err)
	_, _ = io.Copy(io.Discard, rest)
}

func (l *learner) target(a task.Accepted) harvest.Target {
	return harvest.Target{ID: harvest.ID{SubmitID: a.SubmitID}, Client: l.client, SHA256: a.SHA256, Name: a.Name, Accepted: time.Now()}
}

// warn logs that an answer cannot be read, from time to time.
func (l *learner) warn(err error) {
	if err != nil {
		l.broker.WarnSometimes("the answer to a submission cannot be read to its end: what it does not name is not followed", err)
	}
}

// Read implements io.Reader.
func (l *learner) Read(p []byte) (int, error) {
	if len(l.held) == 0 && l.err == nil {
		c, _ := l.reads.next(nil)
		l.held, l.err = c.data, c.err
		_, _ = l.rest.Write(c.data) // its reader reads to the end
	}
	if len(l.held) == 0 {
		return 0, l.err
	}
	n := copy(p, l.held)
	l.held = l.held[n:]
	return n, nil
}

// Close implements io.Closer.
func (l *learner) Close() error {
	if l.rest != nil {
		_ = l.rest.Close()
	}
	l.reservation.Release()
	return l.body.Close()
}
