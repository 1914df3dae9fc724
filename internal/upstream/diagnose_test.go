package upstream

import (
	"net/url"
	"strings"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/redact"
)

// What an upstream states about itself is shortened for the log. No part of a secret is left at the end.
func TestSecretWhereATextIsShortened(t *testing.T) {
	const secret = "the secret/of the node"
	u := &Upstream{secret: &Secret{Value: secret}}
	for _, spelled := range []string{secret, url.QueryEscape(secret)} {
		for i := range len(spelled) {
			got := u.redact(strings.Repeat("x", maxStated-i) + spelled + strings.Repeat("y", maxStated))
			rest := strings.Trim(strings.TrimSuffix(got, "…"), "xy")
			if rest != redact.Placeholder[:min(len(rest), len(redact.Placeholder))] || len(got) > maxStated+len("…") {
				t.Errorf("%d bytes before the end: %q", i, rest)
			}
		}
	}
}
