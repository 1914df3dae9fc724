package upstream

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

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
