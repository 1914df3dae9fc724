package cluster_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
	_ "github.com/caddy-fsbroker/caddy-fsbroker/examples/cluster/internal/redisstorage"
	"github.com/caddy-fsbroker/caddy-fsbroker/examples/cluster/internal/redistest"
	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// beCaddy is the environment variable that makes this test binary run as Caddy with the module and the test's storage.
const beCaddy = "FSBROKER_TEST_BE_CADDY"

func TestMain(m *testing.M) {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	flag.Parse()
	_ = flag.Set("test.parallel", "10") // they mostly wait
	m.Run()
}

// caddyfile is the example that the instances run.
const caddyfile = "Caddyfile.redis"

// cluster is what several instances of Caddy share: a Redis database, a broker and two nodes.
type cluster struct {
	t       *testing.T
	ctx     context.Context // of requests
	redis   *redistest.Server
	secrets map[string]string // by environment variable
	env     []string          // of the instances
	pinned  *http.Client      // for the nodes and the broker
	timing  timing

	broker, node1, node2 upstream
	stopBroker           context.CancelFunc
}

// timing is how long a node takes for a task, and how long it and the broker keep one that is finished.
type timing struct{ analysis, forget time.Duration }

// upstream is a server that can be away, that can forget everything, and that counts the questions for reports.
type upstream struct {
	url, address string
	tls          *tls.Config
	servers      *backend.Servers
	handler      atomic.Pointer[http.Handler]

	mu    sync.Mutex
	asked map[question]int
}

// question is a question for one of the two reports of a submission. Nodes are not asked by submission.
type question struct {
	submitID string
	all      bool
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if query := r.URL.Query(); r.URL.Path == "/task" {
		u.mu.Lock()
		u.asked[question{query.Get("submitID"), query.Get("all") == "true"}]++
		u.mu.Unlock()
	}
	(*u.handler.Load()).ServeHTTP(w, r)
}

// questions returns how often each report was asked for so far.
func (u *upstream) questions() map[question]int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return maps.Clone(u.asked)
}

// start lets the upstream listen.
func (u *upstream) start(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp", u.address)
	if err != nil {
		t.Fatal(err)
	}
	u.servers = &backend.Servers{TLS: u.tls}
	u.url = u.servers.Serve(listener, u)
}

// stop closes the listener and all connections, until start.
func (u *upstream) stop() { u.servers.Stop() }

// newCluster starts Redis, the nodes and the broker. They run until the test ends, beside those of other tests. The nodes
// finish a task at once, and keep it. The options are for Redis.
func newCluster(t *testing.T, options ...string) *cluster {
	t.Helper()
	return newTimedCluster(t, timing{forget: time.Hour}, options...)
}

// newTimedCluster is like newCluster, but the nodes take their time.
func newTimedCluster(t *testing.T, timing timing, options ...string) *cluster {
	t.Helper()
	t.Parallel()
	c := &cluster{t: t, ctx: testenv.Context(t), redis: redistest.Start(t, options...), timing: timing}
	c.secrets = map[string]string{"REDIS_PASSWORD": c.redis.Password}
	for _, name := range []string{"PORTAL_SECRET", "NODE_1_SECRET", "NODE_2_SECRET", "BROKER_SECRET"} {
		c.secrets[name] = rand.Text()
	}
	certificate, err := backend.NewCertificate()
	if err != nil {
		t.Fatal(err)
	}
	pem := filepath.Join(t.TempDir(), "upstreams.crt")
	if err := os.WriteFile(pem, certificate.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	c.pinned = certificate.Client()
	t.Cleanup(c.pinned.CloseIdleConnections)

	for _, u := range []*upstream{&c.broker, &c.node1, &c.node2} {
		u.address, u.tls = fmt.Sprintf("127.0.0.1:%d", testenv.Port(t)), certificate.ServerConfig()
		u.asked = make(map[question]int)
		u.start(t)
		t.Cleanup(u.stop)
	}
	c.forget()
	t.Cleanup(func() { c.stopBroker() })

	c.env = append(testenv.Home(t.TempDir()),
		beCaddy+"=1", "REDIS_ADDRESS="+c.redis.Address, "UPSTREAMS_CRT="+pem,
		"BROKER="+c.broker.address, "NODE_1="+c.node1.address, "NODE_2="+c.node2.address)
	for name, secret := range c.secrets {
		c.env = append(c.env, name+"="+secret)
	}
	return c
}

// forget makes the nodes and the broker forget everything, as they do when they restart.
func (c *cluster) forget() {
	node1 := backend.NewNode(c.secrets["NODE_1_SECRET"], c.timing.analysis, c.timing.forget)
	node2 := backend.NewNode(c.secrets["NODE_2_SECRET"], c.timing.analysis, c.timing.forget)
	broker := backend.NewBroker(c.secrets["BROKER_SECRET"],
		backend.NodeRef{AppServerID: "node-1", Address: c.node1.url, Secret: c.secrets["NODE_1_SECRET"]},
		backend.NodeRef{AppServerID: "node-2", Address: c.node2.url, Secret: c.secrets["NODE_2_SECRET"]})
	broker.NodeClient, broker.Forget = c.pinned, c.timing.forget
	for u, handler := range map[*upstream]http.Handler{&c.node1: node1, &c.node2: node2, &c.broker: broker} {
		u.handler.Store(&handler)
	}
	if c.stopBroker != nil {
		c.stopBroker()
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.stopBroker = cancel
	go broker.Run(ctx)
}

// scan gives a file to a node, and returns the path of its report.
func (c *cluster) scan(node int, file []byte) (path string, err error) {
	u := map[int]*upstream{1: &c.node1, 2: &c.node2}[node]
	var answer struct {
		ScanTasks []struct{ TaskReference struct{ ID string } }
	}
	if err := c.upload(u.url+"/scan", c.secrets[fmt.Sprintf("NODE_%d_SECRET", node)], file, &answer); err != nil {
		return "", err
	}
	return fmt.Sprintf("/task?appServerID=node-%d&taskID=%s", node, answer.ScanTasks[0].TaskReference.ID), nil
}

// mustScan is like scan, and fails the test at once on an error.
func (c *cluster) mustScan(node int, file []byte) (path string) {
	c.t.Helper()
	path, err := c.scan(node, file)
	if err != nil {
		c.t.Fatal(err)
	}
	return path
}

// submit submits a file to the broker, and returns the path of its report, which is finished.
func (c *cluster) submit(file []byte) (path string) {
	c.t.Helper()
	id, err := c.submitTo(c.broker.url, c.secrets["BROKER_SECRET"], file)
	if err != nil {
		c.t.Fatal(err)
	}
	path = "/task?submitID=" + id
	// The broker hands the file to a node in its own time.
	eventually(c.t, "the submission's report", func() bool { return c.askBroker(path) == http.StatusOK })
	return path
}

// askBroker asks the broker itself for a report, and returns the status of the answer.
func (c *cluster) askBroker(path string) (status int) {
	c.t.Helper()
	resp, err := c.pinned.Get(c.broker.url + path + "&secret=" + c.secrets["BROKER_SECRET"])
	if err != nil {
		c.t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// submitTo submits a file to the broker, or through an instance, and returns the submission. Any goroutine may call it.
func (c *cluster) submitTo(url, secret string, file []byte) (id string, err error) {
	var answer struct{ AcceptedFiles []struct{ ID string } }
	if err := c.upload(url+"/submit", secret, file, &answer); err != nil {
		return "", err
	}
	if len(answer.AcceptedFiles) != 1 {
		return "", fmt.Errorf("%d files are accepted, want 1", len(answer.AcceptedFiles))
	}
	return answer.AcceptedFiles[0].ID, nil
}

func (c *cluster) upload(url, secret string, file []byte, answer any) error {
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("file", "sample.txt")
	if err != nil {
		return err
	}
	if _, err := part.Write(file); err != nil {
		return err
	}
	if err := writer.Close(); err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(c.ctx, http.MethodPost, url, &form)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", writer.FormDataContentType())
	req.Header.Set("secret", secret)
	resp, err := c.pinned.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("%s: %s: %s", url, resp.Status, body)
	}
	return json.NewDecoder(resp.Body).Decode(answer)
}

// text returns a file of random text, which compresses badly.
func text(lines int) []byte {
	var file strings.Builder
	for range lines {
		for range 8 {
			file.WriteString(rand.Text())
		}
		file.WriteByte(0)
	}
	return []byte(file.String())
}

// instance is a Caddy that runs in a process of its own.
type instance struct {
	c           *cluster
	site, admin string // URLs
	cmd         *exec.Cmd
	args        []string
	env         []string
	directives  []string
	log         string // the name of the file
	client      *http.Client
}

// start starts an instance. The options of the cache replace the retention in the example's Caddyfile.
func (c *cluster) start(options ...string) *instance {
	c.t.Helper()
	return c.startWith(nil, options...)
}

// startWith is like start, and adds directives to fsbroker_task.
func (c *cluster) startWith(directives []string, options ...string) *instance {
	c.t.Helper()
	dir := c.t.TempDir()
	i := &instance{
		c: c, directives: directives, log: filepath.Join(dir, "log"),
		client: &http.Client{Transport: new(http.Transport)},
	}
	site, admin := fmt.Sprintf("127.0.0.1:%d", testenv.Port(c.t)), fmt.Sprintf("127.0.0.1:%d", testenv.Port(c.t))
	i.site, i.admin = "http://"+site, "http://"+admin
	i.env = slices.Concat(c.env, testenv.Home(dir), []string{"FSBROKER_SITE=" + i.site, "CADDY_ADMIN=" + admin})
	i.args = []string{"run", "--config", filepath.Join(dir, "Caddyfile")}
	i.configure(options...)
	c.t.Cleanup(func() {
		i.kill()
		i.checkLog()
	})
	i.run()
	return i
}

// configure writes the Caddyfile.
func (i *instance) configure(options ...string) {
	i.c.t.Helper()
	config, err := os.ReadFile(caddyfile)
	if err != nil {
		i.c.t.Fatal(err)
	}
	replace := func(line string, lines []string) {
		if n := bytes.Count(config, []byte("\t"+line+"\n")); n != 1 {
			i.c.t.Fatalf("%s has %d lines with %q", caddyfile, n, line)
		}
		if len(lines) > 0 {
			config = bytes.Replace(config, []byte(line), []byte(strings.Join(lines, "\n\t\t\t")), 1)
		}
	}
	replace("retention 90d", options)
	replace("harvest", append([]string{"harvest"}, i.directives...))
	if err := os.WriteFile(i.args[2], config, 0o600); err != nil {
		i.c.t.Fatal(err)
	}
}

// run runs the instance again after stop or kill.
func (i *instance) run() {
	i.c.t.Helper()
	log, err := os.OpenFile(i.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		i.c.t.Fatal(err)
	}
	defer log.Close()
	i.cmd = exec.Command(os.Args[0], i.args...)
	i.cmd.Env, i.cmd.Stdout, i.cmd.Stderr = i.env, log, log
	if err := i.cmd.Start(); err != nil {
		i.c.t.Fatal(err)
	}
	eventually(i.c.t, "Caddy to start", func() bool {
		resp, err := i.client.Get(i.site)
		if err != nil {
			return false
		}
		return resp.Body.Close() == nil
	})
}

// stop stops the instance as systemd does, and waits until it has ended.
func (i *instance) stop() {
	i.c.t.Helper()
	i.terminate()
	i.wait()
}

// terminate begins to stop the instance.
func (i *instance) terminate() {
	i.client.CloseIdleConnections()
	_ = i.cmd.Process.Signal(syscall.SIGTERM)
}

// wait waits until the instance has ended.
func (i *instance) wait() {
	i.c.t.Helper()
	if err := i.cmd.Wait(); err != nil {
		i.c.t.Errorf("Caddy ended with %v", err)
	}
}

// kill ends the instance at once, like kill -9.
func (i *instance) kill() {
	i.client.CloseIdleConnections()
	_ = i.cmd.Process.Kill()
	_ = i.cmd.Wait()
}

// checkLog checks that no secret is logged. If the test has failed, it shows what the module has logged, and all errors.
func (i *instance) checkLog() {
	log, err := os.ReadFile(i.log)
	if err != nil {
		i.c.t.Fatal(err)
	}
	for name, secret := range i.c.secrets {
		if bytes.Contains(log, []byte(secret)) {
			i.c.t.Errorf("%s is logged", name)
		}
	}
	if i.c.t.Failed() {
		for line := range bytes.Lines(log) {
			if bytes.Contains(line, []byte(`"logger":"fsbroker"`)) || bytes.Contains(line, []byte(`"level":"error"`)) || line[0] != '{' {
				i.c.t.Logf("%s: %s", i.site, line)
			}
		}
	}
}

// response is an HTTP response with its body.
type response struct {
	status int
	header http.Header
	body   string
	took   time.Duration
}

// get requests a report. Any goroutine may call it.
func (i *instance) get(path string) (r response, err error) {
	return i.do(http.MethodGet, i.site+path)
}

// getKept is like get, but asks no upstream.
func (i *instance) getKept(path string) (r response, err error) {
	return i.do(http.MethodGet, i.site+path, "Cache-Control: only-if-cached")
}

func (i *instance) do(method, url string, headers ...string) (r response, err error) {
	req, err := http.NewRequestWithContext(i.c.ctx, method, url, nil)
	if err != nil {
		return r, err
	}
	req.Header.Set("Authorization", "Bearer "+i.c.secrets["PORTAL_SECRET"])
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		req.Header.Set(name, value)
	}
	begin := time.Now()
	resp, err := i.client.Do(req)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return response{resp.StatusCode, resp.Header, string(body), time.Since(begin)}, err
}

// want requests a report, which must have the wanted status, and come from where it is wanted to.
func (i *instance) want(path string, status int, from string) response {
	i.c.t.Helper()
	r, err := i.get(path)
	if err != nil {
		i.c.t.Fatal(err)
	}
	if got, _ := strings.CutSuffix(r.header.Get("Cache-Status"), "; stored"); r.status != status || from != "" && got != from {
		i.c.t.Errorf("%s: status %d, want %d, Cache-Status %q, want %q: %.200s", path, r.status, status, got, from, r.body)
	}
	return r
}

// Where a report comes from, as Cache-Status says.
const (
	fromNode    = "fsbroker; fwd=uri-miss"
	fromMemory  = "fsbroker; hit"
	fromStorage = "fsbroker; hit; detail=storage"
	fromNowhere = "" // not checked
)

// collect requests reports for the first time, and returns them by path.
func (i *instance) collect(paths ...string) map[string]string {
	i.c.t.Helper()
	reports := make(map[string]string)
	for _, path := range paths {
		reports[path] = i.want(path, http.StatusOK, fromNode).body
	}
	return reports
}

// wantAll checks that all reports come from the storage, byte for byte.
func (i *instance) wantAll(reports map[string]string) {
	i.c.t.Helper()
	for path, body := range reports {
		if r := i.want(path, http.StatusOK, fromStorage); r.body != body {
			i.c.t.Errorf("%s: another report: %.200s", path, r.body)
		}
	}
}

// queue is the queue to the storage, as the admin API shows it.
type queue struct {
	Queued  int
	Failing bool
}

func (i *instance) queue() queue {
	i.c.t.Helper()
	r, err := i.do(http.MethodGet, i.admin+"/fsbroker/cache")
	if err != nil {
		i.c.t.Fatal(err)
	}
	var caches map[string]struct{ Storage queue }
	if err := json.Unmarshal([]byte(r.body), &caches); err != nil {
		i.c.t.Fatal(err)
	}
	return caches["default"].Storage
}

// wantStored waits until nothing is queued for the storage.
func (i *instance) wantStored() {
	i.c.t.Helper()
	eventually(i.c.t, "the queue to be empty", func() bool { return i.queue().Queued == 0 })
}

// values returns the keys in Redis of the reports and the references to them.
func (c *cluster) values() []string {
	return c.redis.Keys("fsbroker/fsbroker_task/default/[0-9a-f][0-9a-f][0-9a-f]/*")
}

// logged reports whether the instance has logged a text.
func (i *instance) logged(text string) bool {
	log, err := os.ReadFile(i.log)
	if err != nil {
		i.c.t.Fatal(err)
	}
	return bytes.Contains(log, []byte(text))
}

// eventually waits until done returns true. It looks less often than others: these tests run beside each other.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	testenv.Eventually(t, what, func() bool {
		if done() {
			return true
		}
		time.Sleep(50 * time.Millisecond)
		return false
	})
}
