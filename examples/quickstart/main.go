// Command quickstart shows the module at work on real files: it runs Caddy with the site of its Caddyfile, and beside
// it an example backend of one broker and two processor nodes, and prints what to paste into a shell. Everything is on
// loopback ports and in a temporary folder, and is gone when it ends.
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
	flags.IntVar(&o.port, "port", 8443, "port of the site; 0 takes any that is free, as for the other ports")
	flags.IntVar(&o.brokerPort, "broker-port", 22000, "port of the broker")
	flags.IntVar(&o.node1Port, "node-1-port", 22001, "port of the first node")
	flags.IntVar(&o.node2Port, "node-2-port", 22002, "port of the second node")
	flags.DurationVar(&o.analysis, "analysis", 3*time.Second, "how long a node takes to analyse a file")
	flags.DurationVar(&o.forget, "forget", 20*time.Second, "how long a node knows a task after that")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if o.analysis < 0 || o.forget < 0 {
		return o, errors.New("-analysis and -forget cannot be negative")
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: there are only flags, see -h", flags.Arg(0))
	}
	return o, nil
}

// run does it all, until ctx ends.
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
	stopBackend, err := startBackend(o, secret)
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
			return nil // it was stopped before it began
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

// startBackend runs the broker and the nodes, and leaves their addresses and secrets in the environment for the
// Caddyfile. The broker's secret is the callers' too.
func startBackend(o options, brokerSecret string) (stop func(), err error) {
	var servers []*http.Server
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	stop = func() {
		cancel()
		for _, s := range servers {
			shutdown(s)
		}
		running.Wait()
	}
	serve := func(name string, port int, handler http.Handler) (int, error) {
		l, err := listen(port, name+"-port")
		if err != nil {
			return 0, err
		}
		s := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, WriteTimeout: time.Minute}
		servers = append(servers, s)
		running.Go(func() { _ = s.Serve(l) })
		return l.Addr().(*net.TCPAddr).Port, nil
	}
	env := map[string]string{"BROKER_SECRET": brokerSecret}
	var refs []backend.NodeRef
	for i, port := range []int{o.node1Port, o.node2Port} {
		name, secret := fmt.Sprintf("node-%d", i+1), rand.Text()
		port, err := serve(name, port, backend.NewNode(secret, o.analysis, o.forget))
		if err != nil {
			stop()
			return nil, err
		}
		refs = append(refs, backend.NodeRef{AppServerID: name, Address: fmt.Sprintf("http://127.0.0.1:%d", port), Secret: secret})
		env[fmt.Sprintf("NODE_%d_PORT", i+1)] = strconv.Itoa(port)
		env[fmt.Sprintf("NODE_%d_SECRET", i+1)] = secret
	}
	broker := backend.NewBroker(brokerSecret, refs...)
	port, err := serve("broker", o.brokerPort, broker)
	if err != nil {
		stop()
		return nil, err
	}
	running.Go(func() { broker.Run(ctx) })
	env["BROKER_PORT"] = strconv.Itoa(port)
	for name, value := range env {
		if err := os.Setenv(name, value); err != nil {
			stop()
			return nil, err
		}
	}
	return stop, nil
}

// shutdown lets a server finish the answers that it has begun, within a moment.
func shutdown(s *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if s.Shutdown(ctx) != nil {
		_ = s.Close()
	}
}

// listen takes a port on the loopback interface. Where that fails, the flag is the way out.
func listen(port int, flag string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("%w: choose another port with -%s", err, flag)
	}
	return l, nil
}

// startCaddy runs the site.
func startCaddy(port int, dir string) (int, error) {
	// Caddy would say that a port is taken too, but not what to do about it.
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
		"XDG_DATA_HOME":   dir, // where Caddy leaves its instance's ID, whatever its storage is
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

// await returns when the site answers over TLS: its certificate is made in the background.
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
			return fmt.Errorf("the site does not answer: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// printLines tells what to paste.
func printLines(stdout io.Writer, site, ca, secret, dir, file string, o options) {
	curl := fmt.Sprintf("curl -sS --cacert '%s'", ca)
	bearer := fmt.Sprintf("-H 'Authorization: Bearer %s'", secret)
	fmt.Fprintf(stdout, `Caddy serves %[1]s, with a broker and two processor nodes behind it.
Its access log is %[2]s. Ctrl-C ends it all.

Paste into another shell:

# 1. Submit a file.
ID=$(%[3]s -F 'file=@%[4]s' '%[1]s/submit?secret=%[5]s' | sed 's/.*"ID":"\([^"]*\)".*/\1/'); echo "submission $ID"

# 2. Poll for its report. It is finished after %[6]s.
until %[3]s %[7]s "%[1]s/task?submitID=$ID" | grep '"overallState":"success"'; do sleep 1; done

# 3. Get it again, %[8]s later: the node has forgotten it, but it is kept ("Cache-Status: fsbroker; hit").
sleep %[9]g; %[3]s -i %[7]s "%[1]s/task?submitID=$ID"

# 4. Ask the node, whatever is kept: it says 404.
%[3]s -i %[7]s "%[1]s/task?submitID=$ID&nocache=true"
`, site, filepath.Join(dir, "access.log"), curl, file, secret, o.analysis, bearer, o.forget, (o.forget + time.Second).Seconds())
}

// sample is a file to submit: a program, where there is one that everybody has, or else the Caddyfile.
func sample(dir string) (string, error) {
	for _, name := range []string{"/bin/ls", os.Getenv("ComSpec")} {
		//nolint:gosec // whoever sets the variable runs this
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			return name, nil
		}
	}
	name := filepath.Join(dir, "Caddyfile")
	return name, os.WriteFile(name, caddyfile, 0o600)
}
