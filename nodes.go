package fsbroker

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// Node configures a processor node, which holds the reports of its tasks.
type Node struct {
	// The node's application server ID, as submissions name it.
	AppServerID string `json:"app_server_id"`

	Endpoint
}

// Endpoint configures how a node or the broker is reached, and with which secret.
type Endpoint struct {
	// A URL with the scheme `https` or `http`, and optionally a path that precedes `/task`, or `host:port`, which needs the
	// port. Without a scheme it is HTTPS if the transport has TLS configured, and HTTP otherwise. `http` beside a transport
	// with TLS is an error, unless the port is one of its `except_ports`. Placeholders such as `{env.NAME}` are resolved
	// when the configuration is loaded.
	Address string `json:"address"`

	// The secret that the upstream requires, if any. Placeholders such as `{env.NAME}` and `{file./path}` are resolved
	// when the configuration is loaded. An unknown or empty placeholder is an error.
	Secret string `json:"secret,omitempty"`

	// Where the upstream takes its secret, one or several of `header` (the header field `secret`, from version 2.2.1 on),
	// `secret` (the query parameter, as later pages spell it) and `serect` (the query parameter, as it is spelled up to
	// version 1.9). With `header` alone, no secret is in a URL. Default: all three
	SecretIn []string `json:"secret_in,omitempty"`
}

// Broker configures the broker, and which of its endpoints are passed through.
type Broker struct {
	Endpoint

	// The paths of the broker's other endpoints that are passed through to it, such as `/submit`. A caller authenticates
	// as for `/task`. Its secret is taken out of the request, and the broker's is added. Requests and responses are
	// streamed, and `timeout` does not apply to them. The path of a request is compared like in a `path` matcher, and is
	// sent to the broker as it is written here. Default: none
	Proxy []string `json:"proxy,omitempty"`
}

// secretPlaces are the values of SecretIn.
var secretPlaces = []string{"header", "secret", "serect"}

var errSecretIn = errors.New("secret_in must be one or several of header, secret and serect, once each")

// newSecret returns the secret of the endpoint with that value.
func (e Endpoint) newSecret(value string) (upstream.Secret, error) {
	s := upstream.Secret{Value: value}
	places := e.SecretIn
	if len(places) == 0 {
		places = secretPlaces
	}
	for i, place := range places {
		switch {
		case !slices.Contains(secretPlaces, place) || slices.Contains(places[:i], place):
			return upstream.Secret{}, errSecretIn
		case place == "header":
			s.InHeader = true
		default:
			s.Params = append(s.Params, place)
		}
	}
	return s, nil
}

// errAddress does not show the address: a password in it must not get into a log.
var errAddress = errors.New("the address must be host:port, or http://host:port/path or https://…, without user, query and fragment")

// errNoPort does not show the address either.
var errNoPort = errors.New("the address has no port: write host:port (by default, a node listens on 22001 and a broker on 23001), or https://host if the port is 443")

// parseAddress parses an address and completes it, so that one place always has the same name. An address without a
// scheme has the one that scheme returns for its port.
func parseAddress(address string, scheme func(port string) string) (*url.URL, error) {
	bare := !strings.Contains(address, "://")
	if bare {
		if strings.Contains(address, "/") {
			return nil, errAddress
		}
		address = "//" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, errAddress
	}
	port := u.Port()
	if bare && port == "" {
		return nil, errNoPort
	}
	if bare {
		u.Scheme = scheme(port)
	}
	switch u.Scheme {
	case "http":
		port = cmp.Or(port, "80")
	case "https":
		port = cmp.Or(port, "443")
	default:
		return nil, errAddress
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, errAddress
	}
	u.Host = net.JoinHostPort(strings.ToLower(u.Hostname()), port)
	u.Path = strings.TrimRight(u.Path, "/")
	u.RawPath = ""
	return u, nil
}

// endpointOptions are the options that the endpoints of a handler have in common.
type endpointOptions struct {
	upstream.Options
	tls *reverseproxy.TLSConfig // nil if the transport has none
}

// usesTLS reports whether the transport uses TLS for a port if the address has no scheme.
func (o endpointOptions) usesTLS(port string) bool {
	return o.tls != nil && !slices.Contains(o.tls.ExceptPorts, port)
}

var errHTTPBesideTLS = errors.New("the scheme of the address is http, but the transport is configured for TLS: write https://, remove the TLS options, or except the port with tls_except_ports")

// newUpstream resolves and checks an Endpoint.
func (e Endpoint) newUpstream(repl *caddy.Replacer, origin upstream.Origin, o endpointOptions) (*upstream.Upstream, error) {
	address, err := replacePlaceholders(repl, e.Address)
	if err != nil {
		return nil, fmt.Errorf("resolving the address: %w", err)
	}
	base, err := parseAddress(address, func(port string) string {
		if o.usesTLS(port) {
			return "https"
		}
		return "http"
	})
	if err != nil {
		return nil, err
	}
	if base.Scheme == "http" && o.usesTLS(base.Port()) {
		return nil, errHTTPBesideTLS
	}
	var value string
	if e.Secret != "" {
		if value, err = resolveSecret(repl, e.Secret); err != nil {
			return nil, err
		}
	}
	secret, err := e.newSecret(value)
	if err != nil {
		return nil, err
	}
	return upstream.New(upstream.Config{Options: o.Options, Origin: origin, Base: base, Secret: secret}), nil
}
