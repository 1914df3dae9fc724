package fsbroker

import (
	"context"
	"net"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// NamespaceUsers returns the number of configurations that use a namespace.
func NamespaceUsers(name string) int {
	n, _ := namespaces.References(name)
	return n
}

// Waiters returns the number of callers that wait for a report to be finished.
func Waiters() int {
	return sumOfNamespaces(func(ns *namespace) int { return int(ns.waiters.Load()) })
}

// Held returns the number of callers that wait for a call: for an upstream's response, or for the storage.
func Held() int {
	return sumOfNamespaces(func(ns *namespace) int { return ns.calls.Callers() })
}

func sumOfNamespaces(of func(*namespace) int) (sum int) {
	for ns := range eachNamespace() {
		sum += of(ns)
	}
	return sum
}

// RaceDetector reports whether the race detector is on.
const RaceDetector = raceDetector

// ProblemCodes returns the codes of all problems.
func ProblemCodes() []string { return problem.Codes() }

// dialled has the transports that DialUpstreams has changed.
var dialled sync.Map

// DialUpstreams replaces how new configurations connect to their upstreams.
func DialUpstreams(dial func(ctx context.Context, network, address string) (net.Conn, error)) {
	for _, upstreams := range liveUpstreams() {
		for _, u := range upstreams {
			transport := u.Transport.(*reverseproxy.HTTPTransport).Transport
			if _, changed := dialled.LoadOrStore(transport, true); !changed {
				transport.DialContext = dial
				upstream.WithPatientWrites(transport)
			}
		}
	}
}
