// Package testsite has what the tests need that run a Caddy in their process. Only tests import it.
package testsite

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// Certificate is a certificate for localhost.
type Certificate struct {
	PEM, Key []byte // both in PEM
	KeyHash  string // the SHA-256 sum of the public key, in Base64
}

// Localhost returns a self-signed certificate for localhost. All sites of a process have it, since Caddy keeps certificates
// for as long as the process lives. Caddy could make one when it starts, but has a data race there, which the race detector
// would report as ours.
var Localhost = sync.OnceValue(func() Certificate {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		panic(err)
	}
	public, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		panic(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(public)
	return Certificate{
		PEM:     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:     pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		KeyHash: base64.StdEncoding.EncodeToString(sum[:]),
	}
})

// ClientConfig returns the TLS configuration of a client that trusts the certificate.
func ClientConfig() *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(Localhost().PEM)
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

// ports has the ports that FreePort has returned.
var ports sync.Map

// FreePort returns a port on which no process listens, and a different one each time. The system gives none of these ports to
// a connection, which would take it before a server listens on it, or while the server starts again.
func FreePort(t testing.TB) int {
	t.Helper()
	const first, last = 10_000, 32_000
	for range 1000 {
		port := first + mathrand.IntN(last-first)                             //nolint:gosec // it need not be unpredictable
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)) //nolint:noctx // it does not wait
		if err != nil {
			continue
		}
		_ = listener.Close()
		if _, returned := ports.LoadOrStore(port, true); !returned {
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// Load runs Caddy with a Caddyfile.
func Load(caddyfile []byte) error {
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(caddyfile, map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err
	}
	return caddy.Load(config, true)
}

// Run runs Caddy with a Caddyfile until the test ends.
func Run(t testing.TB, caddyfile []byte) {
	t.Helper()
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := Load(caddyfile); err != nil {
		t.Fatal(err)
	}
}
