package fsbroker_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// adminSite is a site whose Caddy has its admin API.
type adminSite struct {
	*site
	admin  string // host:port
	global string // options
	client http.Client
}

// startWithAdmin runs a site with the admin API, and with global options.
func startWithAdmin(t *testing.T, directives, global string) *adminSite {
	t.Helper()
	s := &adminSite{
		site: newSite(t), admin: fmt.Sprintf("localhost:%d", freePort(t)), global: global,
		client: http.Client{Transport: &http.Transport{DisableKeepAlives: true}},
	}
	// Stopping leaves the admin API alone.
	t.Cleanup(func() {
		if err := caddy.Load([]byte(`{"admin": {"disabled": true}}`), true); err != nil {
			t.Error(err)
		}
	})
	s.load(directives)
	s.trust()
	return s
}

// load makes directives the site's, like a reload when it runs already.
func (s *adminSite) load(directives string) {
	s.t.Helper()
	text := strings.Replace(s.caddyfile(directives), "admin off", "admin "+s.admin+"\n"+s.global, 1)
	if err := s.loadCaddyfile(text); err != nil {
		s.t.Fatal(err)
	}
}

// requestAdmin asks the admin API, whose answers hold no secret.
func (s *adminSite) requestAdmin(method, path string) (status int, body string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.admin+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, secret := range allSecrets {
		if bytes.Contains(text, []byte(secret)) {
			s.t.Errorf("%s %s: the answer holds a secret: %s", method, path, text)
		}
	}
	return resp.StatusCode, string(text)
}

// scrape reads /metrics of the admin API: values by series.
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

// wantMetrics checks series, once they have had the time to be counted; one that wants to be "" may not be there. What is
// counted, is counted from before on, since counters live as long as the process.
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

// number is the value of a counter, which may not be there yet.
func number(t testing.TB, value string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(value, &n); err != nil && value != "" {
		t.Fatal(err)
	}
	return n
}

// wantAdmin checks an answer of the admin API, without times.
func (s *adminSite) wantAdmin(method, path string, status int, want string) {
	s.t.Helper()
	code, body := s.requestAdmin(method, path)
	got := strings.TrimSpace(regexp.MustCompile(`"at":"[^"]+"`).ReplaceAllString(body, `"at":"…"`))
	if code != status || got != want {
		s.t.Errorf("%s %s: status %d, want %d\ngot  %s\nwant %s", method, path, code, status, got, want)
	}
}
