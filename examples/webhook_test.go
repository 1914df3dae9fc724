package examples_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// TestWebhook submits a file, which nobody asks for. The webhook is sent once for it, with its IDs and its hash, and is tried
// again if the server fails. A restart sends nothing again.
func TestWebhook(t *testing.T) {
	t.Parallel()
	hook := startHook(t)
	hook.answers = []int{http.StatusServiceUnavailable, http.StatusNoContent}
	s := startNotifying(t, hook.server.URL+"/hook")
	id := s.submit(t, `"; touch pwned #.txt`, "a file")
	s.wantNothingPending(t)
	want := map[string]string{"event": "fsbroker_report_finished", "namespace": "default", "client": "portal", "submit_id": id, "sha256": sumOf("a file")}
	for n, body := range hook.wantBodies(t, 2) {
		var got map[string]string
		if err := json.Unmarshal([]byte(body), &got); err != nil || !maps.Equal(got, want) {
			t.Errorf("message %d is %s, want %v", n, body, want)
		}
	}

	s.stop(t)
	s.run(t)
	another := s.submit(t, "another.txt", "another file")
	s.wantNothingPending(t)
	if bodies := hook.wantBodies(t, 3); !strings.Contains(bodies[2], another) {
		t.Errorf("the last message is %s, want that of %s", bodies[2], another)
	}
}

// TestWebhookIsSentAgain kills Caddy before the server has accepted the message. The next process sends the same again.
func TestWebhookIsSentAgain(t *testing.T) {
	t.Parallel()
	hook, hang, s := startHanging(t)
	s.caddy.kill() // like kill -9
	close(hang)
	s.run(t)
	hook.await(t, 1)
	s.wantNothingPending(t)
	if bodies := hook.wantBodies(t, 2); bodies[0] != bodies[1] {
		t.Errorf("the messages differ: %q", bodies)
	}
}

// TestWebhookDuringReload reloads the configuration before the server has accepted the message.
func TestWebhookDuringReload(t *testing.T) {
	t.Parallel()
	hook, hang, s := startHanging(t)
	s.reload(t)
	close(hang)
	s.wantNothingPending(t)
	hook.wantBodies(t, 1)
	s.stop(t)
	if strings.Contains(s.caddy.log.String(), `"level":"error"`) {
		t.Error("an error is logged")
	}
}

// TestWebhookIsRefused sends a message that the server does not want. That is logged, without the URL, which may be a secret.
func TestWebhookIsRefused(t *testing.T) {
	t.Parallel()
	hook := startHook(t)
	hook.answers = []int{http.StatusNotFound}
	url := filepath.Join(t.TempDir(), "url")
	writeFile(t, url, hook.server.URL+"/"+configuredMark+"hook\n")
	s := startNotifying(t, "{file."+url+"}")
	s.submit(t, "file.txt", "a file")
	s.wantNothingPending(t)
	hook.wantBodies(t, 1)
	s.caddy.waitFor("the webhook was not accepted: the server answered 404")
	s.stop(t)
	hook.server.Close()
	s.setTimeout(t, time.Second)
	s.run(t)
	s.submit(t, "another.txt", "another file")
	s.wantNothingPending(t)
	s.caddy.waitFor("connection refused")
}

// TestWebhookIsWrong loads configurations that cannot work.
func TestWebhookIsWrong(t *testing.T) {
	t.Parallel()
	for options, want := range map[string]string{
		"webhook":                                   "wrong argument count",
		"webhook https://a https://b":               "wrong argument count",
		"webhook http://a/" + plantedMark:           "the URL must begin with https://",
		"webhook {file./does/not/exist}":            "the URL:",
		"webhook https://a {\n token {env.NONE}\n}": "the token:",
		"webhook https://a {\n timeout 5\n}":        "timeout must be a duration",
		"webhook https://a {\n timeout 5ms\n}":      "timeout must be 1s or more",
		"webhook https://a {\n name x\n}":           "unknown option name",
	} {
		path := filepath.Join(t.TempDir(), "Caddyfile")
		writeFile(t, path, "{\nevents {\non fsbroker_report_finished "+options+"\n}\n}\n")
		output, err := caddyCommand(t, nil, "validate", "--config", path).CombinedOutput()
		if err == nil || !bytes.Contains(output, []byte(want)) || bytes.Contains(output, []byte(plantedMark)) {
			t.Errorf("%s: %v, want %q: %s", options, err, want, output)
		}
	}
}

// hook is a server that gets messages.
type hook struct {
	server  *httptest.Server
	answers []int           // the statuses of the first responses; then 200
	hang    <-chan struct{} // each response waits for it

	mu     sync.Mutex
	bodies []string
	got    chan struct{} // has a value for each message
}

// hookToken is the token of the example. It has the form of the other secrets.
const hookToken = configuredMark + "WEBHOOK_TOKEN"

func startHook(t *testing.T) *hook {
	t.Helper()
	if runtime.GOOS == "windows" || runtime.GOOS == "darwin" {
		t.Skip("Go reads SSL_CERT_FILE on other systems only")
	}
	h := &hook{got: make(chan struct{}, 100)}
	h.server = startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" || r.Header.Get("Authorization") != "Bearer "+hookToken {
			t.Errorf("the hook got %s %v, %v", r.Method, r.Header, err)
		}
		h.mu.Lock()
		h.bodies = append(h.bodies, string(body))
		status, hang := http.StatusOK, h.hang
		if len(h.answers) > 0 {
			status, h.answers = h.answers[0], h.answers[1:]
		}
		h.mu.Unlock()
		h.got <- struct{}{}
		if hang != nil {
			<-hang
		}
		w.WriteHeader(status)
	})
	return h
}

// await waits for messages.
func (h *hook) await(t *testing.T, n int) {
	t.Helper()
	for range n {
		select {
		case <-h.got:
		case <-testenv.Context(t).Done():
			t.Fatal("the webhook is not sent")
		}
	}
}

// wantBodies returns the messages, whose number must be as wanted. None of them has a secret.
func (h *hook) wantBodies(t *testing.T, n int) []string {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.bodies) != n {
		t.Fatalf("the hook got %q, want %d messages", h.bodies, n)
	}
	if all := strings.Join(h.bodies, ""); strings.Contains(all, configuredMark) || strings.Contains(all, ".txt") {
		t.Errorf("a secret or the name of the file is in %q", h.bodies)
	}
	return h.bodies
}

// notifying is a Caddy that runs the example, in front of the example backend.
type notifying struct {
	site, admin string // URLs
	config      string // the file
	env         []string
	caddy       *process
	secrets     map[string]string
}

// startHanging starts a site whose webhook hangs until the channel is closed, and waits for its first message.
func startHanging(t *testing.T) (*hook, chan<- struct{}, *notifying) {
	t.Helper()
	hang := make(chan struct{})
	hook := startHook(t)
	hook.hang = hang
	s := startNotifying(t, hook.server.URL+"/hook")
	s.submit(t, "file.txt", "a file")
	hook.await(t, 1)
	return hook, hang, s
}

func startNotifying(t *testing.T, url string) *notifying {
	t.Helper()
	const nodeSecret = configuredMark + "node"
	node := startUpstream(t, backend.NewNode(nodeSecret, 0, time.Hour).ServeHTTP)
	broker := backend.NewBroker(configuredMark+"BROKER_SECRET", backend.NodeRef{AppServerID: "node-1", Address: node.URL, Secret: nodeSecret})
	broker.NodeClient = certificate().Client()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { broker.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	server := startUpstream(t, broker.ServeHTTP)

	dir, admin := t.TempDir(), freeAddress(t)
	s := &notifying{site: "http://" + freeAddress(t), admin: "http://" + admin}
	pem := filepath.Join(dir, "hook.crt")
	writeFile(t, pem, string(certificate().PEM))
	adapted := caddy(t, []string{
		"SITE=" + s.site, "WEBHOOK_URL=" + url, "BROKER=" + strings.TrimPrefix(server.URL, "https://"), "FSBROKER_SHARED=" + filepath.ToSlash(dir) + "/reports",
	}, "adapt", "--config", absolute(t, "webhook/Caddyfile"))
	if strings.HasPrefix(url, "{file.") { // it has its own secret
		adapted = bytes.Replace(adapted, []byte(url), []byte("$URL"), 1)
	}
	s.config, s.secrets = withSecrets(t, adapted)
	writeFile(t, s.config, strings.Replace(string(readFile(t, s.config)), "$URL", url, 1))
	s.env = []string{"XDG_DATA_HOME=" + dir, "CADDY_ADMIN=" + admin, "SSL_CERT_FILE=" + pem}
	s.setTimeout(t, time.Hour) // no test fails because the machine is slow
	s.run(t)
	return s
}

// setTimeout sets the timeout of the webhook for the next run.
func (s *notifying) setTimeout(t *testing.T, timeout time.Duration) {
	t.Helper()
	config := string(readFile(t, s.config))
	changed := webhookTimeout.ReplaceAllString(config, fmt.Sprintf("${1}%d", timeout))
	if changed == config {
		t.Fatalf("the timeout is not in %s", config)
	}
	writeFile(t, s.config, changed)
}

var webhookTimeout = regexp.MustCompile(`("timeout":)\d+`)

// run runs Caddy, again after stop or kill.
func (s *notifying) run(t *testing.T) {
	t.Helper()
	s.caddy = startCaddy(t, s.env, s.config)
}

// stop stops Caddy in good order.
func (s *notifying) stop(t *testing.T) {
	t.Helper()
	if _, err := http.Post(s.admin+"/stop", "", nil); err != nil {
		t.Fatal(err)
	}
	s.caddy.wantEnd()
}

// reload makes Caddy load the same configuration again.
func (s *notifying) reload(t *testing.T) {
	t.Helper()
	request, err := http.NewRequestWithContext(testenv.Context(t), http.MethodPost, s.admin+"/load", bytes.NewReader(readFile(t, s.config)))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Cache-Control", "must-revalidate") // although it is the same
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Fatalf("loading: %s", response.Status)
	}
}

// submit submits a file and returns the submission's ID.
func (s *notifying) submit(t *testing.T, name, content string) string {
	t.Helper()
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("file", name)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(part, content)
	writer.Close()
	request, err := http.NewRequestWithContext(testenv.Context(t), http.MethodPost, s.site+"/submit", &form)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", writer.FormDataContentType())
	request.Header.Set("Authorization", "Bearer "+s.secrets["PORTAL_SECRET"])
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var answer struct{ AcceptedFiles []struct{ ID string } }
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil || len(answer.AcceptedFiles) != 1 {
		t.Fatalf("%s: %v", response.Status, err)
	}
	return answer.AcceptedFiles[0].ID
}

// wantNothingPending waits until nothing is followed any more. Then nothing is sent any more.
func (s *notifying) wantNothingPending(t *testing.T) {
	t.Helper()
	s.caddy.eventually("nothing is pending", func() bool {
		return strings.TrimSpace(get(t, s.admin+"/fsbroker/harvest", "", "").body) == `{"default":[]}`
	})
}

// sumOf returns the SHA-256 sum of a file.
func sumOf(file string) string {
	sum := sha256.Sum256([]byte(file))
	return hex.EncodeToString(sum[:])
}
