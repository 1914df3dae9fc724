package testenv

import (
	"net"
	"testing"
)

// Port returns a port of 127.0.0.1 that belongs to the test until it ends: the system gives it to no other listener and to no
// connection. Connections to it are refused while no server listens on it.
func Port(t testing.TB) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it does not wait
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	// A connection keeps the port when the listener is closed.
	client, err := net.Dial("tcp", listener.Addr().String()) //nolint:noctx // it does not wait
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	return listener.Addr().(*net.TCPAddr).Port
}
