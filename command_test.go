package fsbroker_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// ran is what a command has printed, and its exit code.
type ran struct {
	code        int
	out, errOut string
}

// runCommand runs `caddy fsbroker` in an empty folder.
func runCommand(t *testing.T, args ...string) ran {
	t.Helper()
	return runCommandIn(t, t.TempDir(), args...)
}

func runCommandIn(t *testing.T, dir string, args ...string) ran {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"fsbroker"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(caddyEnv(dir), "CADDY_ADMIN="+testsite.Refused(t))
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatal(err)
	}
	r := ran{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
	for _, secret := range allSecrets {
		if strings.Contains(r.out+r.errOut, secret) {
			t.Errorf("%q prints a secret: %+v", args, r)
		}
	}
	return r
}

// want checks the exit code, and that the output matches a regular expression: the standard output of a command that
// succeeds, and the standard error of one that fails, which has no other output.
func (r ran) want(t *testing.T, code int, pattern string) {
	t.Helper()
	text := r.out
	if code != 0 {
		text = r.errOut
	}
	if r.code != code || !regexp.MustCompile(pattern).MatchString(text) || code != 0 && r.out != "" {
		t.Errorf("got the exit code %d, want %d\nwant %s\ngot  %s\n%s", r.code, code, pattern, r.out, r.errOut)
	}
}

func TestCommandNodes(t *testing.T) {
	node := newBackend(t, systemInfo)
	hostile := newBackend(t, responds(http.StatusOK, `{"versionInfo":{"version":"\u202e2.1"},"freeDiscSpaceInMb":812}`))
	gone := newBackend(t, nil)
	gone.Close()
	s := startWithAdmin(t, options(node, fmt.Sprintf("node b-hostile %s\nnode c-gone %s\nbroker %s {env.BROKER_SECRET}", hostile.URL, gone.URL, node.URL)), "")

	table := runCommand(t, "nodes", "--address", s.admin)
	table.want(t, 0, `^NAMESPACE +ROLE +NODE +ADDRESS +STATE +REQUESTS +VERSION +ACTIVE +QUEUED +COMPLETED +DISK FREE +PROBLEM\n`+
		`default +node +b-hostile +\S+ +healthy +0 +`+"\uFFFD"+`2\.1 +- +- +- +812 MB +-\n`+
		`default +node +c-gone +\S+ +down +0 +- +- +- +- +- +node_unreachable now\n`+
		`default +node +node-1 +\S+ +healthy +0 +2\.1\.0 +3 +2 +12345 +- +-\n`+
		`default +broker +- +\S+ +healthy +0 +2\.1\.0 .*\n$`)
	if table.errOut != "" {
		t.Errorf("there is something else: %s", table.errOut)
	}
	got := runCommand(t, "nodes", "--address", s.admin, "--json")
	got.want(t, 0, `^\[\{"namespace":"default",.*\]\n$`)
	if _, body := s.requestAdmin(http.MethodGet, "/fsbroker/nodes"); !sameButTimes(got.out, body) {
		t.Errorf("the command prints %s, the admin API %s", got.out, body)
	}
}

// sameButTimes compares answers of the admin API apart from the times in them.
func sameButTimes(a, b string) bool {
	times := regexp.MustCompile(`"at":"[^"]+"`)
	return times.ReplaceAllString(a, "") == times.ReplaceAllString(b, "")
}

func TestCommandCache(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, stored)+"\n"+options(node, "cache {\nnamespace other\n}"), "")
	s.get(pair).wantStatus(t, http.StatusOK)
	s.wantValues(1)
	runCommand(t, "cache", "--address", s.admin).want(t, 0, `^NAMESPACE +MEMORY +LIMIT +ENTRIES +EVICTIONS +WAITING +STORAGE +QUEUED +QUEUE SIZE +PROBLEM\n`+
		`default +\d\.\d KiB +256 MiB +1 +0 +0 +folder works +0 +0 B +-\n`+
		`other +0 B +256 MiB +0 +0 +0 +- +- +- +-\n$`)
	_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
	runCommand(t, "cache", "--address", s.admin, "--json").want(t, 0, "^"+regexp.QuoteMeta(body)+"$")
}

func TestCommandPurge(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, "broker "+node.URL+"\n"+stored), "")
	for _, query := range []string{"appServerID=node-1&taskID=t1", "appServerID=node-1&taskID=t1&all", "appServerID=node-1&taskID=t2", "submitID=s1"} {
		s.get("/task?"+query).wantStatus(t, http.StatusOK)
	}
	s.wantValues(4)
	purge := func(args ...string) ran {
		t.Helper()
		s.wantQueueEmpty()
		return runCommand(t, append([]string{"purge", "--address", s.admin}, args...)...)
	}
	purge("--app-server-id", "node-1", "--task-id", "t1").want(t, 0, `^removed 2 from memory, 0 from the queue, 2 from the storage\n$`)
	s.wantValues(2)
	purge("--submit-id", "s1", "--json").want(t, 0, `^\{"memory":1,"queue":0,"storage":1\}\n$`)
	s.wantValues(1)
	purge("--app-server-id", "node-3", "--task-id", "t1", "--json").want(t, 0, `"storage":0`) // the broker may know it
	purge("--older-than", "1h").want(t, 0, `^removed 0 from memory, 0 from the queue, 0 from the storage\n$`)
	purge("--older-than", "1 hour").want(t, 2, `older_than must be a duration of more than 0, such as 24h or 30d`)
	purge("--sha256", "ab").want(t, 2, `sha256 must be 64 hexadecimal digits`)
	purge("--sha256", strings.Repeat("ab", 32)).want(t, 0, `^removed 0 from memory`)
	s.wantValues(1)
	purge("--app-server-id", "node-1").want(t, 0, `^removed 1 from memory, 0 from the queue, 1 from the storage\n$`)
	s.wantValues(0)
	s.get(pair).wantStatus(t, http.StatusOK)
	s.wantValues(1)
	purge("--all").want(t, 0, `^removed 1 from memory, 0 from the queue, 1 from the storage\n$`)
	s.wantValues(0)
}

// fakeAdmin is an admin API that records the purges that it is asked for.
type fakeAdmin struct {
	*httptest.Server
	mu      sync.Mutex
	queries []string
}

// newFakeAdmin returns an admin API that answers each purge with the next of answers. An answer that is no JSON object is
// an error.
func newFakeAdmin(t *testing.T, answers ...string) *fakeAdmin {
	t.Helper()
	f := new(fakeAdmin)
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := `{"default":{}}`
		if r.Method == http.MethodDelete {
			f.mu.Lock()
			defer f.mu.Unlock()
			answer = answers[min(len(f.queries), len(answers)-1)]
			f.queries = append(f.queries, r.URL.RawQuery)
		}
		if !strings.HasPrefix(answer, "{") {
			w.WriteHeader(http.StatusBadGateway)
			answer = `{"error":"` + answer + `"}`
		}
		fmt.Fprintln(w, answer)
	}))
	t.Cleanup(f.Close)
	return f
}

func (f *fakeAdmin) address() string { return strings.TrimPrefix(f.URL, "http://") }

// A long purge goes on where the admin API says, and shows how far it has come.
func TestCommandPurgeInSteps(t *testing.T) {
	t.Parallel()
	steps := []string{`{"memory":3,"queue":1,"storage":10,"next":1024}`, `{"memory":0,"queue":0,"storage":5,"next":3072}`, `{"memory":1,"queue":0,"storage":2}`}
	for name, test := range map[string]struct {
		answers []string
		code    int
		want    string
		shown   string // on the standard error
	}{
		"done": {
			steps, 0, `^removed 4 from memory, 1 from the queue, 17 from the storage\n$`,
			`(?s)^ 25%  removed 3 from memory, 1 from the queue, 10 from the storage\n 75%  [^\n]*\n$`,
		},
		"a step fails": {
			[]string{steps[0], "the storage is away"}, 1, `the storage is away \(before that, removed 3 from memory, 1 from the queue, 10 from the storage\)`, "",
		},
		"the first step fails": {[]string{"the storage is away"}, 1, `the storage is away"`, ""},
		"no step gets further": {
			[]string{`{"memory":0,"queue":0,"storage":0,"next":0}`}, 1, `the storage is too slow: .*again later`, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			admin := newFakeAdmin(t, test.answers...)
			got := runCommand(t, "purge", "--address", admin.address(), "--older-than", "30d")
			got.want(t, test.code, test.want)
			if !regexp.MustCompile(test.shown).MatchString(got.errOut) {
				t.Errorf("it shows %q, want %s", got.errOut, test.shown)
			}
			want := []string{"older_than=30d", "from=1024&older_than=30d", "from=3072&older_than=30d"}[:len(test.answers)]
			if !slices.Equal(admin.queries, want) {
				t.Errorf("it asked for %q, want %q", admin.queries, want)
			}
		})
	}
}

// On a terminal, the bar of a long purge grows in place, and disappears at the end.
func TestCommandPurgeOnATerminal(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("script"); err != nil || runtime.GOOS != "linux" {
		t.Skip("there is no script of Linux, which provides a terminal")
	}
	admin := newFakeAdmin(t, `{"memory":0,"queue":0,"storage":10,"next":2048}`, `{"memory":0,"queue":0,"storage":1}`)
	cmd := exec.CommandContext(t.Context(), "script", "-qec", "'"+os.Args[0]+"' fsbroker purge --all --address "+admin.address(), os.DevNull)
	cmd.Dir, cmd.Env = t.TempDir(), caddyEnv(t.TempDir())
	shown, err := cmd.CombinedOutput()
	want := "\r[##########----------]  50%  removed 0 from memory, 0 from the queue, 10 from the storage\x1b[K" +
		"\r\x1b[Kremoved 0 from memory, 0 from the queue, 11 from the storage\r\n"
	if err != nil || string(shown) != want {
		t.Errorf("%v: got %q\nwant %q", err, shown, want)
	}
}

// A command that is used wrongly purges nothing, and has an exit code of its own.
func TestCommandUsage(t *testing.T) {
	t.Parallel()
	admin := newFakeAdmin(t, `{"memory":0,"queue":0,"storage":0}`)
	const one = "exactly one of --submit-id, --app-server-id, --sha256, --older-than and --all"
	for line, want := range map[string]string{
		"":                                      "say what to do: caddy fsbroker nodes, cache, purge, harvest or give-up",
		"node":                                  "unknown command or an argument without a flag: see caddy fsbroker --help",
		"nodes node-1":                          "unknown command or an argument without a flag: see caddy fsbroker nodes --help",
		"nodes --secret " + callerSecret:        "unknown flag: --secret: see caddy fsbroker nodes --help",
		"cache --json=perhaps":                  `invalid argument.*for.*--json`,
		"purge":                                 one,
		"purge --all=false":                     one,
		"purge --all --sha256 ab":               one,
		"purge --submit-id s1 --sha256 ab":      one,
		"purge --task-id t1 --submit-id s1":     "--task-id needs --app-server-id",
		"purge --submit-id=":                    "--submit-id is empty: give it a value, or use --all",
		"purge --app-server-id a --task-id=":    "--task-id is empty",
		"cache --address":                       "flag needs an argument: --address",
		"nodes --address localhost:1-2":         "invalid admin address localhost:1-2.*give a host and a port",
		"nodes --address http://localhost:2019": "--address is not a URL: give a host and a port",
		"nodes --config missing.json":           "finding the admin API: .*missing.json.*correct the config, or give --address",
		"nodes --adapter caddyfile":             "cannot adapt config without config file",
		"nodes --config off.json":               "the config off.json turns the admin API off: turn it on",
		"purge --all --config off.caddyfile":    "the config off.caddyfile turns the admin API off",
		"purge --all --config broken.json":      "config is not valid JSON",
		"purge --all everything --address " + admin.address(): "argument without a flag",
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for name, content := range map[string]string{"off.json": `{"admin":{"disabled":true}}`, "off.caddyfile": "{\n\tadmin off\n}\n", "broken.json": "{"} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			args := strings.Fields(line)
			if strings.HasPrefix(line, "purge") && !strings.Contains(line, "--config") {
				args = append(args, "--address", admin.address())
			}
			runCommandIn(t, dir, args...).want(t, 2, want)
		})
	}
	t.Cleanup(func() {
		if len(admin.queries) > 0 {
			t.Errorf("there were the purges %q", admin.queries)
		}
	})
}

// Errors say what to do.
func TestCommandErrors(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, ""), "")
	runCommand(t, "purge", "--address", s.admin, "--submit-id", "s1").
		want(t, 1, `no upstream is configured that can know it: check appServerID, or configure a broker`)
	runCommand(t, "purge", "--address", s.admin, "--app-server-id", "node-1", "--task-id", "\n").want(t, 2, "give submitID, or")

	s.load("respond 404")
	for _, args := range [][]string{{"nodes"}, {"cache"}, {"purge", "--all"}} {
		runCommand(t, append(args, "--address", s.admin)...).want(t, 1, `no fsbroker_task is loaded in Caddy at `+s.admin+`: load a config`)
	}

	other := func(status int, body string) string {
		server := httptest.NewServer(responds(status, body))
		t.Cleanup(server.Close)
		return strings.TrimPrefix(server.URL, "http://")
	}
	for address, want := range map[string]string{
		testsite.Refused(t):                                            "cannot be reached at .*: is Caddy running, is its admin API on, and is it there.*give --address or --config: .*connect",
		other(http.StatusOK, "<html>"):                                 "is not Caddy's admin API",
		other(http.StatusTeapot, "<html>"):                             "is not Caddy's admin API, its status is 418: check --address",
		other(http.StatusNotFound, "404 page not found"):               "has no fsbroker_task: build Caddy with this plugin",
		other(http.StatusForbidden, `{"error":"host not allowed: x"}`): "refuses this address: host not allowed: x: .*origins",
	} {
		runCommand(t, "nodes", "--address", address).want(t, 1, want)
	}
}

// The command finds the admin API as `caddy reload` does, on a Unix socket as well.
func TestCommandAddress(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Caddy does not take the path of a socket with a drive letter")
	}
	node := newBackend(t, systemInfo)
	s := newAdminSite(t, "")
	socket := filepath.Join(t.TempDir(), "admin.sock")
	s.admin = "unix/" + socket + "|0220"
	s.adminBind = s.admin
	s.load(options(node, ""))
	const nodes = `node +node-1 `
	runCommand(t, "nodes", "--address", "unix/"+socket).want(t, 0, nodes)
	runCommand(t, "nodes", "--address", s.admin).want(t, 0, nodes)
	runCommand(t, "purge", "--all", "--address", s.admin).want(t, 0, "removed 0 from memory")

	dir := t.TempDir()
	runCommandIn(t, dir, "nodes").want(t, 1, "cannot be reached")
	for name, content := range map[string]string{
		"Caddyfile":  "{\n\tadmin " + s.admin + "\n}\n",
		"caddy.json": `{"admin":{"listen":"` + s.admin + `"}}`,
		"site.conf":  "{\n\tadmin " + s.admin + "\n}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range []string{"", "--config Caddyfile", "-c caddy.json", "-c site.conf -a caddyfile", "--config missing --address " + s.admin} {
		runCommandIn(t, dir, append([]string{"nodes"}, strings.Fields(args)...)...).want(t, 0, nodes)
	}
}

func TestCommandHelp(t *testing.T) {
	t.Parallel()
	for line, wanted := range map[string][]string{
		"--help":       {"nodes ", "cache ", "purge "},
		"nodes --help": {"--address", "--config", "--adapter", "--json"},
		"cache --help": {"--address", "--config", "--adapter", "--json"},
		"purge --help": {"--address", "--config", "--adapter", "--json", "--submit-id", "--app-server-id", "--task-id", "--sha256", "--older-than", "--all", "run it again"},
	} {
		got := runCommand(t, strings.Fields(line)...)
		for _, text := range append(wanted, "Exit codes:\n  0 ") {
			if got.code != 0 || !strings.Contains(got.out, text) {
				t.Errorf("%s: there is no %q: %+v", line, text, got)
			}
		}
	}
}

// The documented commands work.
func TestDocsCommands(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, "broker "+node.URL+"\n"+stored), "")
	commands := regexp.MustCompile(`(?m)^caddy fsbroker (.*?)( *#.*)?$`).FindAllStringSubmatch(readDoc(t, "OPERATION.md"), -1)
	if len(commands) < 5 {
		t.Fatalf("the page has only %d commands", len(commands))
	}
	for _, command := range commands {
		runCommand(t, append(strings.Fields(command[1]), "--address", s.admin)...).want(t, 0, ".")
	}
}
