package fsbroker_test

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// The secrets of the tests. Configurations have them as placeholders, since Caddy logs a whole configuration at debug
// level. No response and no log may hold any of them.
const (
	callerSecret = "the-callers-own-secret"
	nodeSecret   = "the-nodes-own-secret"
	brokerSecret = "the-brokers-own-secret"
)

var allSecrets = []string{callerSecret, nodeSecret, brokerSecret}

// site is a Caddy that serves the handler over TLS.
type site struct {
	t      testing.TB
	base   string
	client *http.Client
	socket *testsite.Socket
	bind   string // the socket, as Caddy knows it
	dir    string // has its storage and its log
	plain  bool   // without TLS
	global string // more global options
	grace  string // the grace period; by default 5s
}

// newSiteIn returns a site without a Caddy.
func newSiteIn(t testing.TB, dir string) *site {
	t.Helper()
	s := &site{t: t, socket: newSocket(t), dir: dir}
	s.bind, s.base = s.socket.Bind, fmt.Sprintf("https://localhost:%d", s.socket.Port)
	if bubble != nil {
		s.servePlainly()
		s.global = "pipes"
	}
	return s
}

// in returns the site for a subtest, so that the subtest reports what fails.
func (s *site) in(t testing.TB) *site {
	sub := *s
	sub.t = t
	return &sub
}

// startSite runs Caddy with directives in a site, until the test ends.
func startSite(t testing.TB, directives string) *site {
	t.Helper()
	s := newSite(t)
	s.load(directives)
	s.trust()
	return s
}

// newSite returns a site that does not run yet. The site stops at the end of the test.
func newSite(t testing.TB) *site {
	t.Helper()
	if err := caddy.Stop(); err != nil { // a test may start one site after another
		t.Fatal(err)
	}
	s := newSiteIn(t, storageDir(t))
	t.Cleanup(func() {
		s.showLog()
		if s.client != nil {
			s.client.CloseIdleConnections()
		}
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// servePlainly makes the site serve plain HTTP.
func (s *site) servePlainly() {
	s.plain, s.base = true, strings.Replace(s.base, "https:", "http:", 1)
}

// load loads a configuration with directives. If the site runs already, this is a reload.
func (s *site) load(directives string) {
	s.t.Helper()
	if err := s.tryLoad(directives); err != nil {
		s.t.Fatal(err)
	}
}

// tryLoad is like load, and returns the error.
func (s *site) tryLoad(directives string) error {
	return testsite.Load([]byte(s.caddyfile(directives)))
}

// caddyfile returns a Caddyfile that has the directives in its one site. It needs nothing of the machine.
func (s *site) caddyfile(directives string) string {
	s.t.Helper()
	certificate := ""
	if !s.plain {
		certificate = "tls " + s.write("cert.pem", testsite.Localhost().PEM) + " " + s.write("key.pem", testsite.Localhost().Key)
	}
	return fmt.Sprintf(`{
	admin off
	%[8]s
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage folder %[1]s
	grace_period %[7]s
	log {
		output file %[2]s {
			roll_disabled
		}
		level DEBUG
		format fsbroker
	}
}

%[3]s {
	bind %[6]s {
		protocols h1 h2
	}
	%[5]s
	log
	%[4]s
}`, filepath.ToSlash(s.dir), filepath.ToSlash(s.logFile()), s.base, directives, certificate, s.bind, cmp.Or(s.grace, "5s"), s.global)
}

// showLog shows what the site has logged last if the test has failed.
func (s *site) showLog() {
	if !s.t.Failed() {
		return
	}
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Log(err)
	}
	lines := slices.Collect(strings.Lines(string(log)))
	s.t.Logf("the end of the site's log:\n%s", strings.Join(lines[max(0, len(lines)-40):], ""))
}

// write writes a file into the site's folder, and returns its path.
func (s *site) write(name string, content []byte) string {
	s.t.Helper()
	name = filepath.Join(s.dir, name)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return filepath.ToSlash(name)
}

func (s *site) logFile() string { return filepath.Join(s.dir, "caddy.log") }

// trust gives the site a client that trusts it, and waits until the site responds.
func (s *site) trust() {
	s.t.Helper()
	if s.client == nil {
		transport := &http.Transport{
			DialContext:         s.dialContext,
			DisableCompression:  true, // tests set Accept-Encoding themselves
			MaxIdleConnsPerHost: 300,
		}
		if !s.plain { // in a bubble, the certificate would be made in another time
			transport.TLSClientConfig = testsite.ClientConfig()
		}
		s.client = &http.Client{Transport: transport}
		if deadline, ok := patience(s.t).Deadline(); ok {
			s.client.Timeout = time.Until(deadline)
		}
	}
	// Another process takes a moment to start.
	eventually(s.t, "the site to respond", func() bool {
		resp, err := s.client.Get(s.base + "/warm-up")
		if err == nil {
			_ = resp.Body.Close()
		}
		return err == nil
	})
}

// dialContext connects to the site, whatever the address.
func (s *site) dialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	return dial(ctx, "tcp", s.socket.Address)
}

// dialSlow is like dialContext, for a connection with a small buffer: what a caller does not read is held by the site, and not by
// the kernel.
func (s *site) dialSlow(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := s.dialContext(ctx, network, address)
	if err == nil {
		err = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	}
	return conn, err
}

// send sends a request, again if it fails for a reason that lies neither in the request nor in the module:
//
//   - During a reload, Caddy may close a connection that it has only just accepted, before it reads a request.
//   - net/http may offer a connection to a request while it cancels the one before, and fails both with the reason of that.
func send(client *http.Client, req *http.Request) (*http.Response, error) {
	resp, err := client.Do(req)
	for range 3 {
		if err == nil || req.Context().Err() != nil || !slices.ContainsFunc(notTheRequests, func(e error) bool { return errors.Is(err, e) }) {
			break
		}
		resp, err = client.Do(req)
	}
	return resp, err
}

var notTheRequests = []error{io.EOF, syscall.ECONNRESET, context.Canceled, context.DeadlineExceeded}

// reply is a response with its body.
type reply struct {
	status int
	header http.Header
	body   []byte
}

// get sends a GET request with the caller's secret. Header fields are written "Name: value". Like do, it must be called
// by the test's own goroutine: use goGet where a request has to be under way.
func (s *site) get(path string, header ...string) reply {
	s.t.Helper()
	return s.do(s.t.Context(), http.MethodGet, path, append(header, "Authorization: Bearer "+callerSecret)...)
}

// do sends a request with the given header fields, and fails the test at once on an error.
func (s *site) do(ctx context.Context, method, path string, header ...string) reply {
	s.t.Helper()
	r, err := s.try(ctx, method, path, header...)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// try is like do, and returns the error. Any goroutine may call it.
func (s *site) try(ctx context.Context, method, path string, header ...string) (reply, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.base+path, nil)
	if err != nil {
		return reply{}, err
	}
	for _, field := range header {
		name, value, _ := strings.Cut(field, ": ")
		req.Header.Add(name, value)
	}
	resp, err := send(s.client, req)
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
			s.t.Errorf("%s %s: the response holds a secret: %v %s", method, path, resp.Header, body)
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

// wantHeader checks a field of the header.
func (r reply) wantHeader(t *testing.T, name, want string) {
	t.Helper()
	if got := r.header.Get(name); got != want {
		t.Errorf("%s: %q, want %q", name, got, want)
	}
}

// wantProblem checks that the reply is a complete problem document.
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
	if bytes.Contains(r.body, []byte(`\u00`)) || bytes.HasSuffix(r.body, []byte("\n")) {
		t.Errorf("the problem is hard to read: %s", r.body)
	}
	if doc.Code != code || doc.Status != status || doc.Title != http.StatusText(status) || doc.Detail == "" || !strings.HasSuffix(doc.Type, "/docs/API.md#"+code) {
		t.Errorf("the problem is %+v, want code %s", doc, code)
	}
}

// wantNoSecretInLog checks that the log is not empty and holds no secret.
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

// restart stops the site and starts it again, with an empty memory.
func (s *site) restart(directives string) {
	s.t.Helper()
	if err := caddy.Stop(); err != nil {
		s.t.Fatal(err)
	}
	if bubble != nil {
		synctest.Wait() // for the server, which caddy.Stop does not wait for: it may still accept a connection
	}
	s.client.CloseIdleConnections()
	s.load(directives)
	s.trust()
}

// options returns the directive for one node, named node-1, with more options.
func options(node *backend, more string) string {
	return fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		%s
	}`, node.URL, more)
}

// brokerOption returns the option that adds a broker.
func brokerOption(broker *backend) string {
	return fmt.Sprintf("broker %s {env.BROKER_SECRET}", broker.URL)
}

// pair is the path of a task of the node of options.
const pair = "/task?appServerID=node-1&taskID=t1"

// goGet sends a request like get, in another goroutine. The channel has the reply when there is one.
func (s *site) goGet(path string, header ...string) <-chan reply {
	replies := make(chan reply, 1)
	go func() {
		r, err := s.try(s.t.Context(), http.MethodGet, path, append(header, "Authorization: Bearer "+callerSecret)...)
		if err != nil {
			s.t.Error(err)
		}
		replies <- r
	}()
	return replies
}

// getUntil sends a request like get until done accepts the reply, and returns that reply.
func (s *site) getUntil(path, what string, done func(reply) bool) (r reply) {
	s.t.Helper()
	eventually(s.t, what, func() bool {
		r = s.get(path)
		return done(r)
	})
	return r
}

// plain returns the body without its encoding. It must be called by the test's own goroutine.
func (r reply) plain(t testing.TB) string {
	t.Helper()
	plain, err := r.decoded()
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

// decoded is like plain, and returns the error.
func (r reply) decoded() (string, error) {
	if r.header.Get("Content-Encoding") == "" {
		return string(r.body), nil
	}
	zr, err := gzip.NewReader(bytes.NewReader(r.body))
	if err != nil {
		return "", err
	}
	plain, err := io.ReadAll(zr)
	return string(plain), err
}

// accessLog returns the access log's line for the request with a User-Agent.
func (s *site) accessLog(userAgent string) (fields map[string]any) {
	s.t.Helper()
	eventually(s.t, "the access log of "+userAgent, func() bool {
		for _, fields = range s.logged("handled request") {
			request, _ := fields["request"].(map[string]any)
			if strings.Contains(fmt.Sprint(request["headers"]), userAgent) {
				return true
			}
		}
		return false
	})
	return fields
}

// logged returns the lines of the log whose message contains the given text.
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

// waitLogged is like logged, but waits until there are n lines: those of the archive and the follower are written apart.
func (s *site) waitLogged(n int, message string) (lines []map[string]any) {
	s.t.Helper()
	eventually(s.t, "the log: "+message, func() bool {
		lines = s.logged(message)
		return len(lines) >= n
	})
	return lines
}

// process is a Caddy in another process, which runs this test binary.
type process struct {
	*site
	cmd *exec.Cmd
}

// startProcess runs a site in another process. In directives, SHARED stands for a storage folder that processes share.
func startProcess(t *testing.T, shared, directives string) *process {
	t.Helper()
	return startProcessWithGrace(t, shared, directives, "")
}

// startProcessWithGrace is like startProcess, with a grace period.
func startProcessWithGrace(t *testing.T, shared, directives, grace string) *process {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("a process of Windows inherits no sockets")
	}
	s := newSiteIn(t, t.TempDir())
	t.Cleanup(s.showLog)
	s.bind, s.grace = "fd/3", grace
	config := filepath.Join(s.dir, "Caddyfile")
	text := s.caddyfile(strings.ReplaceAll(directives, "SHARED", filepath.ToSlash(shared)))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return (&process{site: s}).again()
}

// again starts the process another time, with the same configuration and data directory.
func (p *process) again() *process {
	p.t.Helper()
	p = &process{site: p.site, cmd: exec.Command(os.Args[0], "run", "--config", filepath.Join(p.dir, "Caddyfile"))}
	p.cmd.Env = caddyEnv(p.dir)
	p.cmd.ExtraFiles = []*os.File{p.socket.File}
	p.cmd.Stderr = p.t.Output()
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(p.kill)
	p.trust()
	return p
}

// kill ends the process at once, like kill -9.
func (p *process) kill() {
	p.client.CloseIdleConnections()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// patience returns a context that ends when a test that waits gives up: in time before all tests end, and in a bubble after so
// long that nothing can be due any more.
func patience(t testing.TB) context.Context {
	t.Helper()
	if bubble == nil {
		return testenv.Context(t)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until done returns true. It must be called by the test's own goroutine.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for ctx := patience(t); !done(); time.Sleep(5 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// within waits for a value of c. It must be called by the test's own goroutine.
func within[T any](t testing.TB, what string, c <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-c:
	case <-patience(t).Done():
		t.Fatalf("waited too long for %s", what)
	}
	return value
}

// wantHeld waits until the handlers of this process hold that many requests: they wait for a call that is under way.
func wantHeld(t *testing.T, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d held requests", want), func() bool { return fsbroker.Held() == want })
}

// writeFile writes a file into a folder of its own, and returns its path.
func writeFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return filepath.ToSlash(name)
}
