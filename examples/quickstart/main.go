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
	"sync"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
)

//go:embed Caddyfile
var caddyfile []byte

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// options are the command's flags.
type options struct {
	port, brokerPort, node1Port, node2Port int
	analysis, forget                       time.Duration
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	flags.IntVar(&o.port, "port", 8443, "port of the site; for each of the ports, 0 selects a free one")
	flags.IntVar(&o.brokerPort, "broker-port", 23001, "port of the broker")
	flags.IntVar(&o.node1Port, "node-1-port", 22001, "port of the first node")
	flags.IntVar(&o.node2Port, "node-2-port", 22002, "port of the second node")
	flags.DurationVar(&o.analysis, "analysis", 3*time.Second, "how long a node takes to analyze a file")
	flags.DurationVar(&o.forget, "forget", 20*time.Second, "how long a node keeps a task after the analysis")
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
	dir, err := os.MkdirTemp("", "fsbroker-quickstart-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	secret := rand.Text()
	stopBackend, err := startBackend(o, secret, dir)
	if err != nil {
		return err
	}
	defer stopBackend()

	port, err := startCaddy(o.port, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, caddy.Stop()) }()

	site := fmt.Sprintf("https://localhost:%d", port)
	ca := filepath.Join(dir, "pki", "authorities", "local", "root.crt")
	if err := await(ctx, site, ca); err != nil {
		if ctx.Err() != nil {
			return nil // stopped during the start
		}
		return err
	}
	file, err := sample(dir)
	if err != nil {
		return err
	}
	printLines(stdout, site, ca, secret, dir, file, o)
	<-ctx.Done()
	fmt.Fprintln(stdout, "\nStopping.")
	return nil
}

// startBackend runs the broker and the nodes over HTTPS, with a certificate that it writes into dir. They take their
// secrets in a header only. It sets environment variables with their ports and secrets for the Caddyfile. The callers use
// the broker's secret.
func startBackend(o options, brokerSecret, dir string) (stop func(), err error) {
	certificate, err := backend.NewCertificate()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "upstreams.crt"), certificate.PEM, 0o600); err != nil {
		return nil, err
	}
	secretIn := []backend.SecretPlace{backend.SecretInHeader}

	servers := backend.Servers{TLS: certificate.ServerConfig()}
	var dispatching sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	stop = func() {
		cancel()
		servers.Stop()
		dispatching.Wait()
	}
	serve := func(name string, port int, handler http.Handler) (int, error) {
		l, err := listen(port, name+"-port")
		if err != nil {
			return 0, err
		}
		servers.Serve(l, handler)
		return l.Addr().(*net.TCPAddr).Port, nil
	}
	env := map[string]string{"BROKER_SECRET": brokerSecret}
	var refs []backend.NodeRef
	for i, port := range []int{o.node1Port, o.node2Port} {
		name, secret := fmt.Sprintf("node-%d", i+1), rand.Text()
		node := backend.NewNode(secret, o.analysis, o.forget)
		node.SecretIn = secretIn
		port, err := serve(name, port, node)
		if err != nil {
			stop()
			return nil, err
		}
		refs = append(refs, backend.NodeRef{AppServerID: name, Address: fmt.Sprintf("https://127.0.0.1:%d", port), Secret: secret})
		env[fmt.Sprintf("NODE_%d_PORT", i+1)] = strconv.Itoa(port)
		env[fmt.Sprintf("NODE_%d_SECRET", i+1)] = secret
	}
	broker := backend.NewBroker(brokerSecret, refs...)
	broker.SecretIn, broker.NodeClient = secretIn, certificate.Client()
	port, err := serve("broker", o.brokerPort, broker)
	if err != nil {
		stop()
		return nil, err
	}
	dispatching.Go(func() { broker.Run(ctx) })
	env["BROKER_PORT"] = strconv.Itoa(port)
	for name, value := range env {
		if err := os.Setenv(name, value); err != nil {
			stop()
			return nil, err
		}
	}
	return stop, nil
}

// listen listens on a loopback port. If that fails, its error names the flag for another port.
func listen(port int, flag string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("%w: choose another port with -%s", err, flag)
	}
	return l, nil
}

// startCaddy runs Caddy with the site, and returns its port.
func startCaddy(port int, dir string) (int, error) {
	// Check the port first. Caddy's own error would not name the flag for another port.
	l, err := listen(port, "port")
	if err != nil {
		return 0, err
	}
	port = l.Addr().(*net.TCPAddr).Port
	if err := l.Close(); err != nil {
		return 0, err
	}
	for name, value := range map[string]string{
		"QUICKSTART_PORT": strconv.Itoa(port),
		"QUICKSTART_DIR":  filepath.ToSlash(dir),
		"XDG_DATA_HOME":   dir, // Caddy writes its instance ID here, regardless of its storage
	} {
		if err := os.Setenv(name, value); err != nil {
			return 0, err
		}
	}
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(caddyfile, map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return 0, err
	}
	return port, caddy.Load(config, true)
}

// await waits until the site responds over TLS. Caddy obtains its certificate in the background.
func await(ctx context.Context, site, ca string) error {
	root, err := os.ReadFile(ca)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(root)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
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

// printLines prints the commands to paste.
func printLines(stdout io.Writer, site, ca, secret, dir, file string, o options) {
	curl := fmt.Sprintf("curl -sS --cacert '%s'", ca)
	bearer := fmt.Sprintf("-H 'Authorization: Bearer %s'", secret)
	fmt.Fprintf(stdout, `Caddy serves %[1]s, in front of a broker and two processor nodes.
The access log is %[2]s. Press Ctrl-C to stop.

Paste these commands into another shell:

# 1. Submit a file.
ID=$(%[3]s %[6]s -F 'file=@%[4]s' '%[1]s/submit' | sed 's/.*"ID":"\([^"]*\)".*/\1/'); echo "submission $ID"

# 2. Poll for its report. The analysis takes %[5]s.
until %[3]s %[6]s "%[1]s/task?submitID=$ID" | grep '"overallState":"success"'; do sleep 1; done

# 3. Get it again after %[7]s. The node has deleted it, but it is cached ("Cache-Status: fsbroker; hit").
sleep %[8]g; %[3]s -i %[6]s "%[1]s/task?submitID=$ID"

# 4. Bypass the cache. The node no longer has the report, so the response is 404.
%[3]s -i %[6]s "%[1]s/task?submitID=$ID&nocache=true"
`, site, filepath.Join(dir, "access.log"), curl, file, o.analysis, bearer, o.forget, (o.forget + time.Second).Seconds())
}

// sample returns the path of a file to submit: a common program if there is one, or else the Caddyfile.
func sample(dir string) (string, error) {
	for _, name := range []string{"/bin/ls", os.Getenv("ComSpec")} {
		//nolint:gosec // the user who sets the variable also runs this program
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			return name, nil
		}
	}
	name := filepath.Join(dir, "Caddyfile")
	return name, os.WriteFile(name, caddyfile, 0o600)
}
