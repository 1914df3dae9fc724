package fsbroker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// Node configures a processor node, which holds the reports of its tasks.
type Node struct {
	// The node's application server ID, as submissions name it.
	AppServerID string `json:"app_server_id"`

	Endpoint
}

// Endpoint configures how a node or the broker is reached, and with which secret.
type Endpoint struct {
	// `host:port`, or a URL with the scheme `http` or `https` and optionally a path that precedes `/task` or
	// `/submit-result`. Without a scheme it is HTTP, or HTTPS if the transport has TLS configured. Placeholders such as
	// `{env.NAME}` are resolved when the configuration is loaded.
	Address string `json:"address"`

	// The secret that the upstream requires, if any. Placeholders such as `{env.NAME}` and `{file./path}` are resolved
	// when the configuration is loaded. An unknown or empty placeholder is an error.
	Secret string `json:"secret,omitempty"`

	// The query parameter for the secret: `serect`, as it is spelled up to version 1.9, or `secret`, from 2.x on.
	// Default: both are sent
	SecretParam string `json:"secret_param,omitempty"`
}

// secretParams returns the query parameters for the secret.
func (e Endpoint) secretParams() ([]string, error) {
	switch e.SecretParam {
	case "":
		return []string{"serect", "secret"}, nil
	case "serect", "secret":
		return []string{e.SecretParam}, nil
	}
	return nil, errors.New("secret_param must be serect or secret")
}

// errAddress does not show the address: a password in it must not get into a log.
var errAddress = errors.New("the address must be host:port, or http://host:port/path or https://…, without user, query and fragment")

// parseAddress parses an address and completes it, so that one place always has the same name.
func parseAddress(address, defaultScheme string) (*url.URL, error) {
	if !strings.Contains(address, "://") {
		if strings.Contains(address, "/") {
			return nil, errAddress
		}
		address = defaultScheme + "://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, errAddress
	}
	port := u.Port()
	switch u.Scheme {
	case "http":
		if port == "" {
			port = "80"
		}
	case "https":
		if port == "" {
			port = "443"
		}
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
	upstreamOptions
	defaultScheme string
	failDuration  time.Duration
	notify        func(u *upstream, event, reason string)
}

// newUpstream resolves and checks an Endpoint. The name is a node's application server ID.
func (e Endpoint) newUpstream(repl *caddy.Replacer, role, name string, o endpointOptions) (*upstream, error) {
	address, err := repl.ReplaceOrErr(e.Address, true, true)
	if err != nil {
		return nil, fmt.Errorf("resolving the address: %w", err)
	}
	base, err := parseAddress(address, o.defaultScheme)
	if err != nil {
		return nil, err
	}
	params, err := e.secretParams()
	if err != nil {
		return nil, err
	}
	secret := make(url.Values)
	if e.Secret != "" {
		value, err := resolveSecret(repl, e.Secret)
		if err != nil {
			return nil, err
		}
		for _, param := range params {
			secret.Set(param, value)
		}
	}
	o.logger = o.logger.With(zap.String("role", role), zap.String("address", base.Host))
	if name != "" {
		o.logger = o.logger.With(zap.String("node", name))
	}
	u := &upstream{
		role:            role,
		name:            name,
		base:            base,
		address:         base.String(),
		secret:          &secret,
		identity:        task.NewKey(base.String(), secret.Encode(), fmt.Sprint(o.timeout, o.maxAnswer)),
		upstreamOptions: o.upstreamOptions,
	}
	u.health.failDuration, u.health.logger = o.failDuration, o.logger
	u.health.notify = func(event, reason string) { o.notify(u, event, reason) }
	return u, nil
}

// fetchReport fetches the report of a node's task.
func (u *upstream) fetchReport(ctx context.Context, taskID string, all bool, budget *reservation) (*task.Report, error) {
	params := url.Values{"taskID": {taskID}, "all": {strconv.FormatBool(all)}}
	var report *task.Report
	status, err := u.fetch(ctx, "task", params, budget, func(body io.Reader) (err error) {
		if report, err = task.ReadReport(body); err != nil {
			return u.problem(problemBadAnswer, fmt.Sprintf("sent something that is not a report: %s. Try again later", err))
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusNoContent:
		return task.NothingYet(time.Now()), nil
	case status == http.StatusNotFound:
		return nil, &problem{
			kind:   problemUnknownTask,
			detail: "the node does not know this task, or has deleted it: check the IDs, or submit the file again",
		}
	}
	return report, nil
}

// fetchSubmission fetches what became of a submission from the broker.
func (u *upstream) fetchSubmission(ctx context.Context, submitID string, budget *reservation) (*task.Submission, error) {
	var sub *task.Submission
	status, err := u.fetch(ctx, "submit-result", url.Values{"submitID": {submitID}}, budget, func(body io.Reader) (err error) {
		sub, err = task.ReadSubmission(body)
		switch {
		case errors.Is(err, task.ErrSubmissionFailed):
			return &problem{
				kind:   problemSubmissionFailed,
				detail: "the broker could not give this submission to a node: submit the file again",
			}
		case err != nil:
			return u.problem(problemBadAnswer, fmt.Sprintf("sent an answer that cannot be used: %s. Try again later", err))
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusNoContent:
		return task.QueuedSubmission(time.Now()), nil
	case status == http.StatusNotFound:
		return nil, &problem{
			kind:   problemUnknownSubmission,
			detail: "the broker does not know this submission: check submitID, or submit the file again",
		}
	}
	return sub, nil
}

// systemInfo is what a node says about itself.
type systemInfo struct {
	Name    string    `json:"name,omitempty"`
	Version string    `json:"version,omitempty"`
	Queue   nodeQueue `json:"queue"`
}

// nodeQueue has the numbers of a node's tasks that the node states.
type nodeQueue struct {
	Active    *int64 `json:"active,omitempty"`
	Queued    *int64 `json:"queued,omitempty"`
	Completed *int64 `json:"completed,omitempty"`
}

// maxSystemInfo is the maximum size of what a node says about itself, in bytes.
const maxSystemInfo = 1 << 20

// fetchSystemInfo fetches what a node says about itself, even if the node is down. An error means that ctx has ended.
func (u *upstream) fetchSystemInfo(ctx context.Context, timeout time.Duration, budget *reservation) (response, systemInfo, error) {
	var info systemInfo
	r, err := u.exchange(ctx, timeout, "system-info", make(url.Values), budget, func(body io.Reader) (err error) {
		if info, err = readSystemInfo(io.LimitReader(body, maxSystemInfo)); err != nil {
			return u.problem(problemBadAnswer, "sent something that is not a JSON object: its operator must correct that")
		}
		return nil
	})
	if err == nil && r.problem == nil && r.status != http.StatusOK {
		r.problem = u.problem(problemBadAnswer, fmt.Sprintf("answered with the status %d instead of its system information", r.status))
	}
	return r, info, err
}

// readSystemInfo reads a JSON object. Members that are missing or have another type are left out.
func readSystemInfo(body io.Reader) (systemInfo, error) {
	var doc *struct {
		VersionInfo struct {
			Name, Version optional[string]
		}
		QueueInfo struct {
			ActiveCount, QueueCount, CompletedCount optional[float64]
		}
	}
	text, err := io.ReadAll(body)
	if err != nil {
		return systemInfo{}, err
	}
	err = json.Unmarshal(text, &doc)
	if mismatch, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && mismatch.Field != "" {
		err = nil // of a member
	}
	if err == nil && doc == nil {
		err = errors.New("it is null")
	}
	if err != nil {
		return systemInfo{}, err
	}
	var info systemInfo
	if name := doc.VersionInfo.Name.value; name != nil {
		info.Name = *name
	}
	if version := doc.VersionInfo.Version.value; version != nil {
		info.Version = *version
	}
	info.Queue = nodeQueue{
		Active:    whole(doc.QueueInfo.ActiveCount),
		Queued:    whole(doc.QueueInfo.QueueCount),
		Completed: whole(doc.QueueInfo.CompletedCount),
	}
	return info, nil
}

// optional is a JSON value that may be missing or have another type.
type optional[T any] struct{ value *T }

// UnmarshalJSON implements json.Unmarshaler.
func (o *optional[T]) UnmarshalJSON(text []byte) error {
	var value T
	if json.Unmarshal(text, &value) == nil {
		o.value = &value
	}
	return nil
}

// whole returns a number as an integer, or nil.
func whole(number optional[float64]) *int64 {
	if number.value == nil {
		return nil
	}
	n := int64(*number.value)
	return &n
}
