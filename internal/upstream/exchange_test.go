package upstream

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// What has arrived of an answer when the caller leaves is no outcome.
func TestCallerLeavesDuringAnAnswer(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	u := &Upstream{base: &url.URL{Scheme: "http", Host: "node"}, secret: new(Secret)}
	u.Logger, u.MaxAnswer = zap.NewNop(), 1
	u.Budget = budget.New(new(sync.Mutex), 0, func() bool { return false })
	u.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
		leave()
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(iotest.ErrReader(context.Canceled))}, nil
	})
	r := u.exchange(ctx, time.Minute, "task", make(url.Values), func(body io.Reader, _ func(int64) error) error {
		_, err := io.ReadAll(body)
		return err
	})
	if r.status != 0 || r.problem != problem.Left {
		t.Errorf("the status is %d, the problem is %v", r.status, r.problem)
	}
}

// net/http may fail a request because the one before on the same connection was cancelled. It is sent again, once.
func TestRequestThatFailsForAnother(t *testing.T) {
	dial := errors.New("connection refused")
	for name, test := range map[string]struct {
		errs  []error
		tries int
		err   error
	}{
		"another was canceled":  {[]error{context.Canceled, nil}, 2, nil},
		"another was too late":  {[]error{context.DeadlineExceeded, nil}, 2, nil},
		"more than once":        {[]error{context.Canceled, context.Canceled, nil}, 2, context.Canceled},
		"connecting is refused": {[]error{dial, nil}, 1, dial},
		"connecting takes long": {[]error{errors.Join(context.DeadlineExceeded), nil}, 1, context.DeadlineExceeded},
		"nothing fails":         {[]error{nil}, 1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			tries := 0
			u := &Upstream{base: &url.URL{Scheme: "https", Host: "node"}}
			u.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
				tries++
				if err := test.errs[tries-1]; err != nil {
					return nil, err
				}
				return &http.Response{StatusCode: http.StatusNotFound, Body: http.NoBody}, nil
			})
			if _, err := u.roundTrip(httptest.NewRequest(http.MethodGet, "https://node/task", nil), nil, nil); !errors.Is(err, test.err) || tries != test.tries {
				t.Errorf("%d tries, %v; want %d, %v", tries, err, test.tries, test.err)
			}
		})
	}
}
