// Package examples_test checks that the examples are formatted and valid, and runs some of them. It finds an example by
// the names of its files, Caddyfile and caddy.json.
package examples_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

func TestExamples(t *testing.T) {
	for _, path := range configs(t) {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			if filepath.Base(path) == "Caddyfile" {
				testCaddyfile(t, path)
			} else {
				validate(t, readFile(t, path))
			}
		})
	}
}

// configs returns the paths of all examples' configurations.
func configs(t *testing.T) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == "clients" {
			return fs.SkipDir // the tests in this folder run its configuration
		}
		if name := entry.Name(); name == "Caddyfile" || name == "caddy.json" {
			paths = append(paths, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func testCaddyfile(t *testing.T, path string) {
	caddy(t, nil, "fmt", absolute(t, path)) // fails if the formatting differs

	adapted := caddy(t, nil, "adapt", "--pretty", "--config", absolute(t, path))
	validate(t, adapted)

	twin := filepath.Join(filepath.Dir(path), "caddy.json")
	if _, err := os.Stat(twin); err != nil {
		return
	}
	if want := readFile(t, twin); !bytes.Equal(adapted, want) {
		t.Errorf("%s is not what %s adapts to: caddy adapt --pretty --config %[2]s >%[1]s", twin, path)
	}
}

// validate runs `caddy validate`, which provisions the configuration and resolves its secrets.
func validate(t *testing.T, config []byte) {
	t.Helper()
	path, _ := withSecrets(t, config)
	caddy(t, nil, "validate", "--config", path)
}

// placeholder matches {env.NAME} and {file./path/to/name}. The examples use these only for secrets.
var placeholder = regexp.MustCompile(`\{(?:env\.|file\.(?:[^}]*/)?)([^}/]+)\}`)

// withSecrets replaces every placeholder of a configuration with one for a file that contains a secret, and every pinned
// certificate with that of the tests' upstreams. It writes the configuration to a file. It returns the path of that file,
// and the secrets by the names of the variables and files.
func withSecrets(t *testing.T, config []byte) (path string, secrets map[string]string) {
	t.Helper()
	dir := t.TempDir()
	secrets = make(map[string]string)
	config = placeholder.ReplaceAllFunc(config, func(found []byte) []byte {
		name := string(placeholder.FindSubmatch(found)[1])
		secrets[name] = configuredMark + name
		file := filepath.Join(dir, name)
		writeFile(t, file, secrets[name]+"\n")
		return []byte("{file." + filepath.ToSlash(file) + "}")
	})
	pinned := filepath.Join(dir, "upstreams.crt")
	writeFile(t, pinned, string(certificate().PEM))
	config = pinnedFile.ReplaceAll(config, []byte(`${1}"`+filepath.ToSlash(pinned)+`"`))
	path = filepath.Join(dir, "caddy.json")
	writeFile(t, path, string(config))
	return path, secrets
}

// pinnedFile matches the first certificate file of a trust pool.
var pinnedFile = regexp.MustCompile(`("pem_files":\s*\[\s*)"[^"]*"`)

// certificate returns the certificate of the upstreams that the tests run.
var certificate = sync.OnceValue(func() *backend.Certificate {
	c, err := backend.NewCertificate()
	if err != nil {
		panic(err)
	}
	return c
})

// startUpstream starts a server with that certificate.
func startUpstream(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.TLS = certificate().ServerConfig()
	server.StartTLS()
	t.Cleanup(server.Close)
	return server
}

// TestProduction runs the production example with a domain that needs no certificate, and a broker. There are no nodes, so
// it sends only requests that do not reach them.
func TestProduction(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	env := []string{"FSBROKER_DOMAIN=http://" + address}
	broker := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Secret") != configuredMark+"broker" || strings.Contains(r.RequestURI, configuredMark) || r.Header.Get("Authorization") != "" {
			t.Errorf("the broker got %s %v", r.RequestURI, r.Header)
		}
		w.WriteHeader(http.StatusAccepted)
	})
	adapted := caddy(t, env, "adapt", "--config", absolute(t, "production/Caddyfile"))
	adapted = bytes.ReplaceAll(adapted, []byte("10.0.0.10:23001"), []byte(strings.TrimPrefix(broker.URL, "https://")))
	config, secrets := withSecrets(t, adapted)
	site := startCaddy(t, nil, config)

	for _, test := range []struct {
		path   string
		client string
		status int
	}{
		{"/task?submitID=1", "", http.StatusUnauthorized},
		{"/task?submitID=1", "node-1", http.StatusUnauthorized},
		{"/task", "portal", http.StatusBadRequest},
		{"/task?appServerID=node-3", "soc", http.StatusBadRequest},
		{"/task?appServerID=node-3", "soc-next", http.StatusBadRequest},
		{"/submit", "portal", http.StatusAccepted},
		{"/submit-result?submitID=1", "portal", http.StatusAccepted},
		{"/submit", "soc", http.StatusForbidden},
		{"/file?sha256=0", "soc-next", http.StatusAccepted},
		{"/submit", "broker", http.StatusUnauthorized},
		{"/submit", "", http.StatusUnauthorized},
		{"/system-info", "portal", http.StatusNotFound},
		{"/", "", http.StatusNotFound},
	} {
		for _, spelling := range []string{"serect", "secret"} {
			request, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, "http://"+address+test.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			secret := secrets[test.client]
			if test.client != "" {
				query := request.URL.Query()
				query.Set(spelling, secret)
				request.URL.RawQuery = query.Encode()
			}
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != test.status {
				t.Errorf("%s with the secret of %q: got %d, want %d", test.path, test.client, response.StatusCode, test.status)
			}
			logged := site.waitFor("handled request")
			if test.client != "" && !strings.Contains(logged, spelling+"=REDACTED") {
				t.Errorf("%s with the secret of %q: the secret is not redacted in %s", test.path, test.client, logged)
			}
		}
	}
}

// TestRateLimit checks that fail2ban counts exactly the requests without a valid secret.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	filter := regexp.MustCompile(`(?m)^failregex = (.*)$`).FindSubmatch(readFile(t, "rate-limit/fail2ban/filter.d/caddy-fsbroker.conf"))
	if filter == nil {
		t.Fatal("the filter has no failregex")
	}
	counted := regexp.MustCompile(strings.Replace(string(filter[1]), "<HOST>", `(?P<host>[0-9.]+)`, 1))
	logs := t.TempDir()

	site, secrets := startExample(t, "rate-limit/Caddyfile", "LOGS_DIRECTORY="+logs, "CLIENTS=127.0.0.0/8")
	requests := []struct {
		path, secret, userAgent string
		status                  int
	}{
		{"/task", "", "", 401},
		{"/task", "wrong", "", 401},
		{"/TA%53K", "wrong", "", 401},
		{"/task", secrets["PORTAL_SECRET"], "", 400},
		{"/task", secrets["PORTAL_SECRET"], `"client_ip":"192.0.2.1","status":401,"fsbroker; detail=unauthorized"`, 400},
	}
	for _, request := range requests {
		if response := get(t, site+request.path, request.secret, request.userAgent); response.StatusCode != request.status {
			t.Errorf("%+v: got %d", request, response.StatusCode)
		}
	}
	var lines []string
	testenv.Eventually(t, "the access log", func() bool {
		log := readFile(t, filepath.Join(logs, "fsbroker.log"))
		lines = slices.Collect(strings.Lines(string(log)))
		return len(lines) == len(requests)
	})
	for i, line := range lines {
		match := counted.FindStringSubmatch(line)
		if wrong := requests[i].status == http.StatusUnauthorized; wrong != (match != nil) || wrong && match[1] != "127.0.0.1" {
			t.Errorf("%+v: the filter finds %q in %s", requests[i], match, line)
		}
	}

	site, _ = startExample(t, "rate-limit/Caddyfile", "LOGS_DIRECTORY="+t.TempDir())
	if response, err := http.Get(site + "/task"); err == nil {
		response.Body.Close()
		t.Errorf("from a network that is not allowed: got %d", response.StatusCode)
	}
}

// TestMigration sends the same requests to the site before and after the migration.
func TestMigration(t *testing.T) {
	t.Parallel()
	start := func(name string) *httptest.Server {
		return startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			_, _ = fmt.Fprintf(w, `{"result":{"from":"%s","path":"%s"}}`, name, r.URL.Path)
		})
	}
	broker, node := start("broker"), start("node-1")
	const task = "/task?appServerID=node-1&taskID=1"
	for folder, wanted := range map[string]map[string]string{
		"before": {
			task:      `{"result":{"from":"broker","path":"/task"}}`,
			"/submit": `{"result":{"from":"broker","path":"/submit"}}`,
		},
		"after": {
			task:      `{"result":{"from":"node-1","path":"/task"}}`,
			"/submit": `{"result":{"from":"broker","path":"/submit"}}`,
		},
	} {
		t.Run(folder, func(t *testing.T) {
			site, secrets := startExample(t, "migration/"+folder+"/Caddyfile",
				"BROKER="+strings.TrimPrefix(broker.URL, "https://"), "NODE_1="+strings.TrimPrefix(node.URL, "https://"))
			for path, want := range wanted {
				for _, secretParam := range []string{"serect", "secret", ""} {
					url, bearer := site+path, secrets["BROKER_SECRET"]
					if secretParam != "" {
						separator := "?"
						if strings.Contains(path, "?") {
							separator = "&"
						}
						url, bearer = url+separator+secretParam+"="+bearer, ""
					}
					response := get(t, url, bearer, "")
					if got := response.body; got != want {
						t.Errorf("%s with %q: %d %s", path, secretParam, response.StatusCode, got)
					}
				}
			}
			if status := get(t, site+task, "", "").StatusCode; folder == "after" && status != http.StatusUnauthorized {
				t.Errorf("without a secret: got %d", status)
			}
			if status := get(t, site+task+"&taskID=2", secrets["BROKER_SECRET"], "").StatusCode; folder == "after" && status != http.StatusBadRequest {
				t.Errorf("with a repeated parameter: got %d", status)
			}
		})
	}
}

// plantedMark is a part of each secret that TestNoSecretIsLogged plants. configuredMark is a part of each configured one.
const (
	plantedMark    = "planted-"
	configuredMark = "the-secret-of-"
)

// waysIn are the places of a request in which a caller may send a secret, as a query or a header field. Some of them are
// no way in: they are mistakes that callers make.
var waysIn = []struct{ query, name, value string }{
	{query: "secret=%s"},
	{query: "serect=%s&all=true"},
	{query: "all=true&%%73ecre%%74=%s"},
	{query: "SECRET=%s"},
	{query: "all=true;secret=%s"},
	{query: "next=%%2Ftask%%3Fsecret%%3D%s"},
	{name: "Authorization", value: "Bearer %s"},
	{name: "Secret", value: "%s"},
	{name: "X-Api-Key", value: "%s"},
	{name: "Referer", value: "https://portal.example.com/?id=1&secret=%s"},
	{name: "Referer", value: "/?serect=%s#top"},
}

// TestNoSecretIsLogged runs every example with all loggers at level DEBUG, sends requests with secrets in all ways, and
// searches all logs for them. The requests are answered by all kinds of handlers, with a broker that answers and without.
func TestNoSecretIsLogged(t *testing.T) {
	t.Parallel()
	for _, path := range configs(t) {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			testNoSecretIsLogged(t, path)
		})
	}
	sites := 0
	for _, block := range pages(t)["README.md"].blocks {
		if block.language != "caddyfile" {
			continue
		}
		sites++
		t.Run(fmt.Sprintf("README.md:%d", block.line), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "Caddyfile")
			writeFile(t, path, string(block.code))
			testCaddyfile(t, path)
			testNoSecretIsLogged(t, path)
		})
	}
	if sites != 2 {
		t.Errorf("the README has %d Caddyfiles, want 2", sites)
	}
}

func testNoSecretIsLogged(t *testing.T, path string) {
	// The broker repeats the query in its response, like a redirect, or ends the connection. No node is running.
	broker := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/submit") {
			panic(http.ErrAbortHandler)
		}
		http.Redirect(w, r, "https://broker.example.com"+r.RequestURI, http.StatusFound)
	})
	e := prepare(t, path, strings.TrimPrefix(broker.URL, "https://"))

	site := startProcess(t, caddyCommand(t, nil, "run", "--config", e.config))
	e.await(t, site)

	statuses := make(map[int]int)
	for range 2 {
		for _, path := range []string{"/task?appServerID=node-1&taskID=1", "/submit", "/submit-result", "/file", "/", "/error", "/rewrite"} {
			e.sendSecrets(t, statuses, e.site+path)
		}
		broker.Close()
	}
	if e.redirects != "" {
		e.sendSecrets(t, statuses, e.redirects+"/task")
		if statuses[http.StatusPermanentRedirect] == 0 {
			t.Error("nothing was redirected from http to https")
		}
	}
	for _, status := range []int{http.StatusInternalServerError, http.StatusBadGateway} {
		if statuses[status] == 0 {
			t.Errorf("no response had status %d: %v", status, statuses)
		}
	}
	sent := 0
	for _, count := range statuses {
		sent += count
	}
	e.stop(t)
	site.wantEnd()

	logs := site.log.String()
	files, err := filepath.Glob(filepath.Join(e.logs, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		logs += string(readFile(t, file))
	}
	leaks := 0
	for line := range strings.Lines(logs) {
		if i := max(strings.Index(line, plantedMark), strings.Index(line, configuredMark)); i >= 0 {
			if leaks++; leaks <= 5 {
				t.Errorf("a secret is logged: %s … %s", line[:min(len(line), 150)], line[max(0, i-100):min(len(line), i+30)])
			}
		}
	}
	if leaks > 0 {
		t.Errorf("%d lines of the logs have a secret", leaks)
	}
	wanted := map[string]int{"rewrote request": len(waysIn), "http.log.error": len(waysIn), "received request": 1}
	if config := string(readFile(t, e.config)); strings.Contains(config, "reverse_proxy") || strings.Contains(config, `"proxy":`) {
		wanted["upstream roundtrip"] = len(waysIn)
	}
	if e.accessLog {
		wanted[`"logger":"http.log.access`] = sent
	}
	for text, want := range wanted {
		if got := strings.Count(logs, text); got < want {
			t.Errorf("%q is logged %d times, want %d", text, got, want)
		}
	}
}

// example is an example that runs with all of its logs at level DEBUG.
type example struct {
	config    string // the file
	logs      string // the folder
	site      string // its URL
	redirects string // the URL that redirects to the site, if there is one
	admin     string // the address of the admin API
	accessLog bool
	secret    string // of a client; empty if there are no clients
	client    *http.Client
}

// prepare writes a configuration that runs anywhere: with other addresses, and a certificate authority of its own.
// It also adds routes for the paths /error and /rewrite. It leaves the formats of the logs as they are.
func prepare(t *testing.T, path, broker string) *example {
	dir := filepath.ToSlash(t.TempDir())
	raw := readFile(t, path)
	if filepath.Base(path) == "Caddyfile" {
		raw = caddy(t, []string{
			"LOGS_DIRECTORY=" + dir, "FSBROKER_SHARED=" + dir + "/shared", "QUICKSTART_DIR=" + dir, "CLIENTS=127.0.0.0/8",
		}, "adapt", "--config", absolute(t, path))
	}
	upstream := regexp.MustCompile(`(?:10\.0\.0\.\d+|127\.0\.0\.1|backend):2[23]\d{3}`)
	dead := freeAddress(t)
	raw = upstream.ReplaceAllFunc(raw, func(address []byte) []byte {
		if bytes.HasPrefix(address, []byte("10.0.0.10:")) || bytes.HasSuffix(address, []byte(":23001")) {
			return []byte(broker)
		}
		return []byte(dead)
	})

	var config struct {
		Admin   map[string]any `json:"admin"`
		Logging struct {
			Logs map[string]map[string]any `json:"logs"`
		} `json:"logging"`
		Storage any                       `json:"storage,omitempty"`
		Apps    map[string]map[string]any `json:"apps"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		t.Fatal(err)
	}
	_, httpPort, _ := net.SplitHostPort(freeAddress(t))
	_, httpsPort, _ := net.SplitHostPort(freeAddress(t))
	e := &example{logs: filepath.Join(dir, "logs"), admin: freeAddress(t)}
	config.Admin = map[string]any{"listen": e.admin, "config": map[string]any{"persist": false}}

	if config.Logging.Logs == nil {
		config.Logging.Logs = make(map[string]map[string]any)
	}
	if config.Logging.Logs["default"] == nil {
		config.Logging.Logs["default"] = make(map[string]any)
	}
	for name, log := range config.Logging.Logs {
		log["level"] = "DEBUG"
		log["writer"] = map[string]any{"output": "file", "filename": filepath.Join(e.logs, name)}
	}

	config.Apps["http"]["http_port"], config.Apps["http"]["https_port"] = json.Number(httpPort), json.Number(httpsPort)
	config.Apps["tls"] = map[string]any{"automation": map[string]any{"policies": []any{map[string]any{"issuers": []any{map[string]any{"module": "internal"}}}}}}
	config.Apps["pki"] = map[string]any{"certificate_authorities": map[string]any{"local": map[string]any{"install_trust": false}}}
	for _, server := range config.Apps["http"]["servers"].(map[string]any) {
		server := server.(map[string]any)
		routes := server["routes"].([]any)
		if routes[0].(map[string]any)["match"] == nil { // the metrics
			server["listen"] = []string{freeAddress(t)}
			continue
		}
		server["listen"] = []string{"127.0.0.1:" + httpsPort}
		server["protocols"] = []string{"h1", "h2"} // no port is reserved for HTTP/3
		host := routes[0].(map[string]any)["match"].([]any)[0].(map[string]any)["host"].([]any)[0].(string)
		e.site = "https://" + net.JoinHostPort(host, httpsPort)
		if options, _ := server["automatic_https"].(map[string]any); options["disable_redirects"] != true {
			e.redirects = "http://" + net.JoinHostPort(host, httpPort)
		}
		_, e.accessLog = server["logs"]
		route := func(path string, handler map[string]any) any {
			return map[string]any{"match": []any{map[string]any{"path": []string{path}}}, "handle": []any{handler}}
		}
		server["routes"] = append([]any{
			route("/error", map[string]any{"handler": "error", "status_code": 500}),
			route("/rewrite", map[string]any{"handler": "rewrite", "uri": "/rewritten?{http.request.uri.query}"}),
		}, routes...)
	}

	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	var secrets map[string]string
	e.config, secrets = withSecrets(t, raw)
	for _, name := range []string{"portal", "PORTAL_SECRET", "BROKER_SECRET"} {
		e.secret = cmp.Or(e.secret, secrets[name])
	}
	dialer := new(net.Dialer)
	e.client = &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
			ForceAttemptHTTP2: true,
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				_, port, _ := net.SplitHostPort(address)
				return dialer.DialContext(ctx, network, "127.0.0.1:"+port)
			},
		},
	}
	t.Cleanup(e.client.CloseIdleConnections)
	return e
}

// await waits until the site responds. Caddy obtains its certificate in the background. Nothing is requested before Caddy
// has started: a TLS handshake during the start is a data race inside Caddy, which the race detector would report.
func (e *example) await(t *testing.T, site *process) {
	t.Helper()
	site.eventually("Caddy's start", func() bool {
		log, _ := os.ReadFile(filepath.Join(e.logs, "default"))
		return bytes.Contains(log, []byte("serving initial configuration"))
	})
	site.eventually("a response of the site", func() bool {
		_, err := e.try(t, http.MethodGet, e.site+"/error", nil)
		return err == nil
	})
}

// sendSecrets sends requests with a wrong and a configured secret in all ways, and counts the statuses.
func (e *example) sendSecrets(t *testing.T, statuses map[int]int, target string) {
	t.Helper()
	for i, way := range waysIn {
		mark := fmt.Sprint(plantedMark, i)
		for _, secret := range []string{mark + ` "a\b;c" ` + mark, e.secret} {
			if secret == "" {
				continue
			}
			header := make(http.Header)
			to := target
			if way.query == "" {
				header.Set(way.name, fmt.Sprintf(way.value, secret))
			} else if query := fmt.Sprintf(way.query, url.QueryEscape(secret)); strings.Contains(target, "?") {
				to += "&" + query
			} else {
				to += "?" + query
			}
			response := e.do(t, http.MethodGet, to, header)
			statuses[response.StatusCode]++
		}
	}
}

// stop stops Caddy, with a secret for the admin API.
func (e *example) stop(t *testing.T) {
	t.Helper()
	header := http.Header{"Authorization": {"Bearer " + plantedMark}, "Secret": {plantedMark}, "X-Api-Key": {plantedMark}, "Referer": {"/?secret=" + plantedMark}}
	if response := e.do(t, http.MethodPost, "http://"+e.admin+"/stop?secret="+plantedMark, header); response.StatusCode != http.StatusOK {
		t.Fatalf("stopping Caddy: %d", response.StatusCode) // it runs on, so there is no end to wait for
	}
}

func (e *example) do(t *testing.T, method, url string, header http.Header) *http.Response {
	t.Helper()
	response, err := e.try(t, method, url, header)
	if err != nil {
		t.Fatal(err)
	}
	return response
}

func (e *example) try(t *testing.T, method, url string, header http.Header) (*http.Response, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(testenv.Context(t), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header = header
	response, err := e.client.Do(request)
	if err != nil {
		return nil, err
	}
	return response, response.Body.Close()
}

// response is an HTTP response with its body.
type response struct {
	*http.Response
	body string
}

// get sends a GET request, with a secret and a User-Agent unless they are empty.
func get(t *testing.T, url, secret, userAgent string) response {
	t.Helper()
	r, err := tryGet(t, url, secret, userAgent)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tryGet is like get, and returns the error.
func tryGet(t *testing.T, url, secret, userAgent string) (response, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if secret != "" {
		request.Header.Set("Authorization", "Bearer "+secret)
	}
	if userAgent != "" {
		request.Header.Set("User-Agent", userAgent)
	}
	r, err := http.DefaultClient.Do(request)
	if err != nil {
		return response{}, err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	return response{r, string(body)}, err
}

// startExample runs an example with the given environment variables. It sets $SITE, and returns the site's URL.
func startExample(t *testing.T, path string, env ...string) (site string, secrets map[string]string) {
	t.Helper()
	site = "http://" + freeAddress(t)
	config, secrets := withSecrets(t, caddy(t, append(env, "SITE="+site), "adapt", "--config", absolute(t, path)))
	startCaddy(t, nil, config)
	return site, secrets
}

// TestSecretsAreGiven checks that systemd and Docker Compose give Caddy exactly the secrets that the Caddyfile reads.
func TestSecretsAreGiven(t *testing.T) {
	for _, test := range []struct{ runner, given, caddyfile string }{
		{"systemd/caddy.service", `(?m)^LoadCredential=([\w-]+):/etc/caddy/secrets/([\w-]+)$`, "systemd/Caddyfile"},
		{"compose/compose.yaml", `(?m)^  ([\w-]+):\n    file: secrets/([\w-]+)$`, "production/Caddyfile"},
	} {
		var given []string
		for _, match := range regexp.MustCompile(test.given).FindAllStringSubmatch(string(readFile(t, test.runner)), -1) {
			given = append(given, match[1])
			if match[1] != match[2] {
				t.Errorf("%s: %s is read from %s", test.runner, match[1], match[2])
			}
		}
		var read []string
		for _, match := range regexp.MustCompile(`\{file\..*/([\w-]+)\}`).FindAllStringSubmatch(string(readFile(t, test.caddyfile)), -1) {
			read = append(read, match[1])
		}
		slices.Sort(given)
		slices.Sort(read)
		if !slices.Equal(given, slices.Compact(read)) {
			t.Errorf("%s gives %q, %s reads %q", test.runner, given, test.caddyfile, read)
		}
	}
	compose := readFile(t, "compose/compose.yaml")
	if list := regexp.MustCompile(`secrets: \[(.*)\]`).FindSubmatch(compose); list == nil {
		t.Error("the service in compose.yaml has no secrets")
	} else {
		for name := range strings.SplitSeq(string(list[1]), ", ") {
			if !bytes.Contains(compose, []byte("\n  "+name+":\n    file: ")) {
				t.Errorf("compose.yaml has no file for %s", name)
			}
		}
	}
}

// TestDockerfile checks that the image has the versions of go.mod, and is built like Caddy in the checks.
func TestDockerfile(t *testing.T) {
	dockerfile := string(readFile(t, "../Dockerfile"))
	version := func(pattern, file string) string {
		match := regexp.MustCompile(pattern).FindSubmatch(readFile(t, file))
		if match == nil {
			t.Fatalf("%s has no %s", file, pattern)
		}
		return string(match[1])
	}
	for _, want := range []string{
		"ARG CADDY_VERSION=" + version(`github.com/caddyserver/caddy/v2 v(\S+)\n`, "../go.mod") + "\n",
		"ARG GO_VERSION=" + version(`(?m)^go (\d+\.\d+)`, "../go.mod") + "\n",
		"RUN go run " + version(`(?m)^xcaddy=(\S+)$`, "../.ci/run") + " build v${CADDY_VERSION} --with " + version(`(?m)^module (\S+)$`, "../go.mod") + "@v0.0.0=/src ",
	} {
		if !strings.Contains(dockerfile, want) {
			t.Errorf("the Dockerfile has no %q", want)
		}
	}
	for _, match := range regexp.MustCompile(`(?m)^COPY ([^-\s].*) \S+$`).FindAllStringSubmatch(dockerfile, -1) {
		for source := range strings.FieldsSeq(match[1]) {
			if _, err := os.Stat(filepath.Join("..", source)); err != nil {
				t.Error(err)
			}
		}
	}
}
