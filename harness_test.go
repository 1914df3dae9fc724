package fsbroker_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

// The secrets of the tests, which configurations have as placeholders, since Caddy logs a whole configuration at debug
// level. None of them may be found in any answer or log.
const (
	callerSecret = "the-callers-own-secret"
	nodeSecret   = "the-nodes-own-secret"
	brokerSecret = "the-brokers-own-secret"
)

var allSecrets = []string{callerSecret, nodeSecret, brokerSecret}

// beCaddy is the environment variable that makes this test binary a Caddy with the module, for tests with more than one
// process.
const beCaddy = "FSBROKER_TEST_BE_CADDY"

func TestMain(m *testing.M) {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	for name, secret := range map[string]string{"CALLER": callerSecret, "NODE": nodeSecret, "BROKER": brokerSecret} {
		if err := os.Setenv(name+"_SECRET", secret); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m,
		// What Caddy and its libraries start once for a process.
		goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2.trapSignalsCrossPlatform.func1"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*Cache).maintainAssets"),
		goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
	)
}

// site is a Caddy that serves the handler over TLS.
type site struct {
	t      testing.TB
	base   string
	client *http.Client
	port   int
	dir    string // its storage and its log
}

// startSite runs Caddy with directives in a site of its own, until the test ends.
func startSite(t testing.TB, directives string) *site {
	t.Helper()
	s := newSite(t)
	s.load(directives)
	s.trust()
	return s
}

func newSite(t testing.TB) *site {
	t.Helper()
	if err := caddy.Stop(); err != nil { // where a test has a site after another
		t.Fatal(err)
	}
	port := freePort(t)
	s := &site{t: t, port: port, base: fmt.Sprintf("https://localhost:%d", port), dir: t.TempDir()}
	t.Cleanup(func() {
		if s.client != nil {
			s.client.CloseIdleConnections()
		}
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// load makes directives the site's, like a reload when it runs already.
func (s *site) load(directives string) {
	s.t.Helper()
	if err := s.tryLoad(directives); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) tryLoad(directives string) error {
	return s.loadCaddyfile(s.caddyfile(directives))
}

// caddyfile puts directives into a site that needs nothing of the machine.
func (s *site) caddyfile(directives string) string {
	return fmt.Sprintf(`{
	admin off
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage file_system %[1]s
	grace_period 5s
	log {
		output file %[2]s {
			roll_disabled
		}
		level DEBUG
		format filter {
			request>uri query {
				replace serect REDACTED
				replace secret REDACTED
			}
		}
	}
}

https://localhost:%[3]d {
	tls %[5]s %[6]s
	log
	%[4]s
}`, filepath.ToSlash(s.dir), filepath.ToSlash(s.logFile()), s.port, directives,
		s.write("cert.pem", certificate().pem), s.write("key.pem", certificate().key))
}

// write puts a file into the site's folder.
func (s *site) write(name string, content []byte) string {
	s.t.Helper()
	name = filepath.Join(s.dir, name)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return filepath.ToSlash(name)
}

// certificate is one for localhost that signs itself. Caddy could make one, but does so while it starts, and has a data
// race there that the race detector would report as ours.
var certificate = sync.OnceValue(func() (c struct{ pem, key []byte }) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		panic(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		panic(err)
	}
	c.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	c.key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	return c
})

func (s *site) logFile() string { return filepath.Join(s.dir, "caddy.log") }

func (s *site) loadCaddyfile(text string) error {
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err
	}
	return caddy.Load(config, true)
}

// trust makes a client that trusts the site, and waits until it answers.
func (s *site) trust() {
	s.t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certificate().pem)
	s.client = &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{RootCAs: pool},
			DisableCompression:  true, // the tests say themselves what they accept
			MaxIdleConnsPerHost: 300,
		},
		Timeout: 20 * time.Second,
	}
	// A process of its own takes a moment.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		resp, err := s.client.Get(s.base + "/warm-up")
		if err == nil {
			_ = resp.Body.Close()
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal(err)
		}
	}
}

// reply is a response, read.
type reply struct {
	status int
	header http.Header
	body   []byte
}

// get asks with the caller's secret, and with header fields as "Name: value".
func (s *site) get(path string, header ...string) reply {
	s.t.Helper()
	return s.do(s.t.Context(), http.MethodGet, path, append(header, "Authorization: Bearer "+callerSecret)...)
}

// do asks with nothing but what is given.
func (s *site) do(ctx context.Context, method, path string, header ...string) reply {
	s.t.Helper()
	r, err := s.try(ctx, method, path, header...)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func (s *site) try(ctx context.Context, method, path string, header ...string) (reply, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.base+path, nil)
	if err != nil {
		return reply{}, err
	}
	for _, field := range header {
		name, value, _ := strings.Cut(field, ": ")
		req.Header.Add(name, value)
	}
	resp, err := s.client.Do(req)
	for range 3 {
		if err == nil || ctx.Err() != nil || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			break
		}
		// While a configuration takes over from another, Caddy may close a connection that is only just accepted, before
		// anything has been asked.
		resp, err = s.client.Do(req)
	}
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{}, err
	}
	for _, secret := range allSecrets {
		if bytes.Contains(body, []byte(secret)) || strings.Contains(fmt.Sprint(resp.Header), secret) {
			s.t.Errorf("%s %s: the answer holds a secret: %v %s", method, path, resp.Header, body)
		}
	}
	return reply{resp.StatusCode, resp.Header, body}, nil
}

// wantStatus checks a reply's status.
func (r reply) wantStatus(t *testing.T, want int) {
	t.Helper()
	if r.status != want {
		t.Fatalf("status %d, want %d: %s", r.status, want, r.body)
	}
}

// wantHeader checks a field of a reply.
func (r reply) wantHeader(t *testing.T, name, want string) {
	t.Helper()
	if got := r.header.Get(name); got != want {
		t.Errorf("%s: %q, want %q", name, got, want)
	}
}

// wantProblem checks that a reply is a whole problem document.
func (r reply) wantProblem(t *testing.T, status int, code string) {
	t.Helper()
	r.wantStatus(t, status)
	r.wantHeader(t, "Content-Type", "application/problem+json")
	r.wantHeader(t, "Cache-Control", "no-store")
	var doc struct {
		Type, Title, Detail, Code string
		Status                    int
	}
	if err := json.Unmarshal(r.body, &doc); err != nil {
		t.Fatalf("%v: %s", err, r.body)
	}
	if doc.Code != code || doc.Status != status || doc.Title != http.StatusText(status) || doc.Detail == "" || !strings.HasSuffix(doc.Type, "#"+code) {
		t.Errorf("the problem is %+v, want code %s", doc, code)
	}
}

// wantNoSecretInLog checks that a log holds none, and that there is one.
func (s *site) wantNoSecretInLog() {
	s.t.Helper()
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	if len(log) == 0 {
		s.t.Error("the log is empty")
	}
	for _, secret := range allSecrets {
		if i := bytes.Index(log, []byte(secret)); i >= 0 {
			s.t.Errorf("the log holds a secret: …%s…", log[max(0, i-300):min(len(log), i+100)])
		}
	}
}

// restart stops the site and starts it again, as a new process would find it.
func (s *site) restart(directives string) {
	s.t.Helper()
	if err := caddy.Stop(); err != nil {
		s.t.Fatal(err)
	}
	s.client.CloseIdleConnections()
	s.load(directives)
	s.trust()
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// options are those of a site with one node, named node-1.
func options(node *backend, more string) string {
	return fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		%s
	}`, node.URL, more)
}

// brokerOption adds a broker.
func brokerOption(broker *backend) string {
	return fmt.Sprintf("broker %s {env.BROKER_SECRET}", broker.URL)
}

const pair = "/task?appServerID=node-1&taskID=t1"

// goGet asks like get, and gives the answer when there is one.
func (s *site) goGet(path string, header ...string) <-chan reply {
	answer := make(chan reply, 1)
	go func() {
		r, err := s.try(s.t.Context(), http.MethodGet, path, append(header, "Authorization: Bearer "+callerSecret)...)
		if err != nil {
			s.t.Error(err)
		}
		answer <- r
	}()
	return answer
}

// plain is a reply's body without its encoding.
func (r reply) plain(t testing.TB) string {
	t.Helper()
	if r.header.Get("Content-Encoding") == "" {
		return string(r.body)
	}
	zr, err := gzip.NewReader(bytes.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(zr)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

// accessLog is the line of the request that was made with a User-Agent.
func (s *site) accessLog(userAgent string) map[string]any {
	s.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		log, err := os.ReadFile(s.logFile())
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(string(log)) {
			var fields map[string]any
			if strings.Contains(line, userAgent) && json.Unmarshal([]byte(line), &fields) == nil && fields["msg"] == "handled request" {
				return fields
			}
		}
	}
	s.t.Fatalf("no access log of %s", userAgent)
	return nil
}

// logged are the lines of the log with a message.
func (s *site) logged(message string) (lines []map[string]any) {
	s.t.Helper()
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) == nil && strings.Contains(fields["msg"].(string), message) {
			lines = append(lines, fields)
		}
	}
	return lines
}

// process is a Caddy of its own, which is this test binary.
type process struct {
	*site
	cmd *exec.Cmd
}

// startProcess runs a site in a process of its own, with a storage folder that others may share.
func startProcess(t *testing.T, shared, directives string) *process {
	t.Helper()
	s := &site{t: t, port: freePort(t), dir: t.TempDir()}
	s.base = fmt.Sprintf("https://localhost:%d", s.port)
	config := filepath.Join(s.dir, "Caddyfile")
	text := s.caddyfile(strings.ReplaceAll(directives, "SHARED", filepath.ToSlash(shared)))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &process{site: s, cmd: exec.Command(os.Args[0], "run", "--config", config)}
	p.cmd.Env = append(os.Environ(), beCaddy+"=1", "XDG_DATA_HOME="+s.dir, "XDG_CONFIG_HOME="+s.dir)
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	p.trust()
	return p
}

// kill ends the process at once, as kill -9 does.
func (p *process) kill() {
	p.client.CloseIdleConnections()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatalf("waited too long for %s", what)
	}
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return filepath.ToSlash(name)
}
