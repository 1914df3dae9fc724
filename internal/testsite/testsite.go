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
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
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

// Socket is a socket on localhost on which connections wait until a server takes it over. A port that is chosen before it is
// bound may be another process's by then.
type Socket struct {
	Address string // host:port
	Port    int
	File    *os.File
	Bind    string // as Caddy's listener addresses name it in this process
}

// Listen returns a socket that is open until the test ends.
func Listen(t testing.TB) *Socket {
	t.Helper()
	listener := listen(t, 0)
	defer listener.Close() // the file keeps the socket open
	file, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	address := listener.Addr().(*net.TCPAddr)
	return &Socket{Address: address.String(), Port: address.Port, File: file, Bind: fmt.Sprintf("fd/%d", file.Fd())}
}

// Listener returns a listener on localhost. When it is closed, its address refuses connections, and a server can listen there
// again until the test ends.
func Listener(t testing.TB) net.Listener {
	t.Helper()
	return listen(t, testenv.Port(t))
}

// Refused returns an address that refuses connections until the test ends.
func Refused(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", testenv.Port(t))
}

func listen(t testing.TB, port int) *net.TCPListener {
	t.Helper()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

// Load runs Caddy with a Caddyfile.
func Load(caddyfile []byte) error {
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(caddyfile, map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err
	}
	return caddy.Load(config, true)
}

// Run runs Caddy with a Caddyfile until the test ends. It writes nothing into the user's home.
func Run(t testing.TB, caddyfile []byte) {
	t.Helper()
	home := t.TempDir()
	caddy.ConfigAutosavePath = filepath.Join(home, "autosave.json")
	caddy.DefaultStorage = &certmagic.FileStorage{Path: home}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := Load(caddyfile); err != nil {
		t.Fatal(err)
	}
}
