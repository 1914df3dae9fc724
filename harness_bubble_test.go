package fsbroker_test

import (
	"context"
	"net"
	"net/http/httptrace"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// bubble is the network of the synctest bubble in which a test runs. Without one, it is nil.
var bubble *pipes

// inBubble runs a test in a synctest bubble, where time passes only while all wait. Its sites and backends are real ones. They
// are connected by pipes, and serve plain HTTP: a read from a socket would not let the time pass.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		bubble = &pipes{open: make(map[string]*pipeListener)}
		t.Cleanup(func() { // the last of all
			time.Sleep(time.Minute) // until what looks from time to time whether it has ended has seen it
			bubble = nil
		})
		test(t)
	})
}

// pipes is a network of pipes.
type pipes struct {
	mu   sync.Mutex // guards the fields below
	last int        // port
	open map[string]*pipeListener
}

// newAddress returns an address that nothing else has.
func (p *pipes) newAddress() *net.TCPAddr {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: p.last}
}

// listen returns a listener at an address. Connections that are not accepted are left to the next one there.
func (p *pipes) listen(address *net.TCPAddr) *pipeListener {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.open[address.String()]
	if l == nil {
		l = &pipeListener{address: address, conns: make(chan net.Conn)}
		p.open[address.String()] = l
	}
	return &pipeListener{address: address, conns: l.conns, closed: make(chan struct{})}
}

// refuse makes an address refuse connections until it is listened on again.
func (p *pipes) refuse(address *net.TCPAddr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, address.String())
}

// dial connects to an address.
func (p *pipes) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if trace := httptrace.ContextClientTrace(ctx); trace != nil && trace.ConnectStart != nil {
		trace.ConnectStart(network, address)
		defer func() { trace.ConnectDone(network, address, err) }()
	}
	p.mu.Lock()
	l := p.open[address]
	p.mu.Unlock()
	if l == nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: tcpAddress(address), Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	client, server := net.Pipe()
	own := p.newAddress()
	select {
	case l.conns <- pipeConn{server, l.address, own}:
		return pipeConn{client, own, l.address}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func tcpAddress(address string) *net.TCPAddr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))
}

// pipeListener is a listener that accepts pipes.
type pipeListener struct {
	address *net.TCPAddr
	conns   chan net.Conn // of all listeners at the address
	closed  chan struct{}
	close   sync.Once
	refuses bool // when it is closed
}

// Accept implements net.Listener.
func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed: // although there may be a connection for the next listener
		return nil, net.ErrClosed
	default:
	}
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (l *pipeListener) Addr() net.Addr { return l.address }

// Close implements net.Listener.
func (l *pipeListener) Close() error {
	l.close.Do(func() {
		if l.refuses {
			bubble.refuse(l.address)
		}
		close(l.closed)
	})
	return nil
}

// pipeConn is an end of a pipe.
type pipeConn struct {
	net.Conn
	local, remote net.Addr
}

// LocalAddr implements net.Conn.
func (c pipeConn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c pipeConn) RemoteAddr() net.Addr { return c.remote }

// newSocket returns a socket for a site.
func newSocket(t testing.TB) *testsite.Socket {
	t.Helper()
	if bubble == nil {
		return testsite.Listen(t)
	}
	address := bubble.newAddress()
	bubble.listen(address)
	return &testsite.Socket{Address: address.String(), Port: address.Port, Bind: "pipe/" + address.String()}
}

// newListener returns a listener for a backend.
func newListener(t testing.TB) net.Listener {
	t.Helper()
	if bubble == nil {
		return testsite.Listener(t)
	}
	l := bubble.listen(bubble.newAddress())
	l.refuses = true
	return l
}

// refused returns an address that refuses connections.
func refused(t testing.TB) string {
	t.Helper()
	if bubble == nil {
		return testsite.Refused(t)
	}
	return bubble.newAddress().String()
}

// listenAgain returns a listener at the address of one that is closed.
func listenAgain(t testing.TB, address string) net.Listener {
	t.Helper()
	if bubble != nil {
		l := bubble.listen(tcpAddress(address))
		l.refuses = true
		return l
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

// dial connects to a site or a backend.
func dial(ctx context.Context, network, address string) (net.Conn, error) {
	if bubble != nil {
		return bubble.dial(ctx, network, address)
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

func init() {
	caddy.RegisterModule(new(pipesApp))
	httpcaddyfile.RegisterGlobalOption("pipes", func(*caddyfile.Dispenser, any) (any, error) {
		return httpcaddyfile.App{Name: "pipes", Value: []byte("{}")}, nil
	})
	caddy.RegisterNetwork("pipe", func(_ context.Context, _, host, port string, _ uint, _ net.ListenConfig) (any, error) {
		return bubble.listen(tcpAddress(net.JoinHostPort(host, port))), nil
	})
}

// pipesApp is a Caddy app that connects the handlers of a configuration to their upstreams by pipes.
type pipesApp struct{}

// CaddyModule implements caddy.Module.
func (*pipesApp) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "pipes", New: func() caddy.Module { return new(pipesApp) }}
}

// Provision implements caddy.Provisioner. It comes before any app is started.
func (*pipesApp) Provision(ctx caddy.Context) error {
	if _, err := ctx.App("http"); err != nil { // which provisions the handlers
		return err
	}
	fsbroker.DialUpstreams(bubble.dial)
	return nil
}

// Start implements caddy.App.
func (*pipesApp) Start() error { return nil }

// Stop implements caddy.App.
func (*pipesApp) Stop() error { return nil }
