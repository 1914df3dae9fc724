package examples_test

import (
	"crypto/tls"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// TestDemo runs the demo's backend and Caddy without containers, with the paths and addresses of the test in place of those
// of the containers, and the commands of the README.
func TestDemo(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the commands are for a Unix shell")
	}
	t.Parallel()
	dir, data := t.TempDir(), t.TempDir()
	site, metrics, admin, broker, node := freeAddress(t), freeAddress(t), freeAddress(t), freeAddress(t), freeAddress(t)
	port := func(address string) string {
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		return port
	}
	startDemoBackend(t, dir, broker, node)
	here := strings.NewReplacer(
		"/run/demo", dir,
		"/data/", data+"/",
		"persist_config off", "persist_config off\n\thttp_port "+port(freeAddress(t))+
			"\n\tservers {\n\t\tprotocols h1 h2\n\t}", // no port is reserved for HTTP/3
		"https://localhost:8443", "https://localhost:"+port(site),
		"backend:23001", broker,
		"backend:22001", node,
		"http://:9180", "http://:"+port(metrics),
		"localhost:2019", admin,
		"@compose.yaml", "@"+absolute(t, "demo/compose.yaml"),
	)
	config := filepath.Join(t.TempDir(), "Caddyfile")
	writeFile(t, config, here.Replace(string(readFile(t, "demo/Caddyfile"))))
	env := []string{"CADDY_ADMIN=" + admin, "XDG_DATA_HOME=" + data}
	caddy := startCaddy(t, env, config)
	caddy.eventually("the site has its certificate", func() bool { // Caddy obtains it in the background
		dialer := tls.Dialer{Config: &tls.Config{ServerName: "localhost", InsecureSkipVerify: true}}
		conn, err := dialer.DialContext(testenv.Context(t), "tcp", site)
		return err == nil && conn.Close() == nil
	})

	shell := newShell(t, env...)
	shell.add("docker", `shift 4; exec "$@"`) // docker compose exec -T <service> …
	shell.add("wget", `exec curl -fsS "$4"`)  // wget -q -O - <url>
	commands := regexp.MustCompile(`(?m)^(?:secret=\$\(|curl |docker compose exec ).*$`).FindAllString(here.Replace(string(readFile(t, "demo/README.md"))), -1)
	if len(commands) != 7 {
		t.Fatalf("the README has the commands %q", commands)
	}
	prepare := strings.Join(commands[:2], "\n") + "\n"
	answer := shell.run(prepare + commands[2])
	var submitted struct{ AcceptedFiles []struct{ ID string } }
	if err := json.Unmarshal([]byte(answer), &submitted); err != nil || len(submitted.AcceptedFiles) != 1 {
		t.Fatalf("%v: %s", err, answer)
	}
	report := shell.run(prepare + strings.Replace(commands[3], "<ID>", submitted.AcceptedFiles[0].ID, 1))
	if !strings.Contains(report, `"state":"SUCCESS"`) {
		t.Errorf("the report is %s", report)
	}
	for i, want := range []string{`(?m)^default +node +node-1 .* healthy `, `(?m)^default .* file_system works `, `"node":"node-1"`} {
		if output := shell.run(commands[4+i]); !regexp.MustCompile(want).MatchString(output) {
			t.Errorf("%s: %s", commands[4+i], output)
		}
	}

	target := regexp.MustCompile(`(?m)targets: \[caddy:(\d+)\]`).FindSubmatch(readFile(t, "demo/prometheus.yaml"))
	if target == nil || !strings.Contains(string(readFile(t, "demo/Caddyfile")), "\nhttp://:"+string(target[1])+" {\n\tmetrics\n}") {
		t.Error("Prometheus does not scrape the metrics site")
	}
	if r := get(t, "http://"+metrics+"/metrics", "", ""); !strings.Contains(r.body, "caddy_fsbroker_requests_total{") {
		t.Errorf("the metrics are %s", r.body)
	}
}

// startDemoBackend builds and runs the demo's backend, and waits until it is ready.
func startDemoBackend(t *testing.T, dir, broker, node string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "backend")
	build := programCommand(t, "go", "build", "-o", program, "./demo/backend")
	build.Env = nil // Go's caches are in the user's home
	outputOf(t, build)
	backend := startProcess(t, programCommand(t, program, "-dir", dir, "-broker", broker, "-node", node))
	backend.eventually("it has written its certificate", func() bool {
		_, err := os.Stat(filepath.Join(dir, "upstreams.crt"))
		return err == nil
	})
}

// TestDemoPrometheus checks the demo's configuration of Prometheus beside the alert rules, as it is mounted.
func TestDemoPrometheus(t *testing.T) {
	needProgram(t, "promtool")
	dir := t.TempDir()
	for _, name := range []string{"demo/prometheus.yaml", "prometheus/alerts.yaml"} {
		writeFile(t, filepath.Join(dir, filepath.Base(name)), string(readFile(t, name)))
	}
	outputOf(t, programCommand(t, "promtool", "check", "config", filepath.Join(dir, "prometheus.yaml")))
}

// compose is what the tests need of a Compose file.
type compose struct {
	Services map[string]struct {
		Build *struct{ Context, Target string }
		Image string

		Volumes     []string
		Environment map[string]string
		Secrets     []string
		DependsOn   map[string]any `yaml:"depends_on"`
	}
	Volumes map[string]any
	Secrets map[string]struct{ File string }
}

// TestCompose checks that everything exists that the Compose files name, apart from what the operator creates.
func TestCompose(t *testing.T) {
	dockerfile := string(readFile(t, "../Dockerfile"))
	for folder, created := range map[string][]string{"demo": nil, "compose": {"upstreams.crt"}} {
		var c compose
		if err := yaml.Unmarshal(readFile(t, filepath.Join(folder, "compose.yaml")), &c); err != nil {
			t.Fatal(err)
		}
		for name, service := range c.Services {
			switch b := service.Build; {
			case b == nil && service.Image == "":
				t.Errorf("%s: %s has no image", folder, name)
			case b != nil && filepath.Join(folder, b.Context) != "..":
				t.Errorf("%s: %s is built in %s", folder, name, b.Context)
			case b != nil && !strings.Contains(dockerfile, " AS "+b.Target+"\n"):
				t.Errorf("%s: the Dockerfile has no target %q for %s", folder, b.Target, name)
			}
			for other := range service.DependsOn {
				if _, ok := c.Services[other]; !ok {
					t.Errorf("%s: %s depends on %s", folder, name, other)
				}
			}
			for _, volume := range service.Volumes {
				source, _, _ := strings.Cut(volume, ":")
				if !strings.HasPrefix(source, ".") {
					if _, ok := c.Volumes[source]; !ok {
						t.Errorf("%s: there is no volume %s", folder, source)
					}
				} else if _, err := os.Stat(filepath.Join(folder, source)); err != nil && !slices.Contains(created, filepath.Base(source)) {
					t.Errorf("%s: %v", folder, err)
				}
			}
			for _, secret := range service.Secrets {
				if c.Secrets[secret].File != "secrets/"+secret {
					t.Errorf("%s: the secret %s of %s has no file", folder, secret, name)
				}
			}
		}
	}
}

// TestGrafanaFiles checks that Grafana finds the dashboard and Prometheus.
func TestGrafanaFiles(t *testing.T) {
	var c compose
	var sources struct {
		Datasources []struct {
			Type, URL string
			IsDefault bool `yaml:"isDefault"`
		}
	}
	var dashboards struct {
		Providers []struct{ Options struct{ Path string } }
	}
	for name, content := range map[string]any{
		"compose.yaml": &c, "grafana/datasources/prometheus.yaml": &sources, "grafana/dashboards/fsbroker.yaml": &dashboards,
	} {
		if err := yaml.Unmarshal(readFile(t, "demo/"+name), content); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if s := sources.Datasources; len(s) != 1 || s[0].Type != "prometheus" || s[0].URL != "http://prometheus:9090" || !s[0].IsDefault {
		t.Errorf("the data sources are %+v", s)
	}
	grafana := c.Services["grafana"]
	home := grafana.Environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
	if !slices.Contains(grafana.Volumes, "../grafana/dashboard.json:"+home+":ro") || len(dashboards.Providers) != 1 ||
		dashboards.Providers[0].Options.Path != strings.TrimSuffix(home, "/fsbroker.json") {
		t.Errorf("the dashboard is at %s, and expected in %+v", home, dashboards.Providers)
	}
}
