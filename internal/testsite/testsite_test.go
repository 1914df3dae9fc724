package testsite

import (
	"net"
	"testing"
)

// A closed listener refuses connections, and its address can be listened on again.
func TestListener(t *testing.T) {
	listener := Listener(t)
	address := listener.Addr().String()
	_ = listener.Close()
	if conn, err := net.Dial("tcp", address); err == nil {
		conn.Close()
		t.Error("it does not refuse connections")
	}
	again, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}
