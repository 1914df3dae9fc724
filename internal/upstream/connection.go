package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"syscall"
	"time"
)

// connection is a connection to an upstream. An upstream may answer before a request has arrived, and close the connection.
// Go's transport prefers the error of writing the rest of the request to the answer, whichever it sees first. So that error
// is held back until there is nothing more to read. Usually that is at once. Over HTTP/2, the reader may wait for the writer, so
// maxHoldBack bounds it.
type connection struct {
	net.Conn
	ctx context.Context // ends with the reads of the connection, whose error is the cause
	end context.CancelCauseFunc
}

// maxHoldBack bounds how long the error of a write is held back. What has arrived before can be read much faster.
const maxHoldBack = 2 * time.Second

// WithPatientWrites makes a transport hold back the errors of writing. Connections of a TLS server name with placeholders
// are left as they are: the transport would not know them for TLS.
func WithPatientWrites(transport *http.Transport) {
	dial := transport.DialContext
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		c := &connection{Conn: conn}
		c.ctx, c.end = context.WithCancelCause(context.Background())
		return c, nil
	}
}

// Read implements net.Conn.
func (c *connection) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.end(fmt.Errorf("the connection has ended: %w", err)) // io.EOF itself would be taken for the end of a body
	}
	return n, err
}

// Write implements net.Conn.
func (c *connection) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
		select {
		case <-c.ctx.Done():
			err = context.Cause(c.ctx)
		case <-time.After(maxHoldBack):
		}
	}
	return n, err
}

// Close implements net.Conn.
func (c *connection) Close() error {
	c.end(net.ErrClosed) // unless a read has ended it
	return c.Conn.Close()
}

// giveUpWithConnection returns a context for a request whose body is given up when the request's connection ends, with the
// cause of that. Otherwise, Go's transport would wait for a read of the body, although the caller may send no more. After stop,
// the body is not given up.
func giveUpWithConnection(ctx context.Context, body Body) (traced context.Context, stop func()) {
	unwatch := func() bool { return false }
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) { // once for every attempt
			unwatch()
			conn := info.Conn
			if encrypted, ok := conn.(*tls.Conn); ok {
				conn = encrypted.NetConn()
			}
			if c, ok := conn.(*connection); ok {
				unwatch = context.AfterFunc(c.ctx, func() { body.GiveUp(context.Cause(c.ctx)) })
			}
		},
	}), func() { unwatch() }
}
