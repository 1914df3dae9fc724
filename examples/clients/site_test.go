package clients_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

//go:embed Caddyfile
var caddyfile []byte

// site is a Caddy with the module, in front of a broker and a node. It runs until the test ends.
type site struct {
	url    string
	ca     string // the file of the certificate that a client must trust
	log    string // the file of the access log
	secret string
	client *http.Client

	uploader   string      // the secret of a client that may only submit
	overloaded atomic.Bool // whether the broker refuses the next request for a report

	broker, node *upstream
}

// startSite starts a site. The broker hands submitted files to the node as soon as it has answered the first request for
// a report, so a client that polls sees each state. The node then takes as long as analysis says. If that is 0, the files
// stay queued.
func startSite(t *testing.T, analysis time.Duration) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{ca: filepath.Join(dir, "cert.pem"), log: filepath.Join(dir, "access.log"), secret: rand.Text(), uploader: rand.Text()}
	for name, content := range map[string][]byte{"cert.pem": testsite.Localhost().PEM, "key.pem": testsite.Localhost().Key} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nodeSecret, brokerSecret := rand.Text(), rand.Text()
	pinned, err := backend.NewCertificate()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "upstreams.crt"), pinned.PEM, 0o600); err != nil {
		t.Fatal(err)
	}

	s.node = startUpstream(t, pinned, backend.NewNode(nodeSecret, analysis, time.Minute))
	broker := backend.NewBroker(brokerSecret, backend.NodeRef{AppServerID: "node-1", Address: "https://" + s.node.address, Secret: nodeSecret})
	broker.NodeClient = pinned.Client()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	dispatch := sync.OnceFunc(func() { running.Go(func() { broker.Run(ctx) }) })
	s.broker = startUpstream(t, pinned, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/task" && s.overloaded.CompareAndSwap(true, false) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		broker.ServeHTTP(w, r)
		if analysis > 0 && (r.URL.Path == "/task" || r.URL.Path == "/submit-result") {
			dispatch()
		}
	}))

	port := strconv.Itoa(testenv.Port(t))
	s.url = "https://localhost:" + port
	for name, value := range map[string]string{
		"CLIENTS_DIR": filepath.ToSlash(dir), "CLIENTS_PORT": port, "XDG_DATA_HOME": dir, // Caddy writes its instance ID there
		"NODE_ADDRESS": s.node.address, "BROKER_ADDRESS": s.broker.address,
		"CALLER_SECRET": s.secret, "UPLOADER_SECRET": s.uploader, "NODE_SECRET": nodeSecret, "BROKER_SECRET": brokerSecret,
	} {
		t.Setenv(name, value)
	}
	testsite.Run(t, caddyfile)
	transport := &http.Transport{TLSClientConfig: testsite.ClientConfig()}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Transport: transport}
	return s
}

// submitted is the file that submit submits.
const submitted = "hello"

// submit submits a file and returns the submission's ID.
func (s *site) submit(t *testing.T) string {
	t.Helper()
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("file", "hello.txt")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := part.Write([]byte(submitted)); err != nil {
		t.Fatal(err)
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	request, err := http.NewRequestWithContext(testenv.Context(t), http.MethodPost, s.url+"/submit", &form)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", writer.FormDataContentType())
	request.Header.Set("Authorization", "Bearer "+s.secret)
	resp, err := s.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		AcceptedFiles []struct{ ID string }
	}
	if err := json.Unmarshal(body, &answer); err != nil || len(answer.AcceptedFiles) != 1 {
		t.Fatalf("%s: %v: %s", resp.Status, err, body)
	}
	return answer.AcceptedFiles[0].ID
}

// failures returns how many requests have failed so far. Any goroutine may call it.
func (s *site) failures() int {
	log, _ := os.ReadFile(s.log)
	return bytes.Count(log, []byte(`"status":50`))
}

// upstream is a server that can be stopped, and started again at the same address.
type upstream struct {
	address     string
	certificate *backend.Certificate
	handler     http.Handler
	server      *http.Server
}

func startUpstream(t *testing.T, certificate *backend.Certificate, handler http.Handler) *upstream {
	t.Helper()
	u := &upstream{address: fmt.Sprintf("127.0.0.1:%d", testenv.Port(t)), certificate: certificate, handler: handler}
	if err := u.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.stop)
	return u
}

func (u *upstream) start() error {
	l, err := net.Listen("tcp", u.address)
	if err != nil {
		return err
	}
	u.address = l.Addr().String()
	s := &http.Server{Handler: u.handler}
	u.server = s
	go func() { _ = s.Serve(tls.NewListener(l, u.certificate.ServerConfig())) }()
	return nil
}

func (u *upstream) stop() { _ = u.server.Close() }
