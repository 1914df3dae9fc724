package fsbroker

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// counted is how many requests TestCountedRequests sends.
const counted = 100

// environment has the home of the user, with the caches of Go. TestMain replaces it.
var environment = os.Environ()

// A request calls the methods of memory only so often. Another process counts the calls, with the counters of test coverage.
func TestCallsOfMemory(t *testing.T) {
	SkipUnlessSlow(t)
	binary := filepath.Join(t.TempDir(), "counting")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-covermode=count", "-o", binary, ".")
	build.Env = environment
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, what := range []string{"miss", "stored"} {
		calls := callsOfMemory(t, binary, what)
		t.Logf("%s: %v", what, calls)
		sum := 0
		for _, name := range []string{"get", "newest", "keep", "acquireContent", "releaseContent", "purge", "setLimit"} { // what others call
			sum += calls[name]
		}
		if calls["get"] != 2 || calls["keep"] != 1 || sum > 8 {
			t.Errorf("%s: %d calls from outside: %v", what, sum, calls)
		}
	}
}

// callsOfMemory returns how often each method of memory is called for a request.
func callsOfMemory(t *testing.T, binary, what string) map[string]int {
	t.Helper()
	profile := filepath.Join(t.TempDir(), "profile")
	cmd := exec.CommandContext(t.Context(), binary, "-test.run", "^TestCountedRequests$", "-test.coverprofile", profile)
	cmd.Env = append(os.Environ(), "COUNTED_REQUESTS="+what)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	methods := make(map[string]string) // by where their bodies begin
	files := token.NewFileSet()
	source, err := parser.ParseFile(files, "cache.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range source.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Recv != nil {
			if star, ok := f.Recv.List[0].Type.(*ast.StarExpr); ok && fmt.Sprint(star.X) == "memory" {
				at := files.Position(f.Body.Lbrace)
				methods[fmt.Sprintf("/cache.go:%d.%d,", at.Line, at.Column)] = f.Name.Name
			}
		}
	}
	text, err := os.Open(profile)
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	calls := make(map[string]int)
	for lines := bufio.NewScanner(text); lines.Scan(); {
		for at, name := range methods {
			if block, fields := lines.Text(), strings.Fields(lines.Text()); strings.Contains(block, at) {
				var n int
				if _, err := fmt.Sscan(fields[2], &n); err != nil {
					t.Fatal(err)
				}
				if n >= counted {
					calls[name] = n / counted
				}
			}
		}
	}
	return calls
}

// TestCountedRequests sends what TestCallsOfMemory counts.
func TestCountedRequests(t *testing.T) {
	what := os.Getenv("COUNTED_REQUESTS")
	if what == "" {
		t.Skip("TestCallsOfMemory runs it")
	}
	node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(benchDocument(15 << 10)) }))
	defer node.Close()
	h := benchSite(t, []string{node.URL}, &storage{Backend: &archive.Backend{
		Storage: &certmagic.FileStorage{Path: t.TempDir()}, Logger: zap.NewNop(), Retention: defaultRetention,
	}}, 0, 15<<10)
	want := "fsbroker; fwd=uri-miss; stored"
	if what == "stored" {
		want = "fsbroker; hit; detail=storage"
		a := archive.New(archive.Config{Namespace: defaultNamespace})
		a.Attach(h.site.storage.Backend)
		defer a.Close()
		report, err := task.ReadReport(strings.NewReader(string(benchDocument(15<<10))), func(int64) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		for i := range counted {
			d := report.Document()
			d.File = [sha256.Size]byte(numbered(i))
			a.Save(archive.Item{Key: task.ReportKey(h.site.nodes["node-0"].source, fmt.Sprintf("t%d", i), task.Summary), Report: task.NewReport(d)})
		}
		for a.Stats().Queued > 0 {
			time.Sleep(time.Millisecond)
		}
	}
	for i := range counted {
		w := httptest.NewRecorder()
		if err := h.ServeHTTP(w, benchRequest(fmt.Sprintf("appServerID=node-0&taskID=t%d", i)), nil); err != nil || w.Header().Get("Cache-Status") != want {
			t.Fatalf("%s: %v: %v", what, err, w.Header())
		}
	}
	for h.site.archive.Stats().Queued > 0 {
		time.Sleep(time.Millisecond)
	}
}
