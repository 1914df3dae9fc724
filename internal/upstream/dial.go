package upstream

import (
	"context"
	"errors"
	"net/http/httptrace"
	"sync/atomic"
	"syscall"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// dialTrace records whether a request got a connection. The transport's error does not say so if the time is up first, and
// hides the cause of a failure to connect.
type dialTrace struct {
	dialing, connected atomic.Bool
	err                atomic.Pointer[error] // of the last attempt to resolve a name or to connect
}

func (d *dialTrace) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn: func(string) { // once for every attempt
			d.dialing.Store(false)
			d.connected.Store(false)
		},
		DNSStart:     func(httptrace.DNSStartInfo) { d.dialing.Store(true) },
		DNSDone:      func(info httptrace.DNSDoneInfo) { d.err.Store(&info.Err) },
		ConnectStart: func(string, string) { d.dialing.Store(true) },
		ConnectDone:  func(_, _ string, err error) { d.err.Store(&err) },
		GotConn:      func(httptrace.GotConnInfo) { d.connected.Store(true) },
	}
}

// isLocal reports whether connecting has failed for lack of file descriptors, ports or memory of this machine, which says
// nothing about an upstream.
func (d *dialTrace) isLocal() bool {
	err := d.err.Load()
	if !d.failed() || err == nil {
		return false
	}
	for _, local := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(*err, local) {
			return true
		}
	}
	return false
}

// failed reports whether connecting was attempted, including name resolution and TLS, and failed.
func (d *dialTrace) failed() bool { return d.dialing.Load() && !d.connected.Load() }

// transportContext adds to ctx what Caddy's transport reads from the context of a request, where it would find a caller's.
func transportContext(ctx context.Context) context.Context {
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any))
	return context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
}
