package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

// tlsProbe remembers whether an upstream speaks TLS.
type tlsProbe struct {
	mu     sync.Mutex // held during a probe
	until  time.Time  // until when the verdict counts
	speaks bool
}

// tlsProbeTimeout bounds the handshake by which an upstream is probed.
const tlsProbeTimeout = 2 * time.Second

// speaksTLS reports whether what listens at a host speaks TLS. Only a handshake can show that. It is tried at most once in an
// interval, for all that want to know.
func (p *tlsProbe) speaksTLS(ctx context.Context, transport http.RoundTripper, host string, interval time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !time.Now().Before(p.until) {
		p.speaks = shakeHands(ctx, transport, host)
		p.until = time.Now().Add(interval)
	}
	return p.speaks
}

// shakeHands reports whether a TLS handshake is answered. It ends before a request is sent.
func shakeHands(ctx context.Context, transport http.RoundTripper, host string) bool {
	ctx, cancel := context.WithTimeout(ctx, tlsProbeTimeout)
	defer cancel()
	var answered atomic.Bool
	ctx = httptrace.WithClientTrace(transportContext(ctx), &httptrace.ClientTrace{
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			answered.Store(answersHandshake(err))
			cancel()
		},
	})
	target := url.URL{Scheme: "https", Host: host, Path: "/"}
	resp, err := transport.RoundTrip((&http.Request{Method: http.MethodHead, URL: &target, Header: make(http.Header)}).WithContext(ctx))
	if err == nil { // over a connection that was open already
		_ = resp.Body.Close()
	}
	return answered.Load() || answersHandshake(err)
}

// answersHandshake reports whether a TLS server has answered a handshake with that outcome.
func answersHandshake(err error) bool {
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	network, ok := errors.AsType[*net.OpError](err)
	alert := ok && network.Op == "remote error" // which is how crypto/tls reports an alert
	return err == nil || untrusted || alert
}
