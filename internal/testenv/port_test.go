package testenv_test

import (
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// TestPort checks that a server can listen on the port again and again, on the loopback address or on all, and that
// connections to it are refused while it does not.
func TestPort(t *testing.T) {
	port := testenv.Port(t)
	loopback := fmt.Sprintf("127.0.0.1:%d", port)
	for _, address := range []string{loopback, fmt.Sprintf(":%d", port), loopback} {
		if _, err := net.Dial("tcp", loopback); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("without a server: %v", err)
		}
		server, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", loopback)
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []interface{ Close() error }{accepted, conn, server} {
			_ = c.Close()
		}
	}
}

// TestPortIsReserved lets the system choose ports for so many listeners and connections that some of them would have a port
// that is reserved, if it were not.
func TestPortIsReserved(t *testing.T) {
	reserved := make(map[int]bool)
	for range 200 {
		port := testenv.Port(t)
		if reserved[port] {
			t.Fatalf("the port %d is reserved twice", port)
		}
		reserved[port] = true
	}
	for range 200 {
		server, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		conn, err := net.Dial("tcp", server.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for _, address := range []net.Addr{server.Addr(), conn.LocalAddr()} {
			if port := address.(*net.TCPAddr).Port; reserved[port] {
				t.Errorf("the reserved port %d is given to another", port)
			}
		}
	}
}
