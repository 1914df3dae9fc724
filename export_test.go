package fsbroker

import (
	"context"
	"net"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// StoreUsers returns the number of configurations that use what a namespace shares.
func StoreUsers(namespace string) int {
	n, _ := pool.References(namespace)
	return n
}

// Waiters returns the number of callers that wait for a report to be finished.
func Waiters() int {
	return sumOfShared(func(s *shared) int { return int(s.waiters.Load()) })
}

// Held returns the number of callers that wait for a call: for an upstream's response, or for the storage.
func Held() int {
	return sumOfShared(func(s *shared) int { return s.calls.Callers() })
}

func sumOfShared(of func(*shared) int) (sum int) {
	pool.Range(func(_, s any) bool {
		sum += of(s.(*shared))
		return true
	})
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
	for _, rs := range live.all() {
		for u := range rs.upstreams() {
			transport := u.transport.(*reverseproxy.HTTPTransport).Transport
			if _, changed := dialled.LoadOrStore(transport, true); !changed {
				transport.DialContext = dial
				withPatientWrites(transport)
			}
		}
	}
}
