package fsbroker_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

func TestMatchers(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	for _, matcher := range []string{"/reports/*", "*", "@reports"} {
		directives := strings.Replace(options(node, ""), "fsbroker_task", "fsbroker_task "+matcher, 1)
		s := startSite(t, "@reports path /reports/1\n"+directives)
		s.get("/reports/1?appServerID=node-1&taskID=t1").wantStatus(t, http.StatusOK)
	}
}

func TestOtherPathsPass(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, "")+"\nrespond \"not ours\" 418")
	for _, path := range []string{"/", "/tasks", "/task/", "/task/x", "/submit", "/x/task"} {
		s.get(path).wantStatus(t, http.StatusTeapot)
	}
	s.get(pair).wantStatus(t, http.StatusOK)
	s.get("/task").wantProblem(t, http.StatusBadRequest, "missing_parameter")
}

func TestJSON(t *testing.T) {
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	broker := newBackend(t, explains(`{"appServerID":"node-1","taskID":"t1"}`))
	s := newSite(t)
	load := func(handler string) error {
		config := fmt.Sprintf(`{
			`+quiet+`,
			"storage": {"module": "folder", "dir": %q},
			"apps": {
				"tls": {"certificates": {"load_files": [{"certificate": %q, "key": %q}]}},
				"http": {"servers": {"test": {
					"listen": [%q], "protocols": ["h1", "h2"],
					"automatic_https": {"disable": true},
					"tls_connection_policies": [{}],
					"routes": [{"match": [{"host": ["localhost"], "path": ["/task"]}], "handle": [%s]}, {"match": [{"host": ["localhost"]}]}]
				}}}
			}
		}`, s.dir, s.write("cert.pem", testsite.Localhost().PEM), s.write("key.pem", testsite.Localhost().Key), s.bind, handler)
		return caddy.Load([]byte(config), true)
	}
	if err := load(fmt.Sprintf(`{
		"handler": "fsbroker_task",
		"secrets": [{"client": "tester", "secret": "{env.CALLER_SECRET}"}],
		"nodes": [{"app_server_id": "node-1", "address": %q, "secret": "{env.NODE_SECRET}", "secret_in": ["secret"]}],
		"broker": {"address": %q, "secret": "{env.BROKER_SECRET}"},
		"transport": {"protocol": "http", "dial_timeout": "1s"},
		"timeout": "5s", "poll_interval": "1s", "max_wait": "90s", "max_report": 1000000, "fail_duration": "1s",
		"cache": {"ttl": "1h", "max_size": 1000000}
	}`, node.URL, broker.URL)); err != nil {
		t.Fatal(err)
	}
	s.trust()
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	s.get("/task?submitID=s1").wantHeader(t, "Cache-Status", "fsbroker; hit")

	for handler, want := range map[string]string{
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "broker": {"address": "a:1", "proxy": ["submit"]}}`:                         "a path in proxy must be",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "broker": {"address": "a:1", "proxy": ["/task"]}}`:                          "proxy cannot have /task",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s", "allow": ["/file"]}], "broker": {"address": "a:1", "proxy": ["/submit"]}}`:    "which is not served",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s", "allow": ["/task"]}, {"secret": "t"}], "broker": {"address": "a:1"}}`:         "secret 2: the secrets of client default differ in allow",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1", "proxy": ["/submit"]}]}`: "unknown field",
		`{"handler": "fsbroker_task"}`:                                                                                                                                                  "no secret is configured",
		`{"handler": "fsbroker_task", "secrets": [{"secret": ""}]}`:                                                                                                                     "the secret is empty",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{env.NOT_SET}"}]}`:                                                                                                        "{env.NOT_SET} has no value: the environment variable is not set",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{no.such}"}]}`:                                                                                                            "unrecognized placeholder {no.such}",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "one {env.NOT_SET}"}]}`:                                                                                                    "braces",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "an{unspeakable}one"}]}`:                                                                                                   "braces",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{unspeakable}"}]}`:                                                                                                        "braces",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "{file./no/such/file}"}]}`:                                                                                                 "{file./no/such/file} has no value: there is no such file",
		`{"handler": "fsbroker_task", "secrets": [{"client": "a b", "secret": "s"}]}`:                                                                                                   "client's name must be",
		`{"handler": "fsbroker_task", "secrets": [{"client": "a", "secret": "s"}, {"client": "b", "secret": "s"}]}`:                                                                     "share one secret",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}]}`:                                                                                                                    "no upstream is configured",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"address": "a:1"}]}`:                                                                                     "application server ID must be",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "ftp://a"}]}`:                                                           `node "a": the address must be`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1", "secret_in": ["x"]}]}`:                                           "secret_in must be one or several of",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1", "secret": "{env.NO}"}]}`:                                         "{env.NO} has no value: the environment variable is not set",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "{env.NO}"}]}`:                                                          "{env.NO} has no value: the environment variable is not set",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "broker": {}}`:                                                 "broker: the address must be",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "timeout": -1}`:                                                "timeout must be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "max_wait": -1}`:                                               "max_wait must be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "health_interval": -1}`:                                        "health_interval must be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "health_timeout": -1}`:                                         "health_timeout must be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"ttl": -1}}`:                                         "cache.ttl must be more than 0",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "transport": {"protocol": "no"}}`:                              "unknown module",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "transport": {"protocol": "fastcgi"}}`:                         "is not supported: use http",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "transport": {"protocol": "http", "proxy_protocol": "v2"}}`:    "proxy_protocol is not supported",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}, {"app_server_id": "a", "address": "b:1"}]}`:                     `node "a" is configured twice`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "{env.NO}:1"}]}`:                                                        "{env.NO} has no value: the environment variable is not set",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "127.0.0.1"}]}`:                                                         `node "a": the address has no port: write host:port`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "broker": {"address": "[::1]"}}`:                                                                                    "broker: the address has no port: write host:port",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "timeout": 30}`:                                                `timeout is only 30ns: in JSON, a number is in nanoseconds; write a string with the unit, such as "30s"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "timeout": 30000}`:                                             `timeout is only 30µs: in JSON, a number is in nanoseconds; write a string with the unit, such as "30000ms"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "poll_interval": 2}`:                                           `poll_interval is only 2ns: in JSON, a number is in nanoseconds; write a string with the unit, such as "2s"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "max_wait": 60}`:                                               `such as "60s"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "fail_duration": 10}`:                                          `such as "10s"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "health_interval": 30}`:                                        `such as "30s"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "health_timeout": 5}`:                                          `such as "5s"`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "timeout": "999us"}`:                                           `timeout is only 999µs`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"ttl": 24}}`:                                         `cache.ttl is only 24ns`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"storage": {}, "retention": 30}}`:                    `cache.retention is only 30ns`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"max_size": -1}}`:                                    `cache.max_size must be more than 0`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"storage": "/var/lib/x"}}`:                           `cache.storage must be an object, such as {"module": "file_system", "root": "/var/lib/fsbroker"}`,
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"encryption_keys": ["unspeakable"]}}`:                "encryption_key needs a storage",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"storage": {}, "encryption_keys": ["unspeakable"]}}`: "encryption key 1 must be 32 bytes",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"storage": {}, "encryption_keys": [""]}}`:            "the secret is empty",
		`{"handler": "fsbroker_task", "secrets": [{"secret": "s"}], "nodes": [{"app_server_id": "a", "address": "a:1"}], "cache": {"storage": {}, "accept_unencrypted": true}}`:         "accept_unencrypted needs a key",
		`{"handler": "fsbroker_task", "no_such": 1}`: "unknown field",
	} {
		err := load(handler)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", handler, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "unspeakable") {
			t.Errorf("%s: the error holds a part of a secret: %v", handler, err)
		}
	}
	// A configuration that does not load changes nothing.
	s.get("/task?submitID=s1").wantHeader(t, "Cache-Status", "fsbroker; hit")
}

// Why a placeholder has no value is told, for a secret and for an address.
func TestPlaceholdersWithoutValue(t *testing.T) {
	t.Setenv("EMPTY_SECRET", "")
	folder := filepath.ToSlash(t.TempDir())
	empty, lineBreak := writeFile(t, ""), writeFile(t, "\r\n")
	for placeholder, want := range map[string]string{
		"{env.NOT_SET_AT_ALL}":           "{env.NOT_SET_AT_ALL} has no value: the environment variable is not set: set it for the process that runs Caddy, as a service has an environment of its own",
		"{env.EMPTY_SECRET}":             "{env.EMPTY_SECRET} has no value: the environment variable is set, but empty",
		"{file." + folder + "/missing}":  "{file." + folder + "/missing} has no value: there is no such file",
		"{file.no-such-folder/missing}":  "/no-such-folder/missing",
		"{file." + empty + "}":           "{file." + empty + "} has no value: the file is empty",
		"{file." + lineBreak + "}":       "{file." + lineBreak + "} has no value: the file has nothing but a line break",
		"{file." + folder + "}":          "is a directory",
		"{file." + empty + "/not-there}": "not a directory",
	} {
		for option, text := range map[string]string{
			"resolving the secret":  "secret tester " + placeholder + "\nnode n1 a:1",
			"resolving the address": "secret {env.CALLER_SECRET}\nnode n1 " + placeholder,
		} {
			t.Run(option+" "+placeholder, func(t *testing.T) {
				err := newSite(t).tryLoad("fsbroker_task {\n" + text + "\n}")
				if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), option) {
					t.Errorf("got  %v\nwant %s: %s", err, option, want)
				}
			})
		}
	}
}

// What is probably not meant is said when the configuration is loaded, once for each namespace.
func TestDoubtsAreLogged(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startSite(t, options(node, "poll_interval 1ms")+"\n"+strings.Replace(options(node, "poll_interval 1ms"), "fsbroker_task", "fsbroker_task /other", 1))
	lines := s.logged("poll_interval is only 1ms")
	if len(lines) != 1 || lines[0]["level"] != "warn" || lines[0]["namespace"] != "default" || lines[0]["logger"] != "http.handlers.fsbroker_task" {
		t.Errorf("the log has %v", lines)
	}
}

// A matcher that leaves the path open is warned of when the Caddyfile is loaded.
func TestMatchersWithoutAPath(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startSite(t, options(node, ""))
	warnings := func() []map[string]any { return s.logged("the matcher of fsbroker_task has no path") }
	for matcher, doubtful := range map[string]bool{
		"":            false,
		"/task":       false,
		"*":           true,
		"@post":       true,
		"@internal":   true,
		"@path":       false,
		"@regexp":     false,
		"@expression": false,
		"@other":      true,
		"@not":        true,
		"@both":       false,
	} {
		before := len(warnings())
		s.load(`
			@post method POST
			@internal remote_ip private_ranges
			@path path /task /x
			@regexp path_regexp ^/task$
			@expression expression path('/task')
			@other expression method('GET')
			@not not path /x
			@both {
				remote_ip private_ranges
				path /task
			}
			` + strings.Replace(options(node, ""), "fsbroker_task", "fsbroker_task "+matcher, 1))
		lines := warnings()
		if got := len(lines) - before; got != map[bool]int{true: 1}[doubtful] {
			t.Errorf("%q is warned of %d times", matcher, got)
			continue
		}
		if doubtful && (lines[before]["level"] != "warn" || !strings.HasPrefix(fmt.Sprint(lines[before]["at"]), "Caddyfile:")) {
			t.Errorf("%q: the warning is %v", matcher, lines[before])
		}
	}
}
