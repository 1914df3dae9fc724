package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"text/template"
)

// contender is a server of reports that takes part in the comparison.
type contender struct {
	name string

	// config is the template of its configuration. Contenders with the same config and program share one server.
	config *template.Template

	// command returns the command that runs it with a configuration file. It is nil for Caddy.
	command func(config string, s *server) (name string, args []string)

	// target returns the path and query to request for a task.
	target func(l load, task string) string

	program string // that is run for Caddy; empty for that of the harness

	env    []string // further environment variables
	noTLS  bool
	maxLen int  // size of the largest report that it can serve, in bytes; 0 means unlimited
	caches bool // whether it caches reports
}

const caddyGlobal = `{
	admin {{.Admin}}
	auto_https off
	servers {
		protocols {{.Protocols}}
	}
	{{block "global" .}}{{end}}
}
`

const caddyBase = caddyGlobal + `(tls) {
	tls {{.Dir}}/cert.pem {{.Dir}}/key.pem
}
(site) {
	{{block "site" .}}{{end}}
}
http://127.0.0.1:{{port .Plain}} {
	import site
}
https://127.0.0.1:{{port .Secure}} {
	import tls
	import site
}
`

func caddyConfig(name, global, site string) *template.Template {
	t := template.Must(template.New(name).Funcs(functions).Parse(caddyBase))
	template.Must(t.New("global").Parse(global))
	template.Must(t.New("site").Parse(site))
	return t
}

var functions = template.FuncMap{
	"port": func(address string) string { return address[strings.LastIndexByte(address, ':')+1:] },
}

func byPair(_ load, task string) string { return "/task?" + pairQuery(task) }

func pairQuery(task string) string { return "secret=" + secret + "&" + nodeQuery("node-1", task) }

// nodeQuery returns the query for a task of a node, without a secret.
func nodeQuery(node, task string) string { return "appServerID=" + node + "&taskID=" + task }

var module = &contender{
	name: "fsbroker_task", caches: true, target: byPair,
	config: caddyConfig("fsbroker", "", `
	fsbroker_task {
		secret bench {{.Secret}}
		node node-1 {{.Node}} {{.Secret}}
		broker {{.Node}}
		cache {
			max_size 2GiB
		}
	}`),
}

// before returns c as it is with a program of another commit.
func (c contender) before(program string) *contender {
	c.name, c.program = c.name+", before", program
	return &c
}

// shared returns a name for the server of c. Contenders with the same one share it.
func (c *contender) shared() string { return c.config.Name() + c.program }

// isBefore reports whether c is the module before.
func (c *contender) isBefore() bool { return c.program != "" }

// isModule reports whether c is the module, of today or before.
func (c *contender) isModule() bool { return c == module || c.isBefore() }

// by returns c, for results that embed it.
func (c *contender) by() *contender { return c }

var bareHandler = &contender{
	name:   "bare Caddy handler",
	config: caddyConfig("bare", "", `bench_bare /task {{.Dir}}`),
	target: func(l load, _ string) string { return "/task?" + pairQuery(l.representation()) },
}

var files = caddyConfig("files", "", `
	handle_path /files/* {
		root {{.Dir}}
		file_server
	}
	handle_path /encoded/* {
		root {{.Dir}}
		encode gzip
		file_server
	}
	{{range .Sizes}}
	handle /respond/{{.ID}} {
		respond "{file.{{$.Dir}}/{{.ID}}.json}"
	}
	handle /respond-encoded/{{.ID}} {
		encode gzip
		respond "{file.{{$.Dir}}/{{.ID}}.json}"
	}
	{{end}}`)

var proxies = caddyConfig("proxy", "", `
	@refused not query secret={{.Secret}}
	respond @refused 401
	handle /encoded/* {
		uri strip_prefix /encoded
		encode gzip
		reverse_proxy {{.Node}}
	}
	handle {
		reverse_proxy {{.Node}}
	}`)

var reverseProxy = &contender{
	name: "Caddy reverse_proxy", config: proxies,
	target: func(l load, task string) string { return encodedOr(l, "") + byPair(l, task) },
}

func nginx(config string, _ *server) (string, []string) { return "nginx", []string{"-c", config} }

// nginxWith returns nginx with a compression level and a folder for the cache, which may be a template.
func nginxWith(name string, level int, folder string) *contender {
	return &contender{name: name, caches: true, target: byPair, command: nginx, config: nginxConfig(level, folder)}
}

func nginxConfig(level int, folder string) *template.Template {
	return template.Must(template.New(fmt.Sprintf("nginx-%d", level)).Parse(fmt.Sprintf(`
daemon off;
user {{.User}};
pid {{.Dir}}/nginx.pid;
error_log stderr warn;
worker_processes {{.CPUs}};
events {}
http {
	access_log off;
	sendfile on;
	tcp_nopush on;
	keepalive_requests 1000000000;
	client_body_temp_path {{.Dir}}/body;
	fastcgi_temp_path {{.Dir}}/fastcgi;
	uwsgi_temp_path {{.Dir}}/uwsgi;
	scgi_temp_path {{.Dir}}/scgi;
	proxy_temp_path {{.Dir}}/proxy;
	proxy_cache_path %s levels=1:2 keys_zone=reports:16m inactive=24h;
	gzip on;
	gzip_comp_level %d;
	gzip_types application/json;
	ssl_certificate {{.Dir}}/cert.pem;
	ssl_certificate_key {{.Dir}}/key.pem;
	ssl_protocols TLSv1.2 TLSv1.3;
	map $arg_secret $refused {
		default 1;
		{{.Secret}} 0;
	}
	server {
		listen {{.Plain}};
		listen {{.Secure}} ssl http2;
		location = /task {
			if ($refused) {
				return 401;
			}
			proxy_cache reports;
			proxy_cache_key $arg_appServerID/$arg_taskID/$arg_all;
			proxy_cache_valid 200 24h;
			proxy_cache_lock on;
			proxy_pass http://{{.Node}};
		}
	}
}
`, folder, level)))
}

// At its default level, and at the module's level.
var (
	nginx1 = nginxWith("nginx", 1, "{{.Dir}}/cache")
	nginx6 = nginxWith("nginx, level 6", 6, "{{.Dir}}/cache")
)

// contenders lists all contenders, the module first. Each is configured as its users would configure it for this purpose.
var contenders = []*contender{
	module,
	{
		name: "fsbroker_task, submitID", config: module.config,
		target: func(_ load, task string) string { return "/task?secret=" + secret + "&submitID=" + task },
	},
	bareHandler,
	{
		name: "Caddy file_server", config: files,
		target: func(l load, _ string) string { return encodedOr(l, "/files") + "/" + l.size.id() + ".json" },
	},
	{
		name: "Caddy respond", config: files,
		maxLen: 1 << 20, // the limit for a file in a placeholder
		target: func(l load, _ string) string {
			if l.gzip {
				return "/respond-encoded/" + l.size.id()
			}
			return "/respond/" + l.size.id()
		},
	},
	reverseProxy,
	{
		name: "Caddy cache-handler", caches: true, target: byPair,
		config: caddyConfig("cache-handler", `
	cache {
		ttl 24h
	}`, `
	@refused not query secret={{.Secret}}
	respond @refused 401
	route {
		cache
		encode gzip
		reverse_proxy {{.Node}}
	}`),
	},
	nginx1,
	nginx6,
	{
		name: "Varnish", caches: true, target: byPair, noTLS: true,
		command: func(config string, s *server) (string, []string) {
			return "varnishd", []string{"-F", "-j", "none", "-n", filepath.Join(s.Dir, "varnish"), "-a", s.Plain, "-f", config, "-s", "malloc,2g"}
		},
		config: template.Must(template.New("varnish").Funcs(functions).Parse(`
vcl 4.1;
backend node {
	.host = "127.0.0.1";
	.port = "{{port .Node}}";
}
sub vcl_recv {
	if (req.url !~ "[?&]secret={{.Secret}}(&|$)") {
		return (synth(401));
	}
}
sub vcl_backend_response {
	set beresp.ttl = 24h;
	set beresp.do_gzip = true;
}
`)),
	},
}

func encodedOr(l load, other string) string {
	if l.gzip {
		return "/encoded"
	}
	return other
}

// request returns what requests the report of a task from c.
func (c *contender) request(l load) func(n int, id string) query {
	return func(_ int, id string) query { return query{method: http.MethodGet, target: c.target(l, id)} }
}

// server is a running server of one contender, or of several that share a configuration. It is also the data for the
// template of that configuration.
type server struct {
	Dir, User, Plain, Secure, Admin, Node, Secret, Protocols string

	CPUs  int
	Sizes []struct{ ID string }

	process *process
	launch  func(context.Context) (*process, error) // starts the process
}

// restart stops the server and starts it again.
func (s *server) restart(ctx context.Context) error {
	s.process.stop()
	p, err := s.launch(ctx)
	if err == nil {
		s.process = p
	}
	return err
}

// start starts the server of c with a copy of the harness's files.
func (c *contender) start(ctx context.Context, h *harness) (*server, error) {
	s := &server{Node: h.node.address, Secret: secret, Protocols: h.caddyProtocols, CPUs: cmp.Or(h.options.serverCPUs, runtime.NumCPU())}
	for _, size := range h.sizes {
		s.Sizes = append(s.Sizes, struct{ ID string }{size.id()})
	}
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	s.User = me.Username
	if s.Dir, err = os.MkdirTemp(h.dir, c.config.Name()+"-"); err != nil {
		return nil, err
	}
	if err := os.CopyFS(s.Dir, os.DirFS(h.files)); err != nil {
		return nil, err
	}
	if err := findAddresses(ctx, &s.Plain, &s.Secure, &s.Admin); err != nil {
		return nil, err
	}
	var text bytes.Buffer
	if err := c.config.Execute(&text, s); err != nil {
		return nil, err
	}
	config := filepath.Join(s.Dir, "Caddyfile")
	if err := os.WriteFile(config, text.Bytes(), 0o600); err != nil {
		return nil, err
	}
	name, args := cmp.Or(c.program, h.module.program, os.Args[0]), []string{"run", "--config", config}
	env := []string{beCaddy + "=1", "XDG_DATA_HOME=" + s.Dir, "XDG_CONFIG_HOME=" + s.Dir}
	env = append(env, c.env...)
	if c.command != nil {
		name, args = c.command(config, s)
	}
	name, args = onServerCPUs(h.options.serverCPUs, name, args)
	s.launch = func(ctx context.Context) (*process, error) {
		return startProcess(ctx, s.Dir, s.Plain, env, name, args...)
	}
	if s.process, err = s.launch(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", c.name, err)
	}
	return s, nil
}

// installed reports whether the command of c is installed.
func (c *contender) installed() bool {
	if c.command == nil {
		return true
	}
	name, _ := c.command("", new(server))
	_, err := exec.LookPath(name)
	return err == nil
}
