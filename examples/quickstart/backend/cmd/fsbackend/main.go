// Command fsbackend runs the example broker and its processor nodes alone, for a Caddy of your own:
//
//	go run ./examples/quickstart/backend/cmd/fsbackend -tls -secret-in header
//
// It prints what to write into a Caddyfile. Secrets and the certificate are new at each start.
package main

import (
	"context"
	"crypto/rand"
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
	"syscall"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "fsbackend:", err)
		os.Exit(1)
	}
}

// options are the command's flags.
type options struct {
	listen           []string
	tls              bool
	access           backend.Access
	submitResult     backend.SubmitResultMode
	analysis, forget time.Duration
}

func parse(args []string) (options, error) {
	o := options{listen: []string{"127.0.0.1:23001", "127.0.0.1:22001"}}
	flags := flag.NewFlagSet("fsbackend", flag.ContinueOnError)
	flags.Func("listen", "`addresses` of the broker and of each node, separated by commas (default "+strings.Join(o.listen, ",")+")",
		func(list string) (err error) {
			o.listen, err = parseListen(list)
			return err
		})
	flags.BoolVar(&o.tls, "tls", false, "serve HTTPS with a self-signed certificate")
	flags.Func("secret-in", "`places` where the secret is taken: header, query, serect, separated by commas (default all)",
		func(list string) error {
			places, err := backend.ParseSecretPlaces(list)
			o.access.SecretIn = append(o.access.SecretIn, places...)
			return err
		})
	flags.Func("refuse", "`status` that answers a wrong secret: 400, 401 or 403 (default 400)", func(text string) error {
		status, err := strconv.Atoi(text)
		if err != nil || status != 400 && status != 401 && status != 403 {
			return errors.New("expected 400, 401 or 403")
		}
		o.access.Refuse = status
		return nil
	})
	flags.Func("submit-result", "`mode` of the answers to /submit-result: ids, numbers, manual or absent (default ids)",
		func(name string) (err error) {
			o.submitResult, err = backend.ParseSubmitResultMode(name)
			return err
		})
	flags.DurationVar(&o.analysis, "analysis", 3*time.Second, "how long a node takes to analyse a file")
	flags.DurationVar(&o.forget, "forget", 10*time.Minute, "how long broker and nodes keep a task that is completed")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if o.analysis < 0 || o.forget <= 0 {
		return o, errors.New("-analysis must not be negative, and -forget must be positive")
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: there are only flags, see -h", flags.Arg(0))
	}
	return o, nil
}

// parseListen reads the addresses. They must be loopback addresses: the certificate is for these, and an example has no
// business on a network.
func parseListen(list string) ([]string, error) {
	addresses := strings.Split(list, ",")
	if len(addresses) < 2 {
		return nil, errors.New("expected the address of the broker and of at least one node")
	}
	for i, address := range addresses {
		addresses[i] = strings.TrimSpace(address)
		host, _, err := net.SplitHostPort(addresses[i])
		if err != nil || host != "localhost" && host != "127.0.0.1" && host != "::1" {
			return nil, fmt.Errorf("%q: expected localhost, 127.0.0.1 or [::1], and a port", addresses[i])
		}
	}
	return addresses, nil
}

// run serves until ctx ends.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	var servers backend.Servers
	defer servers.Stop()
	var certificate *backend.Certificate
	certificateFile := ""
	if o.tls {
		if certificate, err = backend.NewCertificate(); err != nil {
			return err
		}
		dir, err := os.MkdirTemp("", "fsbackend-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		certificateFile = filepath.Join(dir, "backend.crt")
		if err := os.WriteFile(certificateFile, certificate.PEM, 0o600); err != nil {
			return err
		}
		servers.TLS = certificate.ServerConfig()
	}

	var nodes []backend.NodeRef
	for i, address := range o.listen[1:] {
		node := backend.NewNode(rand.Text(), o.analysis, o.forget)
		node.SecretIn, node.Refuse = o.access.SecretIn, o.access.Refuse
		ref := backend.NodeRef{AppServerID: fmt.Sprintf("node-%d", i+1), Secret: node.Secret}
		if o.submitResult == backend.SubmitResultNumbers {
			node.NumericIDs = true
			ref.AppServerID = strconv.Itoa(i + 1)
		}
		if ref.Address, err = serve(ctx, &servers, address, node); err != nil {
			return err
		}
		nodes = append(nodes, ref)
	}
	broker := backend.NewBroker(rand.Text(), nodes...)
	broker.SecretIn, broker.Refuse = o.access.SecretIn, o.access.Refuse
	broker.SubmitResult, broker.Forget = o.submitResult, o.forget
	if certificate != nil {
		broker.NodeClient = certificate.Client()
	}
	brokerAddress, err := serve(ctx, &servers, o.listen[0], broker)
	if err != nil {
		return err
	}
	printLines(stdout, brokerAddress, broker.Secret, nodes, certificateFile)
	broker.Run(ctx)
	return nil
}

// printLines prints lines for fsbroker_task in a Caddyfile.
func printLines(stdout io.Writer, broker, secret string, nodes []backend.NodeRef, certificateFile string) {
	fmt.Fprintln(stdout, "broker", broker, secret)
	for _, node := range nodes {
		fmt.Fprintln(stdout, "node", node.AppServerID, node.Address, node.Secret)
	}
	if certificateFile != "" {
		fmt.Fprintf(stdout, "transport http {\n\ttls_trust_pool file %q\n}\n", filepath.ToSlash(certificateFile))
	}
}

// serve starts a server and returns its URL.
func serve(ctx context.Context, servers *backend.Servers, address string, handler http.Handler) (string, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return "", fmt.Errorf("%w: choose other addresses with -listen", err)
	}
	return servers.Serve(listener, handler), nil
}
