// Package redistest runs a Redis server for a test.
package redistest

import (
	"cmp"
	cryptorand "crypto/rand"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// Server is a Redis server that has a password, listens on a loopback port only, and keeps its files in a temporary
// folder.
type Server struct {
	Address, Password string
	Client            *redis.Client // without a timeout that ends a test, and without retries

	t       testing.TB
	options []string
	cmd     *exec.Cmd
}

// Start starts a server that runs until the test ends. The options are added to the command line. If there is no
// redis-server, the test is skipped.
func Start(t testing.TB, options ...string) *Server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skipf("SKIPPED: redis-server is missing (%v)", err)
	}
	port := strconv.Itoa(testenv.Port(t))
	s := &Server{Address: "127.0.0.1:" + port, Password: cryptorand.Text(), t: t}
	s.options = append([]string{
		"--bind", "127.0.0.1", "--port", port, "--requirepass", s.Password, "--dir", t.TempDir(), "--save", "", "--loglevel", "warning",
	}, options...)
	s.Client = redis.NewClient(&redis.Options{Addr: s.Address, Password: s.Password, ReadTimeout: -1, MaxRetries: -1})
	t.Cleanup(func() {
		_ = s.Client.Close()
		s.Kill()
	})
	s.Restart()
	return s
}

// Restart starts the server again after Kill.
func (s *Server) Restart() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", s.options...) //nolint:gosec,noctx // a test has chosen the options and ends it
	s.cmd.Stdout, s.cmd.Stderr = s.t.Output(), s.t.Output()
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	testenv.Eventually(s.t, "Redis to answer", func() bool { return s.Client.Ping(s.t.Context()).Err() == nil })
}

// Kill ends the server at once.
func (s *Server) Kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// Pause stops the server without closing its connections, until Resume.
func (s *Server) Pause() { s.signal(syscall.SIGSTOP) }

// Resume lets the server go on after Pause.
func (s *Server) Resume() { s.signal(syscall.SIGCONT) }

func (s *Server) signal(signal syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(signal); err != nil {
		s.t.Fatal(err)
	}
}

// Set changes a setting of the running server.
func (s *Server) Set(name, value string) {
	s.t.Helper()
	if err := s.Client.ConfigSet(s.t.Context(), name, value).Err(); err != nil {
		s.t.Fatal(err)
	}
}

// Keys returns the keys that match a pattern.
func (s *Server) Keys(pattern string) (keys []string) {
	s.t.Helper()
	matches := s.Client.Scan(s.t.Context(), 0, cmp.Or(pattern, "*"), 1000).Iterator()
	for matches.Next(s.t.Context()) {
		keys = append(keys, matches.Val())
	}
	if err := matches.Err(); err != nil {
		s.t.Fatal(err)
	}
	return keys
}
