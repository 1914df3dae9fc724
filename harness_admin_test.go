package fsbroker_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// adminSite is a site of a Caddy that has its admin API on.
type adminSite struct {
	*site
	admin       string // host:port
	adminBind   string // that address, as Caddy knows it
	adminClient *http.Client
}

// in returns the site for a subtest, so that the subtest reports what fails.
func (s *adminSite) in(t testing.TB) *adminSite {
	sub := *s
	sub.site = s.site.in(t)
	return &sub
}

// startWithAdmin runs a site with the admin API and global options.
func startWithAdmin(t *testing.T, directives, global string) *adminSite {
	t.Helper()
	s := newAdminSite(t, global)
	s.load(directives)
	s.trust()
	return s
}

// newAdminSite returns a site with the admin API and global options that does not run yet.
func newAdminSite(t *testing.T, global string) *adminSite {
	t.Helper()
	recorded.Store(new(recording))
	socket := newSocket(t)
	s := &adminSite{
		site: newSite(t), admin: socket.Address, adminBind: socket.Bind,
		adminClient: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
	}
	s.global += "\n" + global
	// caddy.Stop does not stop the admin API.
	t.Cleanup(func() {
		if err := caddy.Load([]byte("{"+quiet+"}"), true); err != nil {
			t.Error(err)
		}
	})
	return s
}

// load loads a configuration with directives. If the site runs already, this is a reload.
func (s *adminSite) load(directives string) {
	s.t.Helper()
	if err := testsite.Load([]byte(s.withAdmin(directives))); err != nil {
		s.t.Fatal(err)
	}
}

// withAdmin returns a Caddyfile that has the directives in its one site.
func (s *adminSite) withAdmin(directives string) string {
	s.t.Helper()
	return strings.Replace(s.caddyfile(directives), "admin off", fmt.Sprintf("admin %s {\n origins %s\n }", s.adminBind, s.admin), 1)
}

// requestAdmin sends a request to the admin API, and fails the test at once on an error.
func (s *adminSite) requestAdmin(method, path string) (status int, body string) {
	s.t.Helper()
	status, body, err := s.tryAdmin(method, path)
	if err != nil {
		s.t.Fatal(err)
	}
	return status, body
}

// tryAdmin is like requestAdmin, and returns the error. Any goroutine may call it.
func (s *adminSite) tryAdmin(method, path string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.admin+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := send(s.adminClient, req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, "", err
	}
	for _, secret := range allSecrets {
		if bytes.Contains(text, []byte(secret)) {
			s.t.Errorf("%s %s: the response holds a secret: %s", method, path, text)
		}
	}
	return resp.StatusCode, string(text), nil
}

// scrape returns the module's metrics, as /metrics of the admin API has them: values by series.
func (s *adminSite) scrape() map[string]string {
	s.t.Helper()
	status, text := s.requestAdmin(http.MethodGet, "/metrics")
	if status != http.StatusOK {
		s.t.Fatalf("status %d: %s", status, text)
	}
	series := make(map[string]string)
	for line := range strings.Lines(text) {
		if i := strings.LastIndexByte(line, ' '); strings.HasPrefix(line, "caddy_fsbroker_") {
			series[line[:i]] = strings.TrimSpace(line[i:])
		}
	}
	return series
}

// wantMetrics waits until series have the wanted values. The value "" means that the series must not exist. Counters live
// as long as the process, so what they are wanted to count is added to their values in before.
func (s *adminSite) wantMetrics(before, want map[string]string) {
	s.t.Helper()
	for series, value := range want {
		counted := strings.Contains(series, "_total") || strings.Contains(series, "_count")
		series = "caddy_fsbroker_" + series
		if was := number(s.t, before[series]); counted && was > 0 {
			value = fmt.Sprint(was + number(s.t, value))
		}
		eventually(s.t, fmt.Sprintf("%s is %q", series, value), func() bool { return s.scrape()[series] == value })
	}
}

// number parses the value of a counter. A counter that does not exist yet is 0.
func number(t testing.TB, value string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(value, &n); err != nil && value != "" {
		t.Fatal(err)
	}
	return n
}

// wantQueueEmpty waits until nothing is queued for a storage any more.
func (s *adminSite) wantQueueEmpty() {
	s.t.Helper()
	eventually(s.t, "the queue to be empty", func() bool {
		_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
		return !regexp.MustCompile(`"queued":[^0]`).MatchString(body)
	})
}

// wantAdmin checks a response of the admin API, apart from the times in it.
func (s *adminSite) wantAdmin(method, path string, status int, want string) {
	s.t.Helper()
	if err := s.checkAdmin(method, path, status, want); err != nil {
		s.t.Error(err)
	}
}

// checkAdmin is like wantAdmin, and returns the error. Any goroutine may call it.
func (s *adminSite) checkAdmin(method, path string, status int, want string) error {
	code, body, err := s.tryAdmin(method, path)
	if err != nil {
		return err
	}
	got := strings.TrimSpace(regexp.MustCompile(`"at":"[^"]+"`).ReplaceAllString(body, `"at":"…"`))
	if code != status || got != want {
		return fmt.Errorf("%s %s: status %d, want %d\ngot  %s\nwant %s", method, path, code, status, got, want)
	}
	return nil
}

// queued returns the number of values that are queued for the storage of the default namespace.
func (s *adminSite) queued() int {
	s.t.Helper()
	_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
	var caches map[string]struct{ Storage struct{ Queued int } }
	if err := json.Unmarshal([]byte(body), &caches); err != nil {
		s.t.Fatal(err)
	}
	return caches["default"].Storage.Queued
}
