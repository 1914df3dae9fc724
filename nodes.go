package fsbroker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/cli"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
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
func (e Endpoint) newSecret(value string) (*upstreamSecret, error) {
	s := &upstreamSecret{value: value}
	places := e.SecretIn
	if len(places) == 0 {
		places = secretPlaces
	}
	for i, place := range places {
		switch {
		case !slices.Contains(secretPlaces, place) || slices.Contains(places[:i], place):
			return nil, errSecretIn
		case place == "header":
			s.inHeader = true
		default:
			s.params = append(s.params, place)
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
	upstreamOptions
	tls          *reverseproxy.TLSConfig // nil if the transport has none
	failDuration time.Duration
	notify       func(u *upstream, event, reason string)
}

// usesTLS reports whether the transport uses TLS for a port if the address has no scheme.
func (o endpointOptions) usesTLS(port string) bool {
	return o.tls != nil && !slices.Contains(o.tls.ExceptPorts, port)
}

var errHTTPBesideTLS = errors.New("the scheme of the address is http, but the transport is configured for TLS: write https://, remove the TLS options, or except the port with tls_except_ports")

// newUpstream resolves and checks an Endpoint. The name is a node's application server ID.
func (e Endpoint) newUpstream(repl *caddy.Replacer, role problem.Role, name string, o endpointOptions) (*upstream, error) {
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
	o.logger = o.logger.With(zap.Stringer("role", role), zap.String("address", base.Host))
	if name != "" {
		o.logger = o.logger.With(zap.String("node", name))
	}
	u := &upstream{
		origin:          origin{role, name},
		base:            base,
		secret:          secret,
		identity:        task.NewKey(base.String(), value, fmt.Sprint(secret.inHeader, secret.params, o.timeout, o.maxAnswer)),
		upstreamOptions: o.upstreamOptions,
		line:            semaphore.NewWeighted(maxInFlight),
	}
	u.health.role, u.health.failDuration, u.health.logger = role, o.failDuration, o.logger
	u.health.warnings = make(map[string]*warning)
	u.health.notify = func(event, reason string) { o.notify(u, event, reason) }
	return u, nil
}

// errUnknown means that an upstream does not know a task or a submission.
var errUnknown = errors.New("the upstream does not know it")

// fetchTask fetches the report of a node's task from the node, or from the broker. A fresh fetch asks the broker for the
// node's current report instead of its copy.
func (u *upstream) fetchTask(ctx context.Context, q query, fresh bool) (*task.Report, error) {
	params := url.Values{"taskID": {q.taskID}, "all": {strconv.FormatBool(q.kind == task.Complete)}}
	if u.role == problem.RoleBroker {
		params.Set("appServerID", q.appServerID)
		setNocache(params, fresh)
	}
	return u.fetchReport(ctx, params)
}

// fetchSubmitted fetches the report of a submission from the broker.
func (u *upstream) fetchSubmitted(ctx context.Context, q query, fresh bool) (*task.Report, error) {
	params := url.Values{"submitID": {q.submitID}, "all": {strconv.FormatBool(q.kind == task.Complete)}}
	setNocache(params, fresh)
	return u.fetchReport(ctx, params)
}

func setNocache(params url.Values, fresh bool) {
	if fresh {
		params.Set("nocache", "true")
	}
}

// fetchReport fetches a report. The error is errUnknown if the upstream does not know it.
func (u *upstream) fetchReport(ctx context.Context, params url.Values) (*task.Report, error) {
	var report *task.Report
	status, err := u.fetch(ctx, "task", params, sourceRequest, func(body io.Reader, grow func(int64) error) (err error) {
		marked := &marker{Reader: body}
		report, err = task.ReadReport(marked, grow)
		if err != nil && !errors.Is(err, budget.ErrNoRoom) {
			return u.notA("report", err, marked)
		}
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusNoContent:
		return task.NothingYet(time.Now()), nil
	case status == http.StatusNotFound:
		return nil, errUnknown
	}
	return report, nil
}

// notA returns the problem that an answer is not what it should be.
func (u *upstream) notA(wanted string, err error, body *marker) *problem.Problem {
	if body.isHTML() {
		return u.problem(problem.BadAnswer, "sent something that looks like HTML and is not a "+wanted+": its operator checks that its address is that of the "+u.role.String())
	}
	return u.problem(problem.BadAnswer, fmt.Sprintf("sent something that is not a %s: %s"+problem.TryAgain, wanted, err))
}

// fetchSubmission fetches what the broker says about a submission. The error is errUnknown if the broker does not know it.
func (u *upstream) fetchSubmission(ctx context.Context, submitID string) (task.Submission, error) {
	var sub task.Submission
	status, err := u.fetch(ctx, "submit-result", url.Values{"submitID": {submitID}}, sourceOther, func(body io.Reader, _ func(int64) error) (err error) {
		sub, err = task.ReadSubmission(io.LimitReader(body, maxInfo))
		return err
	})
	switch {
	case err != nil:
		return task.Submission{}, err
	case status == http.StatusNoContent:
		return task.Submission{Queued: true}, nil
	case status == http.StatusNotFound:
		return task.Submission{}, errUnknown
	}
	return sub, nil
}

// systemInfo is what an upstream says about itself, as the admin API shows it.
type systemInfo = cli.SystemInfo

// maxInfo is how much is read of what an upstream says about itself or about a submission, in bytes.
const maxInfo = 64 << 10

// fetchSystemInfo fetches what an upstream says about itself, even if the upstream is down. An error means that ctx has
// ended.
func (u *upstream) fetchSystemInfo(ctx context.Context, timeout time.Duration) (response, systemInfo, error) {
	var info systemInfo
	r, err := u.exchange(ctx, timeout, "system-info", make(url.Values), func(body io.Reader, _ func(int64) error) (err error) {
		marked := &marker{Reader: io.LimitReader(body, maxInfo)}
		if info, err = readSystemInfo(marked); err != nil {
			return u.notA("JSON object", errors.New("it is not JSON, or something else"), marked)
		}
		return nil
	})
	if err == nil && r.problem == nil && r.status != http.StatusOK {
		r.problem = u.problem(problem.BadAnswer, fmt.Sprintf("answered with the status %d instead of its system information", r.status))
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
		ActiveThreads, FreeDiscSpaceInMb optional[float64]
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
	info := systemInfo{Name: short(doc.VersionInfo.Name), Version: short(doc.VersionInfo.Version)}
	info.ActiveThreads, info.FreeDiskSpaceMB = whole(doc.ActiveThreads), whole(doc.FreeDiscSpaceInMb)
	info.Queue = cli.QueueInfo{
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

// maxName bounds the name and the version of an upstream, in bytes.
const maxName = 64

// short returns a text that can be shown, or an empty string.
func short(text optional[string]) string {
	if text.value == nil || len(*text.value) > maxName || !task.ValidID(*text.value) {
		return ""
	}
	return *text.value
}

// whole returns a number as an integer, or nil.
func whole(number optional[float64]) *int64 {
	if number.value == nil {
		return nil
	}
	n := int64(*number.value)
	return &n
}
