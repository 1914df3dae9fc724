package fsbroker

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

// Secret lets one client in. Several secrets may name the same client, so that a new one can be rotated in before the
// old one is removed.
type Secret struct {
	// The client's name, for logs and the placeholders `{http.fsbroker.client}` and `{http.auth.user.id}`: 1 to 64
	// letters, digits, dots, dashes, underscores or @. Default: `default`
	Client string `json:"client,omitempty"`

	// The secret that the client must present. Placeholders such as `{env.NAME}` and `{file./path}` are resolved when the
	// configuration is loaded. An unknown or empty placeholder is an error.
	Secret string `json:"secret"`

	// The endpoints that the client may use: `/task`, and those that the broker's `proxy` passes through. The secrets of
	// one client must have the same. Default: all that are served
	Allow []string `json:"allow,omitempty"`
}

// defaultClient is the name of clients that are given none.
const defaultClient = "default"

var clientName = regexp.MustCompile(`^[A-Za-z0-9._@-]{1,64}$`)

// errClientName does not show the name: if name and secret are swapped, the secret must not get into a log.
var errClientName = errors.New("a client's name must be 1 to 64 letters, digits, dots, dashes, underscores or @, and comes before the secret")

// client is a resolved Secret. Only the hash of the secret is kept.
type client struct {
	name  string
	sum   [sha256.Size]byte
	allow []string // the paths of the endpoints that it may use, in lower case and sorted; nil for all
	hits  hitCounters

	warned *atomic.Bool // about a secret in the query; shared by all secrets of that client
}

// may reports whether the client may use an endpoint.
func (c *client) may(e *endpoint) bool {
	return c.allow == nil || containsPath(c.allow, e.path)
}

type clients []client

// newClients resolves the configured secrets, given the paths of the endpoints that are served.
func newClients(repl *caddy.Replacer, secrets []Secret, served []string) (clients, error) {
	if len(secrets) == 0 {
		return nil, errors.New("no secret is configured: at least one is required to let a client in")
	}
	var known clients
	first := make(map[string]*client) // by name
	for i, s := range secrets {
		name := s.Client
		if name == "" {
			name = defaultClient
		}
		if !clientName.MatchString(name) {
			return nil, fmt.Errorf("secret %d: %w", i+1, errClientName)
		}
		value, err := resolveSecret(repl, s.Secret)
		if err != nil {
			return nil, fmt.Errorf("secret %d, of client %s: %w", i+1, name, err)
		}
		if other := known.find(value); other != nil && other.name != name {
			return nil, fmt.Errorf("secret %d: clients %s and %s share one secret: give each its own", i+1, name, other.name)
		}
		c := client{name: name, sum: sha256.Sum256([]byte(value)), hits: newHitCounters(name), warned: new(atomic.Bool)}
		if c.allow, err = newAllow(s.Allow, served); err != nil {
			return nil, fmt.Errorf("secret %d, of client %s: %w", i+1, name, err)
		}
		if other := first[name]; other == nil {
			first[name] = &c
		} else if c.warned = other.warned; !slices.Equal(c.allow, other.allow) {
			return nil, fmt.Errorf("secret %d: %w", i+1, errAllowDiffers(name))
		}
		known = append(known, c)
	}
	return known, nil
}

// newAllow returns the paths of the endpoints that a client may use, in lower case and sorted. It is nil for all.
func newAllow(paths, served []string) ([]string, error) {
	var allow []string
	for _, path := range paths {
		if !containsPath(served, path) {
			return nil, fmt.Errorf("allow has %q, which is not served: the endpoints are %s", path, strings.Join(served, ", "))
		}
		allow = append(allow, strings.ToLower(path))
	}
	slices.Sort(allow)
	return slices.Compact(allow), nil
}

// errAllowDiffers says that two secrets of a client differ in allow.
func errAllowDiffers(client string) error {
	return fmt.Errorf("the secrets of client %s differ in allow: give all of them the same", client)
}

// onePlaceholder matches a secret that is only a placeholder, such as {env.NAME}.
var onePlaceholder = regexp.MustCompile(`^\{\w+\.[^{}]+\}$`)

var errBraces = errors.New("the text in braces is not a placeholder that has a value: write literal braces as \\{ and \\}")

// resolveSecret replaces the placeholders of a secret. The error names a placeholder only if it cannot be a part of the
// secret itself.
func resolveSecret(repl *caddy.Replacer, secret string) (string, error) {
	value, err := replacePlaceholders(repl, secret)
	if err != nil {
		if !onePlaceholder.MatchString(secret) {
			err = errBraces
		}
		return "", fmt.Errorf("resolving the secret: %w", err)
	}
	if value == "" {
		return "", errors.New("the secret is empty: give one, or a placeholder such as {env.NAME} or {file./path} that has one")
	}
	return value, nil
}

// secretHeaders are the header fields in which a secret can be presented, beside Authorization: the one that the broker
// takes from version 2.2.1 on, and the one that the product's public clients send.
var secretHeaders = [...]string{"Secret", "X-Api-Key"}

// authenticate returns the client that a request comes from, or nil. Every secret that is presented must be valid, in each
// line of a repeated field, and an empty one is not: a wrong secret beside a right one is a mistake that must not go unnoticed.
func (cs clients) authenticate(header http.Header, q *parsedQuery) *client {
	var found *client
	valid := true
	for _, line := range header["Authorization"] {
		if token, ok := bearerToken(line); ok {
			valid = valid && cs.accept(token, &found)
		}
	}
	valid = valid && (q.given&paramSerect == 0 || cs.accept(q.serect, &found)) && (q.given&paramSecret == 0 || cs.accept(q.secret, &found))
	for _, name := range secretHeaders {
		for _, value := range header[name] {
			valid = valid && cs.accept(value, &found)
		}
	}
	if !valid {
		return nil
	}
	return found
}

// accept reports whether a secret is valid. It sets found to the client of the first secret.
func (cs clients) accept(presented string, found **client) bool {
	c := cs.find(presented)
	if *found == nil {
		*found = c
	}
	return c != nil
}

// find compares the hashes of all secrets in constant time, so timing reveals neither a secret's length nor a prefix.
func (cs clients) find(presented string) *client {
	sum := sha256.Sum256([]byte(presented))
	found := -1
	for i := range cs {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(sum[:], cs[i].sum[:]), i, found)
	}
	if found < 0 {
		return nil
	}
	return &cs[found]
}

// bearerToken returns the token of a line of Authorization (RFC 6750, section 2.1), and reports whether the line begins with
// Bearer. The token is empty if no space separates it from that, so the line is wrong, and not ignored. Another scheme is
// ignored: a site may use basic_auth as well.
func bearerToken(line string) (token string, ok bool) {
	const scheme = "Bearer"
	line = strings.TrimLeft(line, " \t") // which net/http does for HTTP/1 only
	if len(line) < len(scheme) || !strings.EqualFold(line[:len(scheme)], scheme) {
		return "", false
	}
	if rest := line[len(scheme):]; strings.HasPrefix(rest, " ") {
		token = strings.TrimLeft(rest, " ")
	}
	return token, true
}

// warnOfQuery warns once that the client sends its secret in the query.
func (c *client) warnOfQuery(logger *zap.Logger) {
	if c.warned.Load() || c.warned.Swap(true) {
		return
	}
	logger.Warn("a client sends its secret in the query, which ends up in logs: send Authorization: Bearer <secret> instead",
		zap.String("client", c.name))
}
