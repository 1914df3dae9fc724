package fsbroker

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
)

// Secret lets one client in. Several secrets may name the same client, so that one can be rotated in before the
// other goes.
type Secret struct {
	// The client's name, for logs and the placeholders `{http.fsbroker.client}` and `{http.auth.user.id}`: 1 to 64
	// letters, digits, dots, dashes, underscores or @. Default: `default`
	Client string `json:"client,omitempty"`

	// What the client has to present. Placeholders such as `{env.NAME}` and `{file./path}` are resolved when the
	// configuration is loaded; one that is unknown or empty is an error then.
	Secret string `json:"secret"`
}

// defaultClient names those who have a secret and no name.
const defaultClient = "default"

var clientName = regexp.MustCompile(`^[A-Za-z0-9._@-]{1,64}$`)

// errClientName does not show the name: who swaps name and secret must not find the secret in a log.
var errClientName = errors.New("a client's name wants 1 to 64 letters, digits, dots, dashes, underscores or @, and comes before the secret")

// client is a Secret as requests are checked against it: by its sum, which is all that is kept of it.
type client struct {
	name string
	sum  [sha256.Size]byte
	hits hitCounters

	warned *atomic.Bool // that it sends its secret in the query; all with one name have this together
}

type clients []client

// newClients resolves the configured secrets.
func newClients(repl *caddy.Replacer, secrets []Secret) (clients, error) {
	if len(secrets) == 0 {
		return nil, errors.New("no secret is configured: give at least one, or nobody could be let in")
	}
	var known clients
	warnings := make(map[string]*atomic.Bool)
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
		warned, ok := warnings[name]
		if !ok {
			warned = new(atomic.Bool)
			warnings[name] = warned
		}
		known = append(known, client{name: name, sum: sha256.Sum256([]byte(value)), hits: newHitCounters(name), warned: warned})
	}
	return known, nil
}

// onePlaceholder is a secret that is nothing but a placeholder such as {env.NAME}.
var onePlaceholder = regexp.MustCompile(`^\{\w+\.[^{}]+\}$`)

var errBraces = errors.New("what is in braces is no placeholder that has a value: write braces of the secret itself as \\{ and \\}")

// resolveSecret replaces the placeholders of a secret. Its errors name a placeholder only where it cannot be a part of
// the secret itself.
func resolveSecret(repl *caddy.Replacer, secret string) (string, error) {
	value, err := repl.ReplaceOrErr(secret, true, true)
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

// authenticate names the client a request comes from, or nil. Of the ways to present a secret, every one that is used
// has to hold a right one: a wrong secret beside a right one is a mistake somebody wants to hear of.
func (cs clients) authenticate(header http.Header, q question) *client {
	var found *client
	for _, presented := range [...]string{bearerToken(header), q.serect, q.secret} {
		if presented == "" {
			continue
		}
		c := cs.find(presented)
		if c == nil {
			return nil
		}
		if found == nil {
			found = c
		}
	}
	return found
}

// find compares sums, all of them, so that neither a secret's length nor how much of it is right can be timed.
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

// bearerToken is the token of RFC 6750, section 2.1. Another scheme is not ours: a site may put basic_auth in front.
func bearerToken(header http.Header) string {
	const scheme = "Bearer "
	value := header.Get("Authorization")
	if len(value) < len(scheme) || !strings.EqualFold(value[:len(scheme)], scheme) {
		return ""
	}
	return strings.TrimLeft(value[len(scheme):], " ")
}
