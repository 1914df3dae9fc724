// Command backend runs the example broker with a node for the demo. It writes the secrets that Caddy needs, and the
// certificate of both servers, into a folder that Caddy shares. All of them are new at each start.
package main

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
)

func main() {
	dir := flag.String("dir", "/run/demo", "the `folder` of the secrets and the certificate")
	brokerAddress := flag.String("broker", ":23001", "the `address` on which the broker listens")
	nodeAddress := flag.String("node", ":22001", "the `address` on which the node listens")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *dir, *brokerAddress, *nodeAddress)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "backend:", err)
		os.Exit(1)
	}
}

// certificateFile is written last: when it is there, Caddy can start.
const certificateFile = "upstreams.crt"

const (
	analysis = 3 * time.Second  // how long the node takes for a file
	forget   = 10 * time.Minute // how long it keeps a finished task
)

// run serves until ctx ends.
func run(ctx context.Context, dir, brokerAddress, nodeAddress string) error {
	ready := filepath.Join(dir, certificateFile)
	if err := os.RemoveAll(ready); err != nil { // of an earlier run
		return err
	}
	certificate, err := backend.NewCertificate()
	if err != nil {
		return err
	}
	servers := backend.Servers{TLS: certificate.ServerConfig()}
	defer servers.Stop()

	node := backend.NewNode(rand.Text(), analysis, forget)
	port, err := serve(ctx, &servers, nodeAddress, node)
	if err != nil {
		return err
	}
	broker := backend.NewBroker(rand.Text(), backend.NodeRef{AppServerID: "node-1", Address: "https://127.0.0.1:" + port, Secret: node.Secret})
	broker.NodeClient = certificate.Client()
	if _, err := serve(ctx, &servers, brokerAddress, broker); err != nil {
		return err
	}

	for _, file := range []struct{ name, content string }{
		{"portal", rand.Text()}, {"node-1", node.Secret}, {"broker", broker.Secret}, {certificateFile, string(certificate.PEM)},
	} {
		if err := write(filepath.Join(dir, file.name), file.content+"\n"); err != nil {
			return err
		}
	}
	broker.Run(ctx)
	return nil
}

// write writes a file that is complete as soon as it is there.
func write(path, content string) error {
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// serve starts a server and returns its port.
func serve(ctx context.Context, servers *backend.Servers, address string, handler http.Handler) (port string, err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	servers.Serve(listener, handler)
	_, port, err = net.SplitHostPort(listener.Addr().String())
	return port, err
}
