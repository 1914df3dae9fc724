package clients_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// TestPatterns runs the common ways to poll. docs/CLIENTS.md tells the reader what comes of each.
func TestPatterns(t *testing.T) {
	const (
		queued = 0 // and stays so
		short  = time.Second
		long   = time.Minute // longer than the test
	)
	for _, test := range []struct {
		name     string
		tool     func(*testing.T) string
		script   string
		pattern  string
		analysis time.Duration
		down     bool   // whether the broker and the node are down until requests have failed
		want     string // the output begins with it
	}{
		{"Python, asserting 200", needPython, "testdata/patterns.py", "plain", queued, false, "AssertionError: 204"},
		{"Python, raise_for_status and json", needPython, "testdata/patterns.py", "raise_for_status", queued, false, "JSONDecodeError"},
		{"Python, Retry for errors", needPython, "testdata/patterns.py", "retry_errors", queued, false, "AssertionError: 204"},
		{"Python, Retry for 204, which ends", needPython, "testdata/patterns.py", "retry_204", queued, false, "RetryError"},
		{"Python, Retry for 204, then 200", needPython, "testdata/patterns.py", "retry_204", long, false, "IN_PROGRESS [204"},
		{"Python, until SUCCESS", needPython, "testdata/patterns.py", "until_success", short, false, "SUCCESS"},
		{"Python, wait", needPython, "testdata/patterns.py", "wait", short, false, "SUCCESS []"},
		{"Python, Retry for errors, and wait", needPython, "testdata/patterns.py", "retry_errors_and_wait", short, true, "SUCCESS [502, 50"},
		{"Node, json", needNode, "testdata/patterns.mjs", "json", queued, false, "SyntaxError"},
		{"Node, wait", needNode, "testdata/patterns.mjs", "wait", short, false, "SUCCESS"},
	} {
		t.Run(test.name, func(t *testing.T) {
			tool := test.tool(t)
			s := startSite(t, test.analysis)
			submission := s.submit(t)
			if test.down {
				s.broker.stop()
				s.node.stop()
				restarted := make(chan error, 1)
				ctx := testenv.Context(t)
				go func() {
					for s.failures() < 2 && ctx.Err() == nil {
						time.Sleep(10 * time.Millisecond)
					}
					restarted <- errors.Join(s.node.start(), s.broker.start())
				}()
				defer func() {
					if err := <-restarted; err != nil {
						t.Error(err)
					}
				}()
			}
			out := mustRun(t, ".", s.env(), tool, test.script, test.pattern, s.url, submission)
			if !strings.HasPrefix(out, test.want) {
				t.Errorf("got %s, want %s", out, test.want)
			}
		})
	}
}
