package examples_test

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// TestCORS checks the header fields of CORS without a browser. The tests in the folder clients have one.
func TestCORS(t *testing.T) {
	t.Parallel()
	const (
		portal, soc = "https://portal.example.com", "https://soc.example.com"
		task        = "/task?appServerID=node-1&taskID=1"
	)
	node := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"processTime":1,"result":{"taskReference":{"state":"IN_PROGRESS"}}}`)
	})
	site, secrets := startExample(t, "cors/Caddyfile", "ORIGIN="+portal, "NODE_1="+strings.TrimPrefix(node.URL, "https://"))
	secret := secrets["PORTAL_SECRET"]
	for _, test := range []struct {
		name, method, path string
		secret, origin     string
		status             int
		allowed            bool
	}{
		{"preflight", http.MethodOptions, task, "", portal, 204, true},
		{"preflight of the second origin", http.MethodOptions, task, "", soc, 204, true},
		{"report", http.MethodGet, task, secret, portal, 200, true},
		{"report for the second origin", http.MethodGet, task, secret, soc, 200, true},
		{"problem", http.MethodGet, task, "wrong", portal, 401, true},
		{"another path", http.MethodGet, "/", "", portal, 200, true},

		{"preflight of another origin", http.MethodOptions, task, "", portal + ".example.org", 204, false},
		{"preflight of another scheme", http.MethodOptions, task, "", "http://portal.example.com", 204, false},
		{"preflight of a sandboxed page", http.MethodOptions, task, "", "null", 204, false},
		{"report for another origin", http.MethodGet, task, secret, "https://example.org", 200, false},
		{"report for a program", http.MethodGet, task, secret, "", 200, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			request, err := http.NewRequestWithContext(testenv.Context(t), test.method, site+test.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := make(map[string]string)
			if test.allowed {
				want["Access-Control-Allow-Origin"] = test.origin
				want["Access-Control-Expose-Headers"] = "ETag, Retry-After, Cache-Status, Age, Preference-Applied"
			}
			if test.method == http.MethodOptions {
				request.Header.Set("Access-Control-Request-Method", http.MethodGet)
				request.Header.Set("Access-Control-Request-Headers", "authorization,prefer")
				if test.allowed {
					want["Access-Control-Allow-Methods"] = "GET, HEAD"
					want["Access-Control-Allow-Headers"] = "Authorization, Prefer, If-None-Match"
					want["Access-Control-Max-Age"] = "3600"
				}
			}
			if test.secret != "" {
				request.Header.Set("Authorization", "Bearer "+test.secret)
			}
			if test.origin != "" {
				request.Header.Set("Origin", test.origin)
			}
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != test.status {
				t.Errorf("got %s, want %d", response.Status, test.status)
			}
			got := make(map[string]string)
			for name, values := range response.Header {
				if strings.HasPrefix(name, "Access-Control-") {
					got[name] = strings.Join(values, " and ")
				}
			}
			if !maps.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			if vary := response.Header.Values("Vary"); !slices.Contains(vary, "Origin") {
				t.Errorf("Vary is %q, want Origin in it", vary)
			}
		})
	}
}
