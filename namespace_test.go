package fsbroker_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// inNamespace returns the option for a namespace.
func inNamespace(name, more string) string {
	return fmt.Sprintf("cache {\n namespace %s\n %s\n }", name, more)
}

// at returns a directive with another path.
func at(path, directive string) string {
	return strings.Replace(directive, "fsbroker_task", "fsbroker_task "+path, 1)
}

// Two namespaces share nothing, although they name one node alike, at one address, behind two transports.
func TestNamespacesShareNothing(t *testing.T) {
	node := startTLSServer(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	site := func(path, namespace, transport string) string {
		return fmt.Sprintf("fsbroker_task %s {\n secret {env.CALLER_SECRET}\n node node-1 %s\n transport http {\n tls\n %s\n }\n cache {\n namespace %s\n storage\n }\n }\n",
			path, node.URL, transport, namespace)
	}
	s := startSite(t, site("/careless", "careless", "tls_insecure_skip_verify")+site("/strict", "strict", ""))
	query := "?appServerID=node-1&taskID=t1"
	s.get("/careless"+query).wantStatus(t, http.StatusOK)
	s.wantValues(1)
	s.get("/careless"+query).wantHeader(t, "Cache-Status", "fsbroker; hit")
	for range 2 { // not from memory, not from the storage
		s.get("/strict"+query).wantStatus(t, http.StatusBadGateway)
		s.restart(site("/careless", "careless", "tls_insecure_skip_verify") + site("/strict", "strict", ""))
	}
	s.get("/careless"+query).wantHeader(t, "Cache-Status", "fsbroker; hit; detail=storage")
}

// The policy of one namespace does not apply to the reports of another, whoever asks first.
func TestNamespacesHaveTheirOwnPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
		brief := at("/brief", options(node, inNamespace("brief", "ttl 300ms")))
		lasting := at("/lasting", options(node, inNamespace("lasting", "ttl 1h\n storage")))
		query := "?appServerID=node-1&taskID=t1"
		s := startSite(t, brief+"\n"+lasting)
		s.get("/brief"+query).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
		s.get("/lasting"+query).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
		s.wantValues(1)
		s.getUntil("/brief"+query, "the brief one to expire", func(r reply) bool {
			return r.header.Get("Cache-Status") == "fsbroker; fwd=uri-miss; stored"
		})
		s.get("/lasting"+query).wantHeader(t, "Cache-Status", "fsbroker; hit")
		node.setHandler(responds(http.StatusNotFound, ""))
		time.Sleep(400 * time.Millisecond) // beyond the brief TTL
		s.get("/brief"+query).wantStatus(t, http.StatusNotFound)
		s.get("/lasting"+query).wantHeader(t, "Cache-Status", "fsbroker; hit")
	})
}

// All handlers of a namespace share its reports, and ask its upstreams once.
func TestHandlersOfOneNamespace(t *testing.T) {
	g := newGate()
	node := newBackend(t, g.then(responds(http.StatusOK, reportOf("t1", "SUCCESS"))))
	s := startSite(t, at("/one", options(node, "max_wait 1s"))+"\n"+at("/other", strings.Replace(options(node, ""), "secret tester", "secret another", 1)))
	query := "?appServerID=node-1&taskID=t1"
	one := s.goGet("/one" + query)
	within(t, "the request", g.entered)
	other := s.goGet("/other" + query)
	wantHeld(t, 2)
	close(g.open)
	(<-one).wantStatus(t, http.StatusOK)
	(<-other).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; collapsed")
	node.wantRequests(t, 1)
}

// A node that moves, or goes from http to https, keeps its reports.
func TestNodeThatMoves(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	before := newBackend(t, responds(http.StatusOK, document))
	after := startTLSServer(t, responds(http.StatusNotFound, ""))
	moved := fmt.Sprintf("fsbroker_task {\n secret tester {env.CALLER_SECRET}\n node node-1 %s\n transport http {\n tls_trust_pool file %s\n }\n %s\n}", after.URL, pinned(t, after), stored)
	s := startSite(t, options(before, stored))
	s.get(pair).wantStatus(t, http.StatusOK)
	s.wantValues(1)
	s.load(moved)
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
	s.restart(moved)
	if r := s.get(pair); string(r.body) != document || r.header.Get("Cache-Status") != "fsbroker; hit; detail=storage" {
		t.Errorf("status %d, %s: %s", r.status, r.header.Get("Cache-Status"), r.body)
	}
}

// Handlers of one namespace that differ are refused, and the error names the option and both places.
func TestHandlersThatDiffer(t *testing.T) {
	s := newSite(t)
	const one = "secret a {env.CALLER_SECRET}\n node node-1 10.0.0.1:22001 {env.NODE_SECRET}\n broker 10.0.0.2:23001 unspeakable"
	site := func(path, options string) string { return "fsbroker_task " + path + " {\n" + options + "\n}\n" }
	for option, other := range map[string]string{
		`node "node-1"`:      strings.Replace(one, "10.0.0.1", "10.0.0.3", 1),
		`node "node-2"`:      one + "\n node node-2 10.0.0.4:22001",
		"broker":             strings.Replace(one, "unspeakable", "unutterable", 1),
		"transport":          one + "\n transport http {\n dial_timeout 1s\n }",
		"timeout":            one + "\n timeout 1s",
		"poll_interval":      one + "\n poll_interval 1s",
		"max_report":         one + "\n max_report 1MiB",
		"fail_duration":      one + "\n fail_duration 1s",
		"health_interval":    one + "\n health_interval 1s",
		"health_timeout":     one + "\n health_timeout 1s",
		"ttl":                one + "\n cache {\n ttl 1h\n }",
		"max_size":           one + "\n cache {\n max_size 1MiB\n }",
		"retention":          one + "\n cache {\n storage\n }", // the default of which differs
		"encryption_key":     one + "\n cache {\n storage\n encryption_key " + strings.Repeat("0f", 32) + "\n }",
		"accept_unencrypted": one + "\n cache {\n storage\n accept_unencrypted\n encryption_key " + strings.Repeat("0f", 32) + "\n }",
	} {
		t.Run(option, func(t *testing.T) {
			err := s.tryLoad(site("/one", one) + site("/other", other))
			if err == nil {
				t.Fatal("it was taken")
			}
			for _, want := range []string{`namespace "default"`, option, "Caddyfile:", "configure them alike", "namespace"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if strings.Count(err.Error(), "Caddyfile:") < 2 {
				t.Errorf("the error does not name both places: %v", err)
			}
			if strings.Contains(err.Error(), "unspeakable") || strings.Contains(err.Error(), "unutterable") {
				t.Errorf("the error shows a secret: %v", err)
			}
			// Each in a namespace of its own is the way out.
			separate := other + "\n cache {\n namespace other\n }"
			if strings.Contains(other, "cache {") {
				separate = strings.Replace(other, "cache {", "cache {\n namespace other", 1)
			}
			if err := s.tryLoad(site("/one", one) + site("/other", separate)); err != nil {
				t.Error(err)
			}
		})
	}
	err := s.tryLoad(site("/one", one+"\n cache {\n storage\n }") + site("/other", one+"\n cache {\n storage file_system /x\n }"))
	if err == nil || !strings.Contains(err.Error(), "differ in storage") {
		t.Errorf("two storages: %v", err)
	}
	for name, alike := range map[string]string{
		"another client's secret":  strings.Replace(one, "secret a {env.CALLER_SECRET}", "secret b {env.BROKER_SECRET}", 1),
		"another max_wait":         one + "\n max_wait 1s",
		"a default, written":       one + "\n timeout 30s\n transport http\n cache {\n namespace default\n ttl 24h\n }",
		"options in another order": "broker 10.0.0.2:23001 unspeakable\n node node-1 10.0.0.1:22001 {env.NODE_SECRET}\n secret a {env.CALLER_SECRET}",
	} {
		if err := s.tryLoad(site("/one", one) + site("/other", alike)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A JSON configuration has no lines, but is checked as well.
func TestHandlersThatDifferInJSON(t *testing.T) {
	s := newSite(t)
	handler := func(more string) string {
		return `{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1", "secret": "unspeakable"}]` + more + `}`
	}
	load := func(one, other string) error {
		return caddy.Load([]byte(fmt.Sprintf(`{`+quiet+`, "apps": {"http": {"servers": {
			"one": {"listen": [%q], "automatic_https": {"disable": true}, "routes": [{"handle": [%s]}]},
			"other": {"listen": [%q], "automatic_https": {"disable": true}, "routes": [{"handle": [%s]}]}}}}}`,
			s.bind, one, testsite.Listen(t).Bind, other)), true)
	}
	err := load(handler(""), handler(`, "poll_interval": "1s"`))
	if err == nil || !strings.Contains(err.Error(), "poll_interval") || strings.Count(err.Error(), "server on [fd/") != 2 || strings.Contains(err.Error(), "unspeakable") {
		t.Errorf("got %v", err)
	}
	if err := load(handler(""), handler(`, "cache": {"namespace": "b"}, "poll_interval": "1s"`)); err != nil {
		t.Error(err)
	}
	if err := load(handler(""), handler(`, "max_wait": "1s"`)); err != nil {
		t.Error(err)
	}
	if err := load(handler(`, "cache": {"namespace": "a b"}`), handler("")); err == nil || !strings.Contains(err.Error(), "namespace must be") {
		t.Errorf("got %v", err)
	}
}

// A purge removes the reports of a task in every namespace, each from its own storage folder.
func TestPurgeOfSeveralNamespaces(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	one := at("/one", options(node, inNamespace("one", "storage")))
	other := at("/other", options(node, inNamespace("other", "storage")))
	s := startWithAdmin(t, one+"\n"+other, "")
	for _, path := range []string{"/one", "/other"} {
		for _, task := range []string{"t1", "t2"} {
			s.get(path+"?appServerID=node-1&taskID="+task).wantStatus(t, http.StatusOK)
		}
	}
	s.wantValues(4)
	s.wantQueueEmpty()
	s.wantAdmin(http.MethodDelete, "/fsbroker/cache?appServerID=node-1&taskID=t1", http.StatusOK, `{"memory":2,"queue":0,"storage":2}`)
	s.wantValues(2)
	for _, path := range []string{"/one", "/other"} {
		s.get(path+"?appServerID=node-1&taskID=t2").wantHeader(t, "Cache-Status", "fsbroker; hit")
		s.get(path+"?appServerID=node-1&taskID=t1").wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
	}
	s.wantValues(4)
	s.wantQueueEmpty()
	s.wantAdmin(http.MethodDelete, "/fsbroker/cache", http.StatusOK, `{"memory":4,"queue":0,"storage":4}`)
	s.wantValues(0)
}

// A configuration that fails half way, or is only validated, leaves nothing behind.
func TestConfigurationsThatHoldNothing(t *testing.T) {
	s := newSite(t)
	handler := func(more string) string {
		return `{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "broker": {"address": "b:1"}, "harvest": {},
			"cache": {"namespace": "failing", "storage": {}}` + more + `}`
	}
	config := func(one, other string) []byte {
		return []byte(fmt.Sprintf(`{`+quiet+`, "storage": {"module": "folder", "dir": %q}, "apps": {"http": {"servers": {
			"one": {"listen": [%q], "automatic_https": {"disable": true}, "routes": [{"handle": [%s]}, {"handle": [%s]}]}}}}}`, s.dir, s.bind, one, other))
	}
	wantUsers := func(t *testing.T, want int) {
		t.Helper()
		if n := fsbroker.NamespaceUsers("failing"); n != want {
			t.Errorf("%d configurations use the namespace, want %d", n, want)
		}
	}
	fail := func(t *testing.T, users int) {
		for name, load := range map[string]struct{ one, other, err string }{
			"an address":     {handler(`, "nodes": [{"app_server_id": "a", "address": "a"}]`), handler(""), "no port"},
			"a secret":       {handler(`, "nodes": [{"app_server_id": "a", "address": "a:1", "secret": "{env.NOT_SET}"}]`), handler(""), "NOT_SET"},
			"a passed path":  {handler(`, "broker": {"address": "b:1", "proxy": ["/task"]}`), handler(""), "broker: "},
			"a storage":      {handler(`, "cache": {"namespace": "failing", "storage": {"module": "none"}}`), handler(""), "none"},
			"a transport":    {handler(`, "transport": {"protocol": "fastcgi"}`), handler(""), "fastcgi"},
			"another option": {handler(""), handler(`, "timeout": "1s"`), "differ in timeout"},
			"another module": {handler(""), `{"handler": "none"}`, "none"},
		} {
			t.Run(name, func(t *testing.T) {
				if err := caddy.Load(config(load.one, load.other), true); err == nil || !strings.Contains(err.Error(), load.err) {
					t.Errorf("got %v, want something with %q", err, load.err)
				}
				wantUsers(t, users)
			})
		}
		var valid caddy.Config
		if err := json.Unmarshal(config(handler(""), handler("")), &valid); err != nil {
			t.Fatal(err)
		}
		if err := caddy.Validate(&valid); err != nil {
			t.Error(err)
		}
		wantUsers(t, users)
	}
	t.Run("first", func(t *testing.T) { fail(t, 0) })
	t.Run("beside one that runs", func(t *testing.T) {
		if err := caddy.Load(config(handler(""), handler("")), true); err != nil {
			t.Fatal(err)
		}
		fail(t, 1)
	})
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	wantUsers(t, 0)
}
