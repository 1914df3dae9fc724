// Package webhook is an example of an event handler for Caddy: it tells another server that a report is finished. Build it
// into Caddy beside the fsbroker_task handler, or copy it to send something else.
package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() {
	caddy.RegisterModule(new(Handler))
}

// Handler handles the event `fsbroker_report_finished`: it posts a JSON object with the IDs and the hash of the file to a
// server. It tries again if the server cannot be reached, is overloaded or fails, until the timeout. It returns an error
// then, which Caddy logs.
type Handler struct {
	// The URL of the server, which must be an https one. Placeholders such as `{file./run/secrets/webhook-url}` are replaced.
	URL string `json:"url"`

	// The Bearer token for the server. Placeholders are replaced. Default: none
	Token string `json:"token,omitempty"`

	// How long it may take until the server has accepted a message, over all tries. Default: `10s`
	Timeout caddy.Duration `json:"timeout,omitempty"`

	server *server
}

// server is where the messages go. What it holds may be secret, so it is apart from the configuration, which is logged.
type server struct {
	url    string
	token  string
	client *http.Client
}

const (
	defaultTimeout = 10 * time.Second

	// firstPause is the pause after the first try. Each pause is twice as long as the one before.
	firstPause = 500 * time.Millisecond

	// maxIdle is the number of events that the fsbroker_task handler emits at once.
	maxIdle = 16
)

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "events.handlers.webhook",
		New: func() caddy.Module { return new(Handler) },
	}
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens:
//
//	webhook <url> {
//		token   <token>
//		timeout <duration>
//	}
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the handler's name
	if !d.AllArgs(&h.URL) {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		var value string
		if !d.AllArgs(&value) {
			return d.ArgErr()
		}
		switch option {
		case "token":
			h.Token = value
		case "timeout":
			timeout, err := caddy.ParseDuration(value)
			if err != nil {
				return d.Errf("timeout must be a duration such as 10s: %v", err)
			}
			h.Timeout = caddy.Duration(timeout)
		default:
			return d.Errf("unknown option %s: use token or timeout", option)
		}
	}
	return nil
}

// Provision sets up the handler.
func (h *Handler) Provision(caddy.Context) error {
	if h.Timeout == 0 {
		h.Timeout = caddy.Duration(defaultTimeout)
	}
	if h.Timeout < caddy.Duration(time.Second) {
		return errors.New("timeout must be 1s or more")
	}
	repl := caddy.NewReplacer()
	address, err := repl.ReplaceOrErr(h.URL, true, true)
	if err != nil {
		return fmt.Errorf("the URL: %w", err)
	}
	// An error must not repeat the URL: it may be a secret.
	if u, err := url.Parse(address); err != nil || u.Scheme != "https" || u.Host == "" {
		return errors.New("the URL must begin with https:// and a host")
	}
	token, err := repl.ReplaceOrErr(h.Token, true, true)
	if err != nil {
		return fmt.Errorf("the token: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = maxIdle
	h.server = &server{url: address, token: token, client: &http.Client{
		Transport: transport,
		// A redirect could lead to another server, which must not get the token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	return nil
}

// Cleanup closes the connections to the server that are not in use.
func (h *Handler) Cleanup() error {
	if h.server != nil {
		h.server.client.CloseIdleConnections()
	}
	return nil
}

// sent are the members of the event's data that are sent. The name of the file is not among them: whoever submits the file
// chooses it.
var sent = []string{"namespace", "client", "submit_id", "node", "task_id", "sha256"}

// Handle implements caddyevents.Handler.
func (h *Handler) Handle(ctx context.Context, e caddy.Event) error {
	message := map[string]string{"event": e.Name()}
	for _, name := range sent {
		if value, _ := e.Data[name].(string); value != "" {
			message[name] = value
		}
	}
	body, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encoding the webhook: %w", err)
	}
	// When the configuration is reloaded, ctx ends. The report would not be told again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(h.Timeout))
	defer cancel()
	for pause := firstPause; ; pause *= 2 {
		again, err := h.server.post(ctx, body)
		if err == nil {
			return nil
		}
		if !again || !sleep(ctx, pause) {
			return fmt.Errorf("the webhook was not accepted: %w", err)
		}
	}
}

// sleep waits, and reports whether ctx has not ended meanwhile.
func sleep(ctx context.Context, pause time.Duration) bool {
	select {
	case <-time.After(pause):
		return true
	case <-ctx.Done():
		return false
	}
}

// post sends a message, and reports whether an error may pass.
func (s *server) post(ctx context.Context, body []byte) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return false, errors.New("the URL is malformed")
	}
	req.Header.Set("Content-Type", "application/json")
	if s.token != "" {
		req.Header.Set("Authorization", "Bearer "+s.token)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err // without the URL
		}
		return true, err
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
	if resp.StatusCode >= 200 && resp.StatusCode <= 299 {
		return false, nil
	}
	return resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500, fmt.Errorf("the server answered %d", resp.StatusCode)
}

// Interface guards
var (
	_ caddyevents.Handler   = (*Handler)(nil)
	_ caddy.Provisioner     = (*Handler)(nil)
	_ caddy.CleanerUpper    = (*Handler)(nil)
	_ caddyfile.Unmarshaler = (*Handler)(nil)
)
