package guard

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestCall(t *testing.T) {
	want := errors.New("failed")
	if got, err := Call(zap.NewNop(), func() (int, error) { return 7, want }); got != 7 || !errors.Is(err, want) {
		t.Errorf("got %d, %v", got, err)
	}
	if err := Do(zap.NewNop(), func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}

// atFault panics.
func atFault(value any) (int, error) {
	if value == nil {
		var list []int
		return list[3], nil
	}
	panic(value)
}

// A panic is an error, and a line of the log that says where it was, but nothing that the value says.
func TestPanic(t *testing.T) {
	const secret = "the-secret"
	for name, test := range map[string]struct {
		value any
		cause string
	}{
		"a text":                 {"https://node/?secret=" + secret, "string"},
		"an error":               {errors.New(secret), "*errors.errorString"},
		"a structure":            {struct{ URL string }{secret}, "struct { URL string }"},
		"the end of a handler":   {http.ErrAbortHandler, "*errors.errorString"},
		"an error of Go itself":  {nil, "runtime error: index out of range [3] with length 0"},
		"a closed-over function": {func() string { return secret }, "func() string"},
	} {
		t.Run(name, func(t *testing.T) {
			core, log := observer.New(zapcore.DebugLevel)
			got, err := Call(zap.New(core), func() (int, error) { return atFault(test.value) })
			if got != 0 || !errors.Is(err, ErrPanic) || strings.Contains(err.Error(), secret) {
				t.Errorf("got %d, %v", got, err)
			}
			lines := log.All()
			if len(lines) != 1 || lines[0].Level != zapcore.ErrorLevel {
				t.Fatalf("the log has %v", lines)
			}
			fields := lines[0].ContextMap()
			stack, _ := fields["stack"].(string)
			if fields["cause"] != test.cause || !strings.Contains(stack, "guard.atFault") || strings.Contains(stack, secret) {
				t.Errorf("the log has %v", fields)
			}
		})
	}
}
