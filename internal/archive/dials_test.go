package archive

import (
	"context"
	"errors"
	"net"
	"net/http/httptrace"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
)

// dialer is a storage that is read over a connection. It tries to connect again and again, as often as attempts says how that
// ends.
type dialer struct {
	certmagic.Storage
	attempts []error
}

func (d dialer) Load(ctx context.Context, name string) ([]byte, error) {
	for _, err := range d.attempts {
		httptrace.ContextClientTrace(ctx).ConnectDone("tcp", "192.0.2.1:6379", err)
		if err == nil {
			return d.Storage.Load(ctx, name)
		}
		pause, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		<-pause.Done()
		cancel()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	return nil, errNoServer
}

var errNoServer = errors.New("no server can be connected to")

// dialError is the error of a connection that could not be made.
func dialError(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }

// A read that connects over and over to a storage that refuses is given up. One that connects to another server goes on,
// however long that takes to answer.
func TestRefusedConnections(t *testing.T) {
	refused, local := dialError(syscall.ECONNREFUSED), dialError(syscall.EMFILE)
	for name, test := range map[string]struct {
		attempts []error
		latency  time.Duration
		err      error // nil if the report is found
		took     time.Duration
	}{
		"refused":                {attempts: slices.Repeat([]error{refused}, 15), err: syscall.ECONNREFUSED, took: refusalPatience},
		"refused, then no files": {attempts: append([]error{refused}, slices.Repeat([]error{local}, 15)...), err: syscall.ECONNREFUSED, took: refusalPatience},
		"another server answers": {attempts: []error{refused, refused, nil}, latency: time.Second / 2, took: 200*time.Millisecond + time.Second/2},
		"too late":               {attempts: []error{refused, refused, refused, nil}, err: syscall.ECONNREFUSED, took: refusalPatience},
		"no files":               {attempts: slices.Repeat([]error{local}, 5), err: errNoServer, took: 500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := storedFixture(t, 1)
				defer f.Close()
				f.storage.slow(test.latency)
				f.Attach(&Backend{Storage: dialer{f.backend.Storage, test.attempts}, Logger: f.backend.Logger, Retention: time.Hour})
				begin := time.Now()
				found, err := f.find(t, numbered(0))
				if took := time.Since(begin); !errors.Is(err, test.err) || (found.Report != nil) != (test.err == nil) || took != test.took {
					t.Errorf("found %+v, error %v after %s", found, err, took)
				}
			})
		})
	}
}

// The connections of the standard library are watched.
func TestDialsAreWatched(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dial := func(ctx context.Context, address string) net.Conn {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if (err == nil) != (address == listener.Addr().String()) {
			t.Fatalf("connecting to %s: %v", address, err)
		}
		return conn
	}
	ctx, d := watchDials(t.Context())
	d.err = syscall.ECONNREFUSED
	conn := dial(ctx, listener.Addr().String())
	defer conn.Close()
	if d.err != nil {
		t.Error("a connection does not end a refusal")
	}
	dial(ctx, conn.LocalAddr().String()) // nobody else gets this port, and nothing listens on it
	if err := <-d.refused; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("refused: %v", err)
	}
}
