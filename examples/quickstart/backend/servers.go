package backend

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"
)

// Servers are the running servers of a broker and its nodes. The zero value serves HTTP.
type Servers struct {
	TLS *tls.Config // serves HTTPS with it if it is set

	list    []*http.Server
	running sync.WaitGroup
}

// Serve starts a server on a listener and returns its URL.
func (s *Servers) Serve(listener net.Listener, handler http.Handler) (url string) {
	scheme, address := "http", listener.Addr().String()
	if s.TLS != nil {
		scheme, listener = "https", tls.NewListener(listener, s.TLS)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, WriteTimeout: time.Minute}
	s.list = append(s.list, server)
	s.running.Go(func() { _ = server.Serve(listener) })
	return scheme + "://" + address
}

// Stop stops all servers. It gives requests in flight a few seconds to finish.
func (s *Servers) Stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	for _, server := range s.list {
		if server.Shutdown(ctx) != nil {
			_ = server.Close()
		}
	}
	s.running.Wait()
}
