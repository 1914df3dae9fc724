// Package testenv gives tests what they need of the system: ports, homes for processes, time, and a log that hangs. Only tests
// import it.
package testenv

import (
	"context"
	"testing"
	"time"
)

// Context returns a context that ends with the test, and before go test's timeout: a test that waits in vain can still say what
// for, and its processes are ended. No other limit of time can fail a test, however slow the machine is.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx := t.Context()
	test, ok := t.(interface{ Deadline() (time.Time, bool) }) // a benchmark has none
	if !ok {
		return ctx
	}
	deadline, ok := test.Deadline()
	if !ok {
		return ctx
	}
	ctx, cancel := context.WithDeadline(ctx, deadline.Add(-time.Until(deadline)/10))
	t.Cleanup(cancel)
	return ctx
}

// Eventually waits until done returns true. It must be called by the test's own goroutine.
func Eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	ctx := Context(t)
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
