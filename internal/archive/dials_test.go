package archive

import (
	"context"
	"errors"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
)

// dialer is a storage that is read over a connection. It tries its addresses in turn, as often as there are any.
type dialer struct {
	certmagic.Storage
	addresses []string
	pause     time.Duration // after an attempt that fails
}

func (d dialer) Load(ctx context.Context, name string) ([]byte, error) {
	for _, address := range d.addresses {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err == nil {
			_ = conn.Close()
			return d.Storage.Load(ctx, name)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(d.pause):
		}
	}
	return nil, errors.New("no server can be connected to")
}

// A read that connects over and over to a storage that refuses is given up. One that connects to another server goes on.
func TestRefusedConnections(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	open, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	refuses, answers := closed.Addr().String(), open.Addr().String()

	read := func(addresses ...string) (Found, time.Duration, error) {
		f := newFixture()
		defer f.Archive.Close()
		f.Save(item(0, 100))
		for deadline := time.Now().Add(5 * time.Second); f.Stats().Queued > 0 && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		f.Attach(&Backend{Storage: dialer{f.backend.Storage, addresses, 100 * time.Millisecond}, Logger: f.backend.Logger, Retention: time.Hour})
		begin := time.Now()
		found, err := f.find(t, numbered(0))
		return found, time.Since(begin), err
	}
	if _, took, err := read(slices.Repeat([]string{refuses}, 15)...); !errors.Is(err, ErrUnreadable) || !errors.Is(err, syscall.ECONNREFUSED) || took > time.Second {
		t.Errorf("refused: error %v after %s", err, took)
	}
	if found, _, err := read(refuses, refuses, answers); err != nil || found.Report == nil {
		t.Errorf("another server answers: found %+v, error %v", found, err)
	}
}
