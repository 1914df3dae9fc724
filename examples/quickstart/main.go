// Command quickstart demonstrates the module with real files. It runs Caddy with the site in its Caddyfile, and an
// example backend of one broker and two processor nodes. It prints commands to paste into a shell. Everything listens
// on loopback ports and writes to a temporary folder, which is removed at the end.
package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/caddytls/standardstek" // not all of modules/standard, which takes longer to compile
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
)

//go:embed Caddyfile
var caddyfile []byte

func main() {
	// Otherwise, writing to a pipe whose reader has ended would kill the program before it cleans up.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// ports are the ports of the site, the broker and the nodes, with their flags.
var ports = [...]struct {
	flag, usage string
	port        int
}{
	{"port", "port of the site; for each of the ports, 0 selects a free one", 8443},
	{"broker-port", "port of the broker", 23001},
	{"node-1-port", "port of the first node", 22001},
	{"node-2-port", "port of the second node", 22002},
}

// options are the command's flags.
type options struct {
	ports            [len(ports)]int
	analysis, forget time.Duration
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	for i, p := range ports {
		flags.IntVar(&o.ports[i], p.flag, p.port, p.usage)
	}
	flags.DurationVar(&o.analysis, "analysis", 3*time.Second, "how long a node takes to analyze a file")
	flags.DurationVar(&o.forget, "forget", 30*time.Second, "how long a node keeps a task after the analysis")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if o.analysis < 0 || o.forget < 0 {
		return o, errors.New("-analysis and -forget cannot be negative")
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: use flags only, see -h", flags.Arg(0))
	}
	return o, nil
}

// run runs everything until ctx is canceled.
func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	o, err := parse(args)
	if err != nil {
		return err
	}
	listeners, err := o.listen()
	defer closeAll(listeners)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "fsbroker-quickstart-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	secret := rand.Text()
	g, err := newGuide(stdout, dir, portOf(listeners[0]), secret)
	if err != nil {
		return err
	}
	stopBackend, err := startBackend(o, secret, dir, listeners[1:], g)
	if err != nil {
		return err
	}
	defer stopBackend()

	if err := listeners[0].Close(); err != nil { // Caddy listens on its own
		return err
	}
	defer func() { err = errors.Join(err, caddy.Stop()) }()
	if err := startCaddy(portOf(listeners[0]), dir); err != nil {
		return err
	}
	if err := await(g.site, g.authority); err != nil {
		return err
	}
	file, err := sample(dir)
	if err != nil {
		return err
	}
	g.started(file)
	<-ctx.Done()
	return nil
}

// listen listens on all ports. Its error names each one that cannot be used, and the flags for free ones.
func (o options) listen() (listeners []net.Listener, err error) {
	var problems, flags []string
	for i, port := range o.ports {
		l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			if failed, ok := errors.AsType[*net.OpError](err); ok {
				err = failed.Err // without the address and the network
			}
			problems = append(problems, fmt.Sprintf("port %d: %s", port, err))
			flags = append(flags, "-"+ports[i].flag+"=0")
			continue
		}
		listeners = append(listeners, l)
	}
	if problems != nil {
		return listeners, fmt.Errorf("%s: stop what uses these ports, or select free ones with %s",
			strings.Join(problems, "; "), strings.Join(flags, " "))
	}
	return listeners, nil
}

// closeAll closes listeners, of which some may be closed already.
func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		_ = l.Close()
	}
}

func portOf(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

// startBackend runs the broker and the nodes over HTTPS, with a certificate that it writes into dir. They take their
// secrets in a header only. It sets environment variables with their ports and secrets for the Caddyfile. The callers use
// the broker's secret.
func startBackend(o options, brokerSecret, dir string, listeners []net.Listener, g *guide) (stop func(), err error) {
	certificate, err := backend.NewCertificate()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "upstreams.crt"), certificate.PEM, 0o600); err != nil {
		return nil, err
	}
	secretIn := []backend.SecretPlace{backend.SecretInHeader}
	servers := backend.Servers{TLS: certificate.ServerConfig()}

	env := map[string]string{"BROKER_SECRET": brokerSecret, "BROKER_PORT": strconv.Itoa(portOf(listeners[0]))}
	var refs []backend.NodeRef
	for i, l := range listeners[1:] {
		secret := rand.Text()
		node := backend.NewNode(secret, o.analysis, o.forget)
		node.SecretIn = secretIn
		refs = append(refs, backend.NodeRef{AppServerID: fmt.Sprintf("node-%d", i+1), Address: servers.Serve(l, node), Secret: secret})
		env[fmt.Sprintf("NODE_%d_PORT", i+1)] = strconv.Itoa(portOf(l))
		env[fmt.Sprintf("NODE_%d_SECRET", i+1)] = secret
	}
	broker := backend.NewBroker(brokerSecret, refs...)
	broker.SecretIn, broker.NodeClient = secretIn, certificate.Client()
	broker.Dispatched = func(submitID string, finish time.Time) {
		g.dispatched(submitID, o.analysis, o.forget)
		time.AfterFunc(time.Until(finish.Add(o.forget)), func() { g.deleted(submitID) })
	}
	servers.Serve(listeners[0], broker)

	var dispatching sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	dispatching.Go(func() { broker.Run(ctx) })
	stop = func() {
		cancel()
		servers.Stop()
		dispatching.Wait()
	}
	if err := setenv(env); err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

func setenv(env map[string]string) error {
	for name, value := range env {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

// startCaddy runs Caddy with the site.
func startCaddy(port int, dir string) error {
	if err := setenv(map[string]string{
		"QUICKSTART_PORT": strconv.Itoa(port),
		"QUICKSTART_DIR":  filepath.ToSlash(dir),
		"XDG_DATA_HOME":   dir, // Caddy writes its instance ID here, regardless of its storage
	}); err != nil {
		return err
	}
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(caddyfile, map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err
	}
	return caddy.Load(config, true)
}

// await waits until the site responds over TLS. Caddy obtains its certificate in the background. So a signal does not
// end the wait: Caddy would write the certificate after the folder has been removed.
func await(site, authority string) error {
	root, err := os.ReadFile(authority)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(root)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, site, nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err == nil {
			return resp.Body.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the site does not respond: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
