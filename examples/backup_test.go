package examples_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
)

// TestBackup runs the commands of docs/BACKUP.md. Caddy stores a report and stops. Then the storage is backed up, lost and
// restored, and Caddy returns the report, which the node does not know any more.
func TestBackup(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("the commands are those of a Unix shell")
	}
	for _, program := range []string{"sh", "tar"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("there is no %s", program)
		}
	}
	for section, storages := range map[string]struct{ global, cache string }{
		"The storage of Caddy": {"storage file_system /var/lib/caddy", "storage"},
		"A folder":             {"", "storage file_system /var/lib/fsbroker"},
		"Any storage":          {"", "storage file_system /var/lib/fsbroker"},
	} {
		t.Run(section, func(t *testing.T) {
			t.Parallel()
			b := newBackup(t, storages.global, storages.cache)
			commands := b.section(t, section)
			if len(commands) != 2 {
				t.Fatalf("the section has the commands %q", commands)
			}

			want := b.report(t, http.StatusOK, "fsbroker; fwd=uri-miss; stored")
			b.shell.run(commands[0])
			b.forgotten.Store(true)
			b.lose(t)
			b.report(t, http.StatusNotFound, "fsbroker; fwd=uri-miss; detail=unknown_task")
			b.lose(t)
			b.shell.run(commands[1])
			if got := b.report(t, http.StatusOK, "fsbroker; hit; detail=storage"); got != want {
				t.Errorf("the report is %s, want %s", got, want)
			}

			archives, err := filepath.Glob(filepath.Join(b.dir, "var", "backups", "*"))
			if err != nil || len(archives) != 1 {
				t.Fatalf("the backups are %q (%v)", archives, err)
			}
			if info, err := os.Stat(archives[0]); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("others can read the backup: %v (%v)", info.Mode(), err)
			}
		})
	}
}

// backup is a Caddy whose storage is backed up.
type backup struct {
	dir         string // stands for the root of the file system
	shell       shell
	site, admin string
	forgotten   atomic.Bool // whether the node has deleted its tasks
}

func newBackup(t *testing.T, globalStorage, cacheStorage string) *backup {
	t.Helper()
	b := &backup{dir: t.TempDir(), shell: newShell(t), site: "http://" + freeAddress(t), admin: freeAddress(t)}
	node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if b.forgotten.Load() {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = io.WriteString(w, `{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"}}}`)
	}))
	t.Cleanup(node.Close)
	b.shell.home = b.dir
	for _, folder := range []string{"etc/caddy", "var/lib", "var/backups"} {
		if err := os.MkdirAll(filepath.Join(b.dir, folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(b.dir, "etc/caddy/Caddyfile"), b.move(fmt.Sprintf(`{
	admin %s
	persist_config off
	%s
}
%s {
	fsbroker_task {
		secret tester the-secret
		node node-1 %s
		cache {
			%s
		}
	}
}
`, b.admin, globalStorage, b.site, node.URL, cacheStorage)))
	return b
}

// move returns a text with all paths in the directory of the test.
func (b *backup) move(text string) string {
	return regexp.MustCompile(`/(?:etc|var)/`).ReplaceAllString(text, b.dir+"$0")
}

// section returns the commands of a section of the page. It writes the section's Caddyfile.backup, if there is one.
func (b *backup) section(t *testing.T, heading string) (commands []string) {
	t.Helper()
	_, text, found := strings.Cut(string(readFile(t, "../docs/BACKUP.md")), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("the page has no section %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for _, match := range regexp.MustCompile("(?s)```(\\w+)\n(.*?)```\n").FindAllStringSubmatch(text, -1) {
		if moved := b.move(match[2]); match[1] == "sh" {
			commands = append(commands, moved)
		} else {
			writeFile(t, filepath.Join(b.dir, "Caddyfile.backup"), moved)
		}
	}
	return commands
}

// lose deletes the storage.
func (b *backup) lose(t *testing.T) {
	t.Helper()
	folders, err := filepath.Glob(filepath.Join(b.dir, "var", "lib", "*"))
	if err != nil || len(folders) != 1 {
		t.Fatalf("the storages are %q (%v)", folders, err)
	}
	if err := os.RemoveAll(folders[0]); err != nil {
		t.Fatal(err)
	}
}

// report starts Caddy, requests the report of a task and stops Caddy, which first stores what is queued. It returns the
// body of the response.
func (b *backup) report(t *testing.T, status int, cacheStatus string) string {
	t.Helper()
	caddy := startCaddy(t, nil, filepath.Join(b.dir, "etc/caddy/Caddyfile"))
	response := get(t, b.site+"/task?appServerID=node-1&taskID=1", "the-secret", "")
	if got := response.Header.Get("Cache-Status"); response.StatusCode != status || got != cacheStatus {
		t.Errorf("the response is %d with %q, want %d with %q: %s", response.StatusCode, got, status, cacheStatus, response.body)
	}

	stop, err := http.Post("http://"+b.admin+"/stop", "", bytes.NewReader(nil))
	if err != nil {
		t.Fatal(err)
	}
	stop.Body.Close()
	caddy.waitFor("shutdown complete")
	caddy.wantEnd()
	return response.body
}
