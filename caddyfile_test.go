package fsbroker

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func TestCaddyfileToJSON(t *testing.T) {
	for name, test := range map[string]struct{ options, want string }{
		"the server's storage": {
			"secret {env.S}\nnode n1 a:1\ncache {\nstorage\n}",
			`{"secrets":[{"secret":"{env.S}"}],"nodes":[{"app_server_id":"n1","address":"a:1"}],"cache":{"storage":{}}}`,
		},
		"encryption": {
			"secret {env.S}\nnode n1 a:1\ncache {\nstorage\nencryption_key {env.K} {env.J}\naccept_unencrypted\n}",
			`{"secrets":[{"secret":"{env.S}"}],"nodes":[{"app_server_id":"n1","address":"a:1"}],
			"cache":{"storage":{},"encryption_keys":["{env.K}","{env.J}"],"accept_unencrypted":true}}`,
		},
		"the least": {
			`secret {env.S}
			node n1 10.0.0.1:22001`,
			`{"secrets":[{"secret":"{env.S}"}],"nodes":[{"app_server_id":"n1","address":"10.0.0.1:22001"}]}`,
		},
		"everything": {
			`secret {env.A}
			secret portal {file./run/secrets/portal}
			node n1 http://10.0.0.1:22001 {env.N1}
			node n2 https://node-2/base {
				secret {env.N2}
				secret_in serect
			}
			node n3 {env.N3_ADDRESS} {
			}
			broker 10.0.0.9:23001 {env.B} {
				secret_in header secret
			}
			transport http {
				dial_timeout 2s
			}
			timeout 1m
			poll_interval 500ms
			max_wait 2m
			max_report 1MiB
			fail_duration 1d
			health_interval 30s
			health_timeout 1s
			cache {
				ttl 7d
				max_size 1GB
				storage file_system /var/lib/fsbroker
				retention 90d
			}`,
			`{"secrets":[{"secret":"{env.A}"},{"client":"portal","secret":"{file./run/secrets/portal}"}],
			"nodes":[{"app_server_id":"n1","address":"http://10.0.0.1:22001","secret":"{env.N1}"},
				{"app_server_id":"n2","address":"https://node-2/base","secret":"{env.N2}","secret_in":["serect"]},
				{"app_server_id":"n3","address":"{env.N3_ADDRESS}"}],
			"broker":{"address":"10.0.0.9:23001","secret":"{env.B}","secret_in":["header","secret"]},
			"transport":{"dial_timeout":2000000000,"protocol":"http"},
			"timeout":60000000000,"poll_interval":500000000,"max_wait":120000000000,"max_report":1048576,"fail_duration":86400000000000,"health_interval":30000000000,"health_timeout":1000000000,
			"cache":{"ttl":604800000000000,"max_size":1000000000,"storage":{"module":"file_system","root":"/var/lib/fsbroker"},"retention":7776000000000000}}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			var h Handler
			if err := h.UnmarshalCaddyfile(caddyfile.NewTestDispenser("fsbroker_task {\n" + test.options + "\n}")); err != nil {
				t.Fatal(err)
			}
			got, err := json.Marshal(&h)
			if err != nil {
				t.Fatal(err)
			}
			var want strings.Builder
			for line := range strings.Lines(test.want) {
				want.WriteString(strings.TrimSpace(line))
			}
			if string(got) != want.String() {
				t.Errorf("got  %s\nwant %s", got, want.String())
			}
		})
	}
}

func TestCaddyfileErrors(t *testing.T) {
	const rest = "\nsecret {env.S}\nnode n1 a:1"
	for options, want := range map[string]string{
		"broker a:1 {\nweight 3\n}":                                      "unknown option weight: the options are secret, secret_in and proxy",
		"broker a:1 {\nproxy /a\nproxy /b\n}":                            "proxy is given more than once",
		"broker a:1 {\nproxy /a /A\n}":                                   "proxy has /A more than once",
		"broker a:1 {\nproxy /Task\n}":                                   "proxy cannot have /task, which is always served",
		"broker a:1 {\nproxy submit\n}":                                  errProxyPath.Error(),
		"broker a:1 {\nproxy /submit/\n}":                                errProxyPath.Error(),
		"broker a:1 {\nproxy /submit*\n}":                                errProxyPath.Error(),
		"broker a:1 {\nproxy /a//b\n}":                                   errProxyPath.Error(),
		"broker a:1 {\nproxy /a/../b\n}":                                 errProxyPath.Error(),
		"broker a:1 {\nproxy {env.PATHS}\n}":                             errProxyPath.Error(),
		"broker a:1 {\nproxy {\n/a\n}\n}":                                "proxy takes no block",
		"node n2 a:1 {\nproxy\n}":                                        "proxy is an option of the broker",
		"secret a {x} {\nallow\n}":                                       "wrong number of arguments: expected allow <endpoint>...",
		"secret a {x} {\nallow /task\nallow /task\n}":                    "allow is given more than once",
		"secret a {x} {\nallow /submit\n}":                               `allow has "/submit", which is not served: the endpoints are /task`,
		"secret a {x} {\nallow /file\n}\nbroker a:1 {\nproxy /submit\n}": `allow has "/file", which is not served: the endpoints are /task, /submit`,
		"secret a {x} {\nallow /task\n}\nsecret a {y}":                   "the secrets of client a differ in allow: give all of them the same",
		"secret {x} {\nallow /task\n}\nsecret default {y}":               "the secrets of client default differ in allow: give all of them the same",
		"":                                   "fsbroker_task requires at least one secret to let a client in",
		"secret {env.S}":                     "no upstream is configured: at least one node or broker is required",
		"node n1 a:1":                        "fsbroker_task requires at least one secret to let a client in",
		"secret":                             "wrong number of arguments: expected secret [<client name>] <secret>",
		"secret a b hush":                    "wrong number of arguments: expected secret [<client name>] <secret>",
		"secret portal":                      "a secret that is not a placeholder must follow a client's name: secret <client name> <secret>; if there is a name, the secret after it is empty",
		`secret ""`:                          "the secret is empty",
		`secret a ""`:                        "the secret is empty",
		"secret {env.HUSH} a":                "a client's name must be 1 to 64 letters, digits, dots, dashes, underscores or @, and comes before the secret",
		"node":                               "wrong number of arguments: expected node <appServerID> <address> [<secret>]",
		"node n1":                            "wrong number of arguments: expected node <appServerID> <address> [<secret>]",
		"node n1 a:1 hush more":              "wrong number of arguments: expected node <appServerID> <address> [<secret>]",
		`node "" a:1`:                        "the application server ID must be 1 to 256 bytes without control characters",
		"node n1 ftp://a":                    errAddress.Error(),
		"node n1 http://":                    errAddress.Error(),
		"node n1 http://u:hush@a":            errAddress.Error(),
		"node n1 http://a/?hush=1":           errAddress.Error(),
		"node n1 http://a/?":                 errAddress.Error(),
		"node n1 http://a/#hush":             errAddress.Error(),
		"node n1 a:99999":                    errAddress.Error(),
		"node n1 a:b":                        errAddress.Error(),
		"node n1 :80":                        errAddress.Error(),
		"node n1 127.0.0.1":                  errNoPort.Error(),
		"node n1 [::1]":                      errNoPort.Error(),
		"broker localhost":                   errNoPort.Error(),
		"node n1 unix//a/b":                  errAddress.Error(),
		"node n1 a:1\nnode n1 b:1":           "node n1 is configured twice",
		"node n1 a:1 hush {\nsecret hush\n}": "the secret is given more than once",
		"node n1 a:1 {\nsecret\n}":           "wrong number of arguments: expected secret <secret>",
		"node n1 a:1 {\nsecret hush hush\n}": "wrong number of arguments: expected secret <secret>",
		"node n1 a:1 {\nsecret_in\n}":        "wrong number of arguments: expected secret_in header|secret|serect...",
		"node n1 a:1 {\nsecret_in both\n}":   "secret_in must be one or several of header, secret and serect, once each",
		"broker a:1 {\nsecret_in header header\n}":            "secret_in must be one or several of header, secret and serect, once each",
		"broker a:1 {\nsecret_in header\nsecret_in header\n}": "secret_in is given more than once",
		"broker a:1 {\nsecret_param serect\n}":                "secret_param is not an option any more: use secret_in, which also takes header",
		"node n1 a:1 {\nweight 3\n}":                          "unknown option weight: the options are secret and secret_in",
		"broker":                                              "wrong number of arguments: expected broker <address> [<secret>]",
		"broker a:1 hush more":                                "wrong number of arguments: expected broker <address> [<secret>]",
		"broker a:1\nbroker a:1":                              "broker is given more than once",
		"broker //":                                           errAddress.Error(),
		"transport":                                           "transport must be http, optionally with a block as in reverse_proxy",
		"transport fastcgi":                                   "transport must be http, optionally with a block as in reverse_proxy",
		"transport http\ntransport http":                      "transport is given more than once",
		"transport http {\nnope\n}":                           "unrecognized subdirective nope",
		"timeout":                                             "wrong number of arguments: expected timeout with a duration of at least 1ms, such as 30s or 24h",
		"timeout soon":                                        "timeout must be a duration of at least 1ms, such as 30s or 24h, not soon",
		"timeout 30":                                          "timeout must be a duration of at least 1ms, such as 30s or 24h, not 30",
		"timeout 0":                                           "timeout must be a duration of at least 1ms, such as 30s or 24h, not 0",
		"timeout -1s":                                         "timeout must be a duration of at least 1ms, such as 30s or 24h, not -1s",
		"timeout 1s 2s":                                       "wrong number of arguments: expected timeout with a duration of at least 1ms, such as 30s or 24h",
		"timeout 1s\ntimeout 1s":                              "timeout is given more than once",
		"timeout 1s {\nx\n}":                                  "timeout takes no block",
		"poll_interval x":                                     "poll_interval must be a duration of at least 1ms, such as 30s or 24h, not x",
		"max_wait never":                                      "max_wait must be a duration of at least 1ms, such as 30s or 24h, not never",
		"max_wait 1s\nmax_wait 1s":                            "max_wait is given more than once",
		"fail_duration x":                                     "fail_duration must be a duration of at least 1ms, such as 30s or 24h, not x",
		"health_interval off":                                 "health_interval must be a duration of at least 1ms, such as 30s or 24h, not off",
		"health_timeout 0s":                                   "health_timeout must be a duration of at least 1ms, such as 30s or 24h, not 0s",
		"timeout 30ns":                                        "timeout must be a duration of at least 1ms, such as 30s or 24h, not 30ns",
		"max_report 64":                                       "max_report must be a size with its unit, such as 64MiB, not 64",
		"cache {\nmax_size 256\n}":                            "max_size must be a size with its unit, such as 64MiB, not 256",
		"cache {\nmax_size 65535\n}":                          "max_size must be a size with its unit, such as 64MiB, not 65535",
		"cache {\nstorage /var/lib/x\n}":                      "storage takes the name of a module, not a folder: write storage file_system /var/lib/x",
		"max_report":                                          "wrong number of arguments: expected max_report with a size with its unit, such as 64MiB",
		"max_report much":                                     "max_report must be a size with its unit, such as 64MiB, not much",
		"max_report 0":                                        "max_report must be a size with its unit, such as 64MiB, not 0",
		"max_report -1":                                       "max_report must be a size with its unit, such as 64MiB, not -1",
		"max_report 16EB":                                     "max_report must be a size with its unit, such as 64MiB, not 16EB",
		"cache on":                                            "wrong number of arguments: expected cache { … }",
		"cache {\nttl 1h\n}\ncache {\nttl 1h\n}":              "cache is given more than once",
		"cache {\nttl x\n}":                                   "ttl must be a duration of at least 1ms, such as 30s or 24h, not x",
		"cache {\nmax_size x\n}":                              "max_size must be a size with its unit, such as 64MiB, not x",
		"cache {\nsize 1\n}":                                  "unknown option size: the options of cache are namespace, ttl, max_size, storage, retention, encryption_key and accept_unencrypted",
		"cache {\nnamespace\n}":                               "wrong number of arguments: expected namespace <name>",
		"cache {\nnamespace a/b\n}":                           "namespace must be 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or a digit",
		"cache {\nnamespace ..\n}":                            "namespace must be 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or a digit",
		"cache {\nnamespace a\nnamespace a\n}":                "namespace is given more than once",
		"cache {\nretention 1d\n}":                            "retention needs a storage: configure storage as well",
		"cache {\nretention 0\n}":                             "retention must be a duration of at least 1ms, such as 30s or 24h, not 0",
		"cache {\nstorage\nstorage\n}":                        "storage is given more than once",
		"cache {\nstorage {\nx\n}\n}":                         "storage without a module takes no block",
		"cache {\nstorage\nencryption_key\n}":                 "wrong number of arguments: expected encryption_key <key> [<older key>...]",
		"cache {\nstorage\nencryption_key hush \"\"\n}":       "an encryption key is empty",
		"cache {\nstorage\nencryption_key hush {\nx\n}\n}":    "encryption_key takes no block",
		"cache {\nencryption_key hush\n}":                     "encryption_key needs a storage: configure storage as well",
		"cache {\nstorage\nencryption_key hush\nencryption_key hush\n}":                    "encryption_key is given more than once: give all keys at once, the newest first",
		"cache {\nstorage\nencryption_key hush\naccept_unencrypted yes\n}":                 "wrong number of arguments: expected accept_unencrypted",
		"cache {\nstorage\nencryption_key hush\naccept_unencrypted {\nx\n}\n}":             "accept_unencrypted takes no block",
		"cache {\nstorage\nencryption_key hush\naccept_unencrypted\naccept_unencrypted\n}": "accept_unencrypted is given more than once",
		"cache {\nstorage\naccept_unencrypted\n}":                                          "accept_unencrypted needs a key: configure encryption_key as well",
		"nodes a b": "unknown option nodes: the options of fsbroker_task are secret, node, broker, transport, timeout, poll_interval, max_wait, max_report, fail_duration, health_interval, health_timeout, harvest and cache",
	} {
		t.Run(options, func(t *testing.T) {
			text := "fsbroker_task {\n" + options
			if !strings.Contains(want, "at least one") {
				text += strings.Replace(rest, "node n1", "node other", 1)
			}
			err := new(Handler).UnmarshalCaddyfile(caddyfile.NewTestDispenser(text + "\n}"))
			if err == nil {
				t.Fatalf("it was taken, want %q", want)
			}
			message, place, ok := strings.Cut(err.Error(), ", at Testfile:")
			if !ok || place == "" {
				t.Errorf("the error does not name the line: %s", err)
			}
			if message != want {
				t.Errorf("got  %s\nwant %s", message, want)
			}
			if strings.Contains(err.Error(), "hush") {
				t.Errorf("the error shows what may be a secret: %s", err)
			}
		})
	}
}

func TestDirective(t *testing.T) {
	const options = "{\nsecret {env.S}\nnode n1 a:1\n}"
	const handler = `{"handler":"fsbroker_task","nodes":[{"address":"a:1","app_server_id":"n1"}],"secrets":[{"secret":"{env.S}"}]}`
	const respond = `{"handler":"static_response","status_code":404}`
	for name, test := range map[string]struct{ directives, want string }{
		"without a matcher": {"fsbroker_task " + options, `[{"match":[{"path":["/task"]}],"handle":[` + handler + `]}]`},
		"with a path":       {"fsbroker_task /x " + options, `[{"match":[{"path":["/x"]}],"handle":[` + handler + `]}]`},
		"for everything":    {"fsbroker_task * " + options, `[{"handle":[` + handler + `]}]`},
		"named": {
			"@m method GET\nfsbroker_task @m " + options,
			`[{"match":[{"method":["GET"]}],"handle":[` + handler + `]}]`,
		},
		"before respond": {
			"respond 404\nfsbroker_task " + options,
			`[{"match":[{"path":["/task"]}],"handle":[` + handler + `]},{"handle":[` + respond + `]}]`,
		},
		"with proxy": {
			"fsbroker_task {\nsecret p {env.S} {\nallow /task /Submit\n}\nbroker b:1 {\nproxy\n}\n}",
			`[{"match":[{"path":["/task","/submit","/submit-result","/file","/reputation","/system-info"]}],"handle":[{"broker":{"address":"b:1",` +
				`"proxy":["/submit","/submit-result","/file","/reputation","/system-info"]},"handler":"fsbroker_task",` +
				`"secrets":[{"allow":["/task","/Submit"],"client":"p","secret":"{env.S}"}]}]}]`,
		},
		"with paths of proxy": {
			"fsbroker_task {\nsecret {env.S}\nbroker b:1 {\nproxy /Submit /v2/x.y\n}\n}",
			`[{"match":[{"path":["/task","/Submit","/v2/x.y"]}],"handle":[{"broker":{"address":"b:1","proxy":["/Submit","/v2/x.y"]},` +
				`"handler":"fsbroker_task","secrets":[{"secret":"{env.S}"}]}]}]`,
		},
		"with proxy and a matcher": {
			"fsbroker_task /x {\nsecret {env.S}\nbroker b:1 {\nproxy /submit\n}\n}",
			`[{"match":[{"path":["/x"]}],"handle":[{"broker":{"address":"b:1","proxy":["/submit"]},"handler":"fsbroker_task","secrets":[{"secret":"{env.S}"}]}]}]`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(":80 {\n"+test.directives+"\n}"), nil)
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf(`{"apps":{"http":{"servers":{"srv0":{"listen":[":80"],"routes":%s}}}}}`, test.want); string(config) != want {
				t.Errorf("got  %s\nwant %s", config, want)
			}
		})
	}
	for directive, want := range map[string]string{
		"fsbroker_task hush {\n}": "fsbroker_task takes no arguments but a matcher: put its options into a block, at Caddyfile:2",
		"fsbroker_task":           "fsbroker_task requires at least one secret to let a client in, at Caddyfile:2",
		"fsbroker_task @no {\n}":  "unrecognized matcher name: @no",
	} {
		_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(":80 {\n"+directive+"\n}"), map[string]any{"filename": "Caddyfile"})
		if want = "parsing caddyfile tokens for 'fsbroker_task': " + want; err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// What is possible, but is probably not meant, is loaded with a warning.
func TestDoubts(t *testing.T) {
	for name, test := range map[string]struct {
		options string
		want    []string
	}{
		"none":               {"timeout 1s\npoll_interval 100ms\nmax_wait 1s\nhealth_interval 1s\nhealth_timeout 100ms\nmax_report 1MiB\ncache {\nmax_size 1MiB\n}", nil},
		"the defaults":       {"", nil},
		"without a unit":     {"cache {\nmax_size 1000000000\n}", nil},
		"timeout":            {"timeout 30ms", []string{"timeout is only 30ms: an upstream hardly answers in that time; perhaps 30s is meant"}},
		"poll_interval":      {"poll_interval 1ms", []string{"poll_interval is only 1ms: an upstream is asked that often for each unfinished report; perhaps 1s is meant"}},
		"max_wait":           {"max_wait 60ms", []string{"max_wait is only 60ms: callers wait for whole seconds; perhaps 60s is meant"}},
		"health_interval":    {"health_interval 10ms", []string{"health_interval is only 10ms: each upstream is checked that often; perhaps 10s is meant"}},
		"health_timeout":     {"health_timeout 5s", []string{"health_timeout is set, but nothing is checked without health_interval: set that as well; only the request of the admin API's /fsbroker/nodes has that timeout"}},
		"max_size":           {"cache {\nmax_size 256B\n}", []string{"max_size is only 256 B: hardly a report is kept in memory; perhaps 256 MiB is meant: 256MiB in a Caddyfile, 268435456 in JSON"}},
		"accept_unencrypted": {"cache {\nstorage\nencryption_key {env.K}\naccept_unencrypted\n}", []string{"accept_unencrypted is set: whoever can write to the storage can forge reports without a key; remove it when the retention has passed since encryption_key was set"}},
		"max_report":         {"max_report 64B", []string{"max_report is only 64 B: hardly a report is that small; perhaps 64 MiB is meant: 64MiB in a Caddyfile, 67108864 in JSON"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := new(Handler)
			if err := h.UnmarshalCaddyfile(caddyfile.NewTestDispenser("fsbroker_task {\nsecret {env.S}\nnode n1 a:1\n" + test.options + "\n}")); err != nil {
				t.Fatal(err)
			}
			if got := h.doubts(); !slices.Equal(got, test.want) {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
}

func FuzzCaddyfile(f *testing.F) {
	f.Add("secret {env.A}\nnode n1 10.0.0.1:22001 s {\nsecret_in serect\n}\nbroker http://b\ncache {\nttl 1h\nmax_size 1MiB\n}")
	f.Add("secret a {env.B}\nnode n1 https://[::1]:1/x {\nsecret {file./a}\n}\ntransport http {\ntls\n}\ntimeout 3d")
	f.Add("secret a {env.B}\nnode n1 a:1\ncache {\nstorage\nretention 1d\nencryption_key {env.K}\naccept_unencrypted\n}")
	f.Add("secret a {env.B} {\nallow /task /Submit\n}\nbroker b:1 {\nproxy /submit /file\n}")
	f.Fuzz(func(t *testing.T, options string) {
		h := new(Handler)
		if h.UnmarshalCaddyfile(caddyfile.NewTestDispenser("fsbroker_task {\n"+options+"\n}")) != nil {
			return
		}
		// What a Caddyfile says, JSON says too.
		text, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		var again Handler
		if err := json.Unmarshal(text, &again); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if err := func() error { again.setDefaults(); return again.validate() }(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	})
}
