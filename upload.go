package fsbroker

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// uploadChunk is how much of a caller's body is read at once, in bytes, which is what Go's transport sends at once.
const uploadChunk = 32 << 10

// callerBody is the body of a caller's request. Its errors are problems, so that they are not taken for the broker's.
//
// It never closes the body below it. net/http takes a body that was closed for one that was read to its end, because Caddy
// has put another in its place, and would read the next request from what is left.
type callerBody struct {
	whole   atomic.Bool // it has been read to its end
	refused atomic.Bool // the broker has answered that it does not want it
	unread  context.Context
	giveUp  context.CancelCauseFunc // ends all reads with a cause

	mu      sync.Mutex // held while it is read
	reads   *backgroundReader
	rest    []byte           // of the last chunk
	err     error            // that follows the rest
	problem *problem.Problem // why it could not be read
}

func newCallerBody(body io.Reader) *callerBody {
	b := &callerBody{reads: newBackgroundReader(body, uploadChunk)}
	b.unread, b.giveUp = context.WithCancelCause(context.Background())
	return b
}

// Read implements io.Reader.
func (b *callerBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := context.Cause(b.unread); err != nil {
		return 0, err
	}
	if len(b.rest) == 0 && b.err == nil {
		c, ok := b.reads.next(b.unread.Done())
		if !ok {
			return 0, context.Cause(b.unread)
		}
		b.rest, b.err = c.data, b.judge(c.err)
	}
	if b.refused.Load() {
		<-b.unread.Done()
		return 0, context.Cause(b.unread)
	}
	n := copy(p, b.rest)
	if b.rest = b.rest[n:]; len(b.rest) > 0 {
		return n, nil
	}
	return n, b.err
}

// GiveUp implements upstream.Body. It ends a read that is under way.
func (b *callerBody) GiveUp(cause error) { b.giveUp(cause) }

// Close implements io.Closer.
func (b *callerBody) Close() error {
	b.giveUp(http.ErrBodyReadAfterClose)
	return nil
}

// judge returns the problem that an error of the body means. The caller holds the mutex.
func (b *callerBody) judge(err error) error {
	limit, tooLarge := errors.AsType[*http.MaxBytesError](err)
	network, _ := errors.AsType[net.Error](err)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF):
		b.whole.Store(true)
		return io.EOF
	case tooLarge:
		b.problem = &problem.Problem{Kind: problem.RequestTooLarge, Detail: "the request has more than " + strconv.FormatInt(limit.Limit, 10) + " bytes: send less"}
	case network != nil && network.Timeout():
		b.problem = &problem.Problem{Kind: problem.RequestTimeout, Detail: "the request did not arrive in time: send it again, faster"}
	default:
		b.problem = &problem.Problem{Kind: problem.IncompleteRequest, Detail: "the request is malformed, or ended early: send it again"}
	}
	return b.problem
}

// Refuse implements upstream.Body: the transport waits for what it has not sent until the body is given up. So the broker
// gets no more, and the connection is not used again, which the broker may close at any moment.
func (b *callerBody) Refuse() {
	if !b.whole.Load() {
		b.refused.Store(true)
	}
}

// Late implements upstream.Body. The server ends the context of a request whose body is late while that is read, although the
// caller has not left.
func (b *callerBody) Late() *problem.Problem {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.problem == nil || b.problem.Kind != problem.RequestTimeout {
		return nil
	}
	return b.problem
}

// lingering bounds how long a connection is read from that is going to be closed.
type lingering struct {
	pause time.Duration // without a byte
	total time.Duration
	size  int64         // bytes
	slots chan struct{} // has a value for each connection
}

// Those who have shown no valid secret get little, and cannot use up the places of the others.
var (
	lingerForClients = &lingering{pause: 2 * time.Second, total: 30 * time.Second, size: 256 << 20, slots: make(chan struct{}, 48)}
	lingerForOthers  = &lingering{pause: 2 * time.Second, total: 2 * time.Second, size: 1 << 20, slots: make(chan struct{}, 16)}
)

// linger reads and drops what still comes of a body after the response over HTTP/1.x (RFC 9112, section 9.6). The system
// resets a connection that is closed with unread data, and the caller may lose the response then. Over other versions, only
// the stream ends.
func (b *callerBody) linger(w http.ResponseWriter, r *http.Request, l *lingering) {
	if r.ProtoMajor != 1 || b.whole.Load() || http.NewResponseController(w).Flush() != nil {
		return
	}
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	default:
		return
	}
	_ = b.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	body, connection := b.reads.body, http.NewResponseController(w)
	if below, _ := caddyhttp.IdleTimeoutsFromContext(r.Context()); below != nil {
		// Its timeout may be over, and so may the limit of a handler above it.
		body, connection = below.ReadCloser, below.Ctrl
	}
	end := time.Now().Add(l.total)
	var dropped int64
	for now := time.Now(); dropped < l.size && now.Before(end); now = time.Now() {
		pause := now.Add(l.pause)
		if pause.After(end) {
			pause = end
		}
		if connection.SetReadDeadline(pause) != nil {
			return
		}
		c, _ := b.reads.next(nil)
		if c.err != nil && b.reads.body == body || errors.Is(c.err, io.EOF) {
			return
		}
		b.reads.body = body
		dropped += int64(len(c.data))
	}
}

// stop ends a read that is under way, because net/http and Caddy's access log use the body when the handler has returned.
// net/http waits for no more of a body that was not read to its end.
func (b *callerBody) stop(w http.ResponseWriter) {
	_ = b.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.whole.Load() {
		return
	}
	if http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0)) == nil && b.reads.reading {
		b.reads.next(nil)
	}
}

// closingWriter is the writer of a response over HTTP/1.x to a request with a body. The connection must not be used again
// if the body has not been read to its end.
type closingWriter struct {
	*caddyhttp.ResponseWriterWrapper
	body *callerBody
}

// WriteHeader implements http.ResponseWriter.
func (w *closingWriter) WriteHeader(status int) {
	if status >= http.StatusOK && !w.body.whole.Load() {
		w.Header().Set("Connection", "close")
	}
	w.ResponseWriterWrapper.WriteHeader(status)
}

// backgroundReader reads a body in a goroutine of its own, so that a read can be left under way which takes too long. It is
// not safe for use by several goroutines.
type backgroundReader struct {
	body    io.Reader
	size    int    // of a chunk, at the most
	buffer  []byte // nil before the first read
	chunks  chan bodyChunk
	reading bool // a read is under way
}

// bodyChunk is what one read of a body returns.
type bodyChunk struct {
	data []byte
	err  error // after data
}

func newBackgroundReader(body io.Reader, size int) *backgroundReader {
	return &backgroundReader{body: body, size: size, chunks: make(chan bodyChunk, 1)}
}

// next returns the next chunk, which is valid until the next call. If done ends first, ok is false, and the next call waits
// for the same read.
func (r *backgroundReader) next(done <-chan struct{}) (c bodyChunk, ok bool) {
	if !r.reading {
		r.reading = true
		if r.buffer == nil {
			r.buffer = make([]byte, r.size)
		}
		go func() {
			n, err := r.body.Read(r.buffer)
			r.chunks <- bodyChunk{r.buffer[:n], err}
		}()
	}
	select {
	case c = <-r.chunks:
		r.reading = false
		return c, true
	case <-done:
		return bodyChunk{}, false
	}
}
