package examples_test

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// TestSystemd runs Caddy with the Caddyfile for systemd, with the paths and addresses of the test in place of those of a
// machine, and then each command of the README that needs neither systemd nor root.
func TestSystemd(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("systemd does not run on Windows")
	}
	t.Parallel()
	dir, err := os.MkdirTemp("", "fsbroker") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	node := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"}}}`)
	})
	site, metrics := freeAddress(t), freeAddress(t)
	here := strings.NewReplacer(
		"/etc/caddy", dir,
		"/run/caddy", dir,
		"localhost:9180", metrics,
		"http://:9180 {", "http://:"+strings.TrimPrefix(metrics, "127.0.0.1:")+" {",
		"fsbroker.example.com {", "http://"+site+" {",
		"10.0.0.11:22001", strings.TrimPrefix(node.URL, "https://"),
	)
	config := filepath.Join(dir, "Caddyfile")
	writeFile(t, config, here.Replace(string(readFile(t, "systemd/Caddyfile"))))
	writeFile(t, filepath.Join(dir, "upstreams.crt"), string(certificate().PEM))
	secrets := filepath.Join(dir, "secrets")
	if err := os.Mkdir(secrets, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"portal", "node-1", "node-2", "broker"} {
		writeFile(t, filepath.Join(secrets, name), configuredMark+name+"\n")
	}
	startCaddy(t, []string{"SECRETS=" + secrets}, config)
	for range 2 {
		if status := get(t, "http://"+site+"/task?appServerID=node-1&taskID=42", configuredMark+"portal", "").StatusCode; status != http.StatusOK {
			t.Fatalf("the site answers %d", status)
		}
	}

	wanted := []string{ // the output of each command
		`Valid configuration`,
		`(?m)^default +broker +- +10\.0\.0\.10:23001 `,
		`(?m)^default .* file_system works `,
		`^removed 0 from memory, `,
		`"node":"node-1","address":"` + regexp.QuoteMeta(strings.TrimPrefix(node.URL, "https://")) + `","state":"`,
		`^\{"default":\{.*"module":"file_system"`,
		`^\{"memory":1,`,
		`caddy_fsbroker_requests_total\{`,
	}
	commands := regexp.MustCompile(`(?m)^(?:SECRETS=\S+ )?(?:curl|caddy) .*$`).FindAllString(string(readFile(t, "systemd/README.md")), -1)
	if len(commands) != len(wanted) {
		t.Fatalf("the README has the commands %q", commands)
	}
	shell := newShell(t)
	for i, command := range commands {
		if output := shell.run(here.Replace(command)); !regexp.MustCompile(wanted[i]).MatchString(output) {
			t.Errorf("%s: got %s", command, output)
		}
	}
}
