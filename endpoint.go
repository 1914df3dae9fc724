package fsbroker

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// defaultProxy are the endpoints that the Caddyfile's `proxy` without arguments passes through: all that the product
// documents for a broker, except for /task.
var defaultProxy = []string{"/submit", "/submit-result", "/file", "/reputation", "/system-info"}

// proxyPath matches a path that can be passed through. It has no wildcard, placeholder or escape of a path matcher.
var proxyPath = regexp.MustCompile(`^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+$`)

var errProxyPath = errors.New("a path in proxy must be like /submit-result: letters, digits, dots, dashes, underscores and ~, without a slash at its end")

// checkProxy checks the paths that are passed through.
func checkProxy(paths []string) error {
	for i, path := range paths {
		switch {
		case !proxyPath.MatchString(path):
			return errProxyPath
		case strings.EqualFold(path, taskEndpoint.path):
			return errors.New("proxy cannot have /task, which is always served")
		case containsPath(paths[:i], path):
			return fmt.Errorf("proxy has %s more than once", path)
		}
	}
	return nil
}

// containsPath reports whether paths has a path, whatever its case.
func containsPath(paths []string, path string) bool {
	return slices.ContainsFunc(paths, func(p string) bool { return strings.EqualFold(p, path) })
}

// endpoint is an endpoint that is served.
type endpoint struct {
	path    string // as it is configured, which is how it is sent to the broker
	methods []string
}

// taskEndpoint is the one that the module serves itself.
var taskEndpoint = &endpoint{path: "/task", methods: []string{http.MethodGet, http.MethodHead, http.MethodOptions}}

// proxiedMethods are the methods that are passed through. TRACE is not one of them, because its response would repeat the
// broker's secret, and neither is CONNECT, because a tunnel has no endpoint.
var proxiedMethods = []string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions,
}

// servedPaths returns the paths of all endpoints, given those that are passed through.
func servedPaths(proxied []string) []string {
	return append([]string{taskEndpoint.path}, proxied...)
}
