package fsbroker_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
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

// askAdmin asks the admin API, whose answers hold no secret.
func (s *adminSite) askAdmin(method, path string) (status int, body string) {
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
