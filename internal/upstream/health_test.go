package upstream

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// monitored is the health of a node, with what it has logged and reported.
type monitored struct {
	*health
	logs   *observer.ObservedLogs
	events []string
}

func newMonitored() *monitored {
	core, logs := observer.New(zap.DebugLevel)
	m := &monitored{logs: logs}
	m.health = newHealth(problem.RoleNode, 10*time.Second, zap.New(core), func(event, reason string) {
		m.events = append(m.events, strings.TrimPrefix(event, "fsbroker_node_")+" "+reason)
	})
	return m
}

// exchange records an exchange that failed with a problem of that kind, or succeeded.
func (m *monitored) exchange(source healthSource, kind ...problem.Kind) {
	r := response{start: time.Now(), status: 200}
	time.Sleep(time.Millisecond)
	for _, k := range kind {
		r.problem = &problem.Problem{Kind: k, Role: problem.RoleNode, Detail: "the node is broken" + problem.TryAgain}
	}
	m.record(source, r)
}

// refuse records an exchange that could not connect.
func (m *monitored) refuse() {
	m.record(sourceRequest, response{
		start: time.Now(), problem: &problem.Problem{Kind: problem.Unreachable, Role: problem.RoleNode}, cause: errors.New("connection refused"), dialFailed: true,
	})
}

// want checks what was logged and reported since the last call, and the state.
func (m *monitored) want(t *testing.T, state Status, lines []string, events ...string) {
	t.Helper()
	synctest.Wait() // for what a timer has begun
	var got []string
	for _, e := range m.logs.TakeAll() {
		fields := e.ContextMap()
		line := strings.TrimSpace(fmt.Sprint(e.Level, " ", e.Message, " ", fields["failures"]))
		if code, ok := fields["code"]; ok {
			line += fmt.Sprint(" ", code, ": ", fields["cause"])
		}
		got = append(got, line)
	}
	if !slices.Equal(got, lines) {
		t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(lines, "\n"))
	}
	if !slices.Equal(m.events, events) {
		t.Errorf("the events are %q, want %q", m.events, events)
	}
	m.events = nil
	if status, f := m.status(time.Now()); status != state || status != Healthy && f == nil {
		t.Errorf("the node is %v since %v, want %v", status, f, state)
	}
}

const (
	broken  = "node_bad_answer: the node is broken"
	timeout = "node_timeout: the node is broken"
)

// A node that fails is logged when it begins, from time to time while it lasts, and when it is over.
func TestLogOfAFailingNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMonitored()
		m.exchange(sourceRequest, problem.BadAnswer)
		m.want(t, Degraded, []string{"warn node fails 1 " + broken})
		m.exchange(sourceRequest, problem.BadAnswer)
		m.want(t, Degraded, nil)
		m.exchange(sourceRequest, problem.Timeout)
		m.want(t, Unhealthy, []string{"warn node fails 1 " + timeout}, "unhealthy node_timeout")

		for range 2 * 60 * 20 { // 20 minutes
			time.Sleep(time.Second / 2)
			m.exchange(sourceRequest, problem.BadAnswer)
		}
		lines := m.logs.TakeAll()
		if len(lines) != 2 || lines[0].ContextMap()["failures"].(int64) < 1000 {
			t.Errorf("in 20 minutes, the log has %v", lines)
		}
		m.want(t, Unhealthy, nil)

		m.exchange(sourceRequest)
		m.want(t, Unhealthy, nil)    // perhaps only some answers fail
		time.Sleep(11 * time.Second) // nothing else is asked of it
		m.want(t, Healthy, []string{"info node answers again 2403"}, "healthy node_bad_answer")

		m.exchange(sourceRequest, problem.BadAnswer)
		m.exchange(sourceRequest, problem.BadAnswer)
		m.exchange(sourceRequest, problem.BadAnswer)
		m.want(t, Unhealthy, []string{"warn node fails 3 " + broken}, "unhealthy node_bad_answer")
	})
}

// A node of which some requests fail, while others succeed, is not logged for each of them, and stays in use.
func TestLogOfANodeThatFailsSometimes(t *testing.T) {
	for name, test := range map[string]struct {
		pause time.Duration // between two requests, one of which fails
		state Status
		lines int // in an hour
	}{
		"often":  {time.Second, Degraded, 6},
		"seldom": {30 * time.Second, Healthy, 6 * 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMonitored()
				for begin := time.Now(); time.Since(begin) < time.Hour-time.Minute; {
					m.exchange(sourceRequest, problem.BadAnswer)
					time.Sleep(test.pause)
					m.exchange(sourceRequest)
				}
				if n := m.logs.Len(); n > test.lines || n < 6 {
					t.Errorf("in an hour, the log has %d lines: %v", n, m.logs.All())
				}
				m.logs.TakeAll()
				m.want(t, test.state, nil)
				m.health.close()
			})
		})
	}
}

// Kinds of failures that alternate are logged once each, and the node does not change its state with each.
func TestLogOfFailuresThatAlternate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMonitored()
		for range 100 {
			m.exchange(sourceRequest, problem.BadAnswer)
			m.exchange(sourceRequest, problem.Timeout)
			m.exchange(sourceRequest, problem.RefusedSecret)
			m.exchange(sourceRequest)
		}
		m.want(t, Unhealthy, []string{
			"warn node fails 1 " + broken, "warn node fails 1 " + timeout, "warn node fails 1 node_refused_secret: the node is broken",
		}, "unhealthy node_refused_secret")
		m.health.close()
	})
}

// What is not the node's failure does not make it unhealthy.
func TestFailuresThatDoNotCount(t *testing.T) {
	for name, test := range map[string]struct {
		source healthSource
		kind   problem.Kind
		state  Status
	}{
		"a report that is too large": {sourceRequest, problem.AnswerTooLarge, Degraded},
		"a busy moment":              {sourceRequest, problem.Overloaded, Degraded},
		"no memory":                  {sourceRequest, problem.Busy, Healthy},
		"a panic":                    {sourceCheck, problem.Internal, Healthy},
		"no explanation":             {sourceOther, problem.BadAnswer, Healthy},
		"refuses to explain":         {sourceOther, problem.RefusedSecret, Healthy},
		"explains too late":          {sourceOther, problem.Timeout, Degraded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMonitored()
				for range 10 {
					m.exchange(test.source, test.kind)
				}
				if len(m.events) > 0 {
					t.Errorf("there are the events %v", m.events)
				}
				if status, _ := m.status(time.Now()); status != test.state {
					t.Errorf("the node is %v, want %v", status, test.state)
				}
				time.Sleep(11 * time.Second)
				m.exchange(sourceRequest)
				m.logs.TakeAll()
				m.want(t, Healthy, nil)
			})
		})
	}
}

// A node that can be connected to again is not down, but is only over its failures when it answers well.
func TestLogOfANodeThatIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMonitored()
		m.refuse()
		const refused = "node_unreachable: connection refused"
		m.want(t, Down, []string{"warn node fails 1 " + refused}, "unhealthy node_unreachable")
		time.Sleep(11 * time.Second)
		m.want(t, Unhealthy, nil)
		m.exchange(sourceRequest, problem.BadAnswer)
		m.want(t, Degraded, []string{"warn node fails 1 " + broken}, "healthy node_unreachable")
		m.exchange(sourceRequest)
		time.Sleep(11 * time.Second)
		m.want(t, Healthy, []string{"info node answers again 2"})

		m.refuse() // another time, so it is logged at once
		m.want(t, Down, []string{"warn node fails 1 " + refused}, "unhealthy node_unreachable")
		time.Sleep(11 * time.Second)
		m.exchange(sourceCheck)
		m.want(t, Healthy, []string{"info node answers again 1"}, "healthy node_unreachable")
	})
}

// A check does not end what requests have found, nor the other way round. The state names the failure that counts.
func TestChecksBesideRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMonitored()
		m.exchange(sourceCheck, problem.BadAnswer)
		m.exchange(sourceRequest)
		m.want(t, Unhealthy, []string{"warn node fails 1 " + broken}, "unhealthy node_bad_answer")
		for range unhealthyAfter {
			m.exchange(sourceRequest, problem.Timeout)
		}
		m.exchange(sourceCheck)
		m.want(t, Unhealthy, []string{"warn node fails 1 " + timeout})
		m.exchange(sourceCheck, problem.BadAnswer)
		m.exchange(sourceRequest)
		time.Sleep(11 * time.Second)
		m.want(t, Unhealthy, nil)
		if _, f := m.status(time.Now()); f.Code != "node_bad_answer" {
			t.Errorf("the node is unhealthy since %s, which is over", f.Code)
		}
		m.exchange(sourceCheck)
		m.want(t, Healthy, []string{"info node answers again 5"}, "healthy node_bad_answer")
	})
}

// A check sends the same secret as a request does. So one that succeeds after a refusal ends the refusal, and nothing else that
// requests have found.
func TestCheckAfterARefusedSecret(t *testing.T) {
	const refused = "warn node fails 1 node_refused_secret: the node is broken"
	synctest.Test(t, func(t *testing.T) {
		m := newMonitored()
		check := response{start: time.Now(), status: 200}
		time.Sleep(time.Second)
		m.exchange(sourceRequest, problem.RefusedSecret)
		m.want(t, Unhealthy, []string{refused}, "unhealthy node_refused_secret")
		m.record(sourceCheck, check) // which began before
		m.exchange(sourceOther)
		time.Sleep(11 * time.Second)
		m.want(t, Unhealthy, nil)
		m.exchange(sourceCheck)
		m.want(t, Healthy, []string{"info node answers again 1"}, "healthy node_refused_secret")

		m.exchange(sourceRequest, problem.BadAnswer)
		m.exchange(sourceRequest, problem.RefusedSecret)
		m.exchange(sourceCheck)
		time.Sleep(11 * time.Second)
		m.want(t, Degraded, []string{"warn node fails 1 " + broken, refused}, "unhealthy node_refused_secret", "healthy node_refused_secret")
		m.exchange(sourceRequest)
		m.want(t, Healthy, []string{"info node answers again 2"})
	})
}

// A node may check no secret for a health check. While it refuses that of requests, its state does not change with each check.
func TestChecksThatNeedNoSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMonitored()
		for range 100 {
			m.exchange(sourceRequest, problem.RefusedSecret)
			time.Sleep(5 * time.Second)
			m.exchange(sourceCheck)
		}
		m.want(t, Unhealthy, []string{"warn node fails 1 node_refused_secret: the node is broken"}, "unhealthy node_refused_secret")
		m.health.close()
	})
}
