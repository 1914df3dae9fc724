package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// waitingCallers are callers that wait for reports, all at once.
type waitingCallers struct {
	count  int
	server *server
	task   func(i int) string     // the ID of the task of a caller
	want   func(id string) []byte // the report of a task

	mu          sync.Mutex // guards the fields below
	answered    int
	first, last time.Time
}

// answers returns how many callers have the report, and when the first and the last one got it.
func (w *waitingCallers) answers() (n int, first, last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answered, w.first, w.last
}

// path returns the path that a caller requests.
func (w *waitingCallers) path(i int) string {
	return fmt.Sprintf("/task?%s&wait=%d", nodeQuery("node-1", w.task(i)), waitSeconds)
}

// answer records the answer to a caller, which must be the finished report.
func (w *waitingCallers) answer(i int, r reply) error {
	now := time.Now()
	if r.status != http.StatusOK {
		return fmt.Errorf("status %d: %.200s", r.status, r.body)
	}
	if r.length != int64(len(r.body)) || len(r.body) <= len(pendingReport) {
		return fmt.Errorf("the answer of %d bytes, with Content-Length %d, is not the finished report", len(r.body), r.length)
	}
	if i%checkEvery == 0 {
		if err := checkBody(r.encoding, r.body, w.want(w.task(i)), true); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.answered == 0 {
		w.first = now
	}
	w.answered++
	w.last = now
	return nil
}

// run makes the requests of all callers, and returns when they have the answers. Connections are opened one after the
// other, so that none is refused.
func (w *waitingCallers) run(ctx context.Context, overHTTP2 bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	open := w.openHTTP1
	if overHTTP2 {
		open = w.openHTTP2
	}
	var wg sync.WaitGroup
	for from := 0; from < w.count && ctx.Err() == nil; {
		n, receive, err := open(ctx, from)
		if err != nil {
			cancel(err)
			break
		}
		wg.Go(func() {
			if err := receive(); err != nil {
				cancel(err)
			}
		})
		from += n
	}
	wg.Wait()
	return context.Cause(ctx)
}

// openHTTP1 opens a connection for one caller. Its request is made by receive, which returns when the caller has the answer.
func (w *waitingCallers) openHTTP1(ctx context.Context, from int) (n int, receive func() error, err error) {
	c := &caller{server: w.server}
	if _, err := c.connect(ctx); err != nil {
		return 0, nil, err
	}
	return 1, func() error {
		defer c.close()
		defer context.AfterFunc(ctx, c.close)()
		r, err := c.send(ctx, query{method: http.MethodGet, target: w.path(from)}, true)
		if err != nil {
			return err
		}
		return w.answer(from, r)
	}, nil
}

// openHTTP2 opens a connection for as many callers as the server permits, and makes their requests. receive returns when
// all n have the answer.
func (w *waitingCallers) openHTTP2(ctx context.Context, from int) (n int, receive func() error, err error) {
	c, err := dialHTTP2(ctx, w.server.Plain)
	if err != nil {
		return 0, nil, err
	}
	n = min(c.streams, w.count-from)
	if err := c.send(n, func(i int) string { return w.path(from + i) }); err != nil {
		return 0, nil, errors.Join(err, c.conn.Close())
	}
	return n, func() error {
		defer c.conn.Close()
		defer context.AfterFunc(ctx, func() { _ = c.conn.Close() })()
		return c.receive(n, func(i int, r reply) error { return w.answer(from+i, r) })
	}, nil
}

// http2Conn is an HTTP/2 connection without TLS for many requests at once. It takes less CPU time than an http.Client.
type http2Conn struct {
	address string
	conn    net.Conn
	out     *bufio.Writer
	framer  *http2.Framer
	streams int // how many requests the server permits at once
}

// flowWindow is how many bytes the server may send on a stream, and on a connection. It is more than all answers have.
const flowWindow = 1 << 30

// dialHTTP2 opens a connection and exchanges the settings.
func dialHTTP2(ctx context.Context, address string) (*http2Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &http2Conn{address: address, conn: conn, out: bufio.NewWriter(conn)}
	c.framer = http2.NewFramer(c.out, bufio.NewReaderSize(conn, 64<<10))
	c.framer.SetReuseFrames()
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := c.exchangeSettings(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func (c *http2Conn) exchangeSettings() error {
	_, err := c.out.WriteString(http2.ClientPreface)
	err = errors.Join(
		err,
		c.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: flowWindow}),
		c.framer.WriteWindowUpdate(0, flowWindow),
		c.out.Flush(),
	)
	if err != nil {
		return err
	}
	frame, err := c.framer.ReadFrame()
	if err != nil {
		return err
	}
	settings, ok := frame.(*http2.SettingsFrame)
	if !ok {
		return fmt.Errorf("the server sent %v instead of its settings", frame.Header())
	}
	streams, ok := settings.Value(http2.SettingMaxConcurrentStreams)
	if !ok || streams == 0 {
		return errors.New("the server does not say how many requests it permits at once")
	}
	c.streams = int(streams)
	return errors.Join(c.framer.WriteSettingsAck(), c.out.Flush())
}

// send makes n requests, the first on the connection.
func (c *http2Conn) send(n int, path func(i int) string) error {
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for i := range n {
		block.Reset()
		for _, f := range []hpack.HeaderField{
			{Name: ":method", Value: http.MethodGet}, {Name: ":scheme", Value: "http"},
			{Name: ":authority", Value: c.address}, {Name: ":path", Value: path(i)},
			{Name: "authorization", Value: "Bearer " + secret}, {Name: "accept-encoding", Value: "gzip"},
		} {
			if err := encoder.WriteField(f); err != nil {
				return err
			}
		}
		err := c.framer.WriteHeaders(http2.HeadersFrameParam{
			StreamID: uint32(2*i + 1), BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true,
		})
		if err != nil {
			return err
		}
	}
	return c.out.Flush()
}

// receive calls answer with the response to each of the n requests, until it has all.
func (c *http2Conn) receive(n int, answer func(i int, r reply) error) error {
	replies := make([]reply, n)
	for left := n; left > 0; {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return err
		}
		var ended bool
		i := int(frame.Header().StreamID) / 2
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			replies[i].status, _ = strconv.Atoi(f.PseudoValue("status"))
			replies[i].length = -1
			for _, field := range f.RegularFields() {
				switch field.Name {
				case "content-length":
					replies[i].length, _ = strconv.ParseInt(field.Value, 10, 64)
				case "content-encoding":
					replies[i].encoding = field.Value
				}
			}
			ended = f.StreamEnded()
		case *http2.DataFrame:
			replies[i].body = append(replies[i].body, f.Data()...)
			ended = f.StreamEnded()
		case *http2.RSTStreamFrame:
			return fmt.Errorf("the server reset a request: %s", f.ErrCode)
		case *http2.GoAwayFrame:
			return fmt.Errorf("the server closes a connection: %s %s", f.ErrCode, f.DebugData())
		}
		if ended {
			if err := answer(i, replies[i]); err != nil {
				return err
			}
			replies[i] = reply{}
			left--
		}
	}
	return nil
}
