package fsbroker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Node is a processor node: it holds the reports of the tasks it was given.
type Node struct {
	// The node's application server ID, as submissions name it.
	AppServerID string `json:"app_server_id"`

	Endpoint
}

// Endpoint says where a node or the broker is asked, and with which secret.
type Endpoint struct {
	// `host:port`, or a URL with the scheme `http` or `https` and perhaps a path to go before `/task` or
	// `/submit-result`. Without a scheme it is HTTP, or HTTPS where the transport has TLS configured. Placeholders
	// such as `{env.NAME}` are resolved when the configuration is loaded.
	Address string `json:"address"`

	// The secret that it is asked with, if it wants one. Placeholders such as `{env.NAME}` and `{file./path}` are
	// resolved when the configuration is loaded; one that is unknown or empty is an error.
	Secret string `json:"secret,omitempty"`

	// The query parameter for the secret: `serect`, as it is spelled up to version 1.9, or `secret`, from 2.x on.
	// Default: both are sent
	SecretParam string `json:"secret_param,omitempty"`
}

// secretParams are the spellings under which a secret is sent.
func (e Endpoint) secretParams() ([]string, error) {
	switch e.SecretParam {
	case "":
		return []string{"serect", "secret"}, nil
	case "serect", "secret":
		return []string{e.SecretParam}, nil
	}
	return nil, errors.New("secret_param wants serect or secret")
}

// errAddress does not show the address: who wrote a password into it must not find it in a log.
var errAddress = errors.New("the address wants host:port, or http://host:port/path or https://…, without user, query and fragment")

// parseAddress reads an address, and completes it so that one place always has one name.
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

// The roles of peers, in codes, details and logs.
const (
	roleNode   = "node"
	roleBroker = "broker"
)

// peer is a node or the broker as it is asked.
type peer struct {
	role    string // roleNode or roleBroker
	name    string // the node's application server ID
	base    *url.URL
	address string      // base, as it stands in keys
	secret  *url.Values // behind a pointer, so that nobody who prints a peer prints it

	// identity tells peers apart that may not share an answer: another address, another secret, or other bounds.
	identity key

	transport    http.RoundTripper
	timeout      time.Duration // for one question, body included
	failDuration time.Duration
	maxAnswer    int64
	logger       *zap.Logger

	asking atomic.Int64 // questions under way
	failed atomic.Int64 // when it last could not be connected to, in Unix nanoseconds; 0 when it could

	ailment atomic.Pointer[lapse] // what is wrong with it; nil when nothing is
	last    atomic.Pointer[lapse] // what last was, with it or an answer of it
	emit    emitter
}

// newPeer resolves and checks what an Endpoint says.
func (h *Handler) newPeer(repl *caddy.Replacer, role, name string, e Endpoint) (*peer, error) {
	address, err := repl.ReplaceOrErr(e.Address, true, true)
	if err != nil {
		return nil, fmt.Errorf("resolving the address: %w", err)
	}
	scheme := "http"
	if h.transport.TLSEnabled() {
		scheme = "https"
	}
	base, err := parseAddress(address, scheme)
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
	logger := h.logger.With(zap.String("role", role), zap.String("address", base.Host))
	if name != "" {
		logger = logger.With(zap.String("node", name))
	}
	return &peer{
		role:         role,
		name:         name,
		base:         base,
		address:      base.String(),
		secret:       &secret,
		identity:     newKey(base.String(), secret.Encode(), fmt.Sprint(h.Timeout, h.MaxReport)),
		transport:    h.transport,
		timeout:      time.Duration(h.Timeout),
		failDuration: time.Duration(h.FailDuration),
		maxAnswer:    h.MaxReport,
		logger:       logger,
		emit:         h.emit,
	}, nil
}

// problem words a problem with the peer: its code and its detail begin with the peer's role.
func (p *peer) problem(status int, code, detail string) *problem {
	return &problem{status: status, code: p.role + "_" + code, detail: "the " + p.role + " " + detail, asked: true}
}

// down tells whether the peer could not be connected to a short while ago: then nobody has to wait to see it again.
func (p *peer) down(now time.Time) *problem {
	failed := p.failed.Load()
	if failed == 0 {
		return nil
	}
	left := time.Unix(0, failed).Add(p.failDuration).Sub(now)
	if left <= 0 {
		return nil
	}
	down := p.problem(http.StatusServiceUnavailable, "down", "could not be connected to a moment ago: ask again after Retry-After")
	down.retryAfter = left
	down.asked = false
	return down
}

// reader reads the body of an answer. Its errors are about what stands there.
type reader func(body io.Reader) error

// ask asks the peer one question, and has the body of its answer read when it has one. It gives the status, which is
// 200, 204 or 404. ctx is a question's, never a caller's: the transport reads values from it, and the answer belongs to
// all who wait for it. Errors other than a *problem say that ctx has ended.
func (p *peer) ask(ctx context.Context, path string, query url.Values, room *lease, read reader) (status int, err error) {
	start := time.Now()
	if down := p.down(start); down != nil {
		return 0, down
	}
	p.asking.Add(1)
	defer p.asking.Add(-1)
	x, err := p.exchange(ctx, p.timeout, path, query, room, read)
	if err == nil {
		p.note(byQuestion, x)
		if x.trouble != nil {
			err = x.trouble
		}
	}
	p.countQuestion(x.status, err, time.Since(start))
	if err != nil {
		return 0, err
	}
	return x.status, nil
}

// exchange is a question and its answer.
type exchange struct {
	status     int
	trouble    *problem // nil where the answer is a good one
	cause      error    // of the trouble, which may hold what the peer sent
	dialFailed bool
}

// exchange asks a question, whatever is known of the peer. Its error says that ctx has ended.
func (p *peer) exchange(ctx context.Context, timeout time.Duration, path string, query url.Values, room *lease, read reader) (exchange, error) {
	start := time.Now()
	timed, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var dial dialWatch
	body := &answerBody{peer: p, room: room}
	status, err := p.roundTrip(p.request(httptrace.WithClientTrace(timed, dial.trace()), path, query), body, read)
	if err != nil && ctx.Err() != nil {
		return exchange{}, context.Cause(ctx)
	}
	x := exchange{status: status, trouble: p.diagnose(err, &dial), cause: err, dialFailed: dial.failed()}
	if ce := p.logger.Check(zap.DebugLevel, "asked"); ce != nil {
		code := ""
		if x.trouble != nil {
			code = x.trouble.code
		}
		ce.Write(zap.String("path", path), zap.Int("status", status), zap.Int64("size", body.size),
			zap.Duration("duration", time.Since(start)), zap.String("problem", code))
	}
	return x, nil
}

// request is a question to the peer, with its secret.
func (p *peer) request(ctx context.Context, path string, query url.Values) *http.Request {
	maps.Copy(query, *p.secret)
	u := *p.base
	u.Path += "/" + path
	u.RawQuery = query.Encode()
	// Caddy's transport takes these two from the context, and would find a caller's there.
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any))
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	req := &http.Request{
		Method: http.MethodGet,
		URL:    &u,
		Header: http.Header{"Accept": {"application/json"}, "User-Agent": {"caddy-fsbroker"}},
	}
	return req.WithContext(ctx)
}

// diagnose says what an error of roundTrip means to a caller. Only a failure to connect is held against the peer.
func (p *peer) diagnose(err error, dial *dialWatch) *problem {
	if err == nil {
		return nil
	}
	if trouble, ok := errors.AsType[*problem](err); ok {
		return trouble
	}
	timeout, dialFailed := isTimeout(err), dial.failed()
	if dialFailed {
		p.failed.Store(time.Now().UnixNano())
	}
	switch {
	case dialFailed && timeout:
		return p.problem(http.StatusGatewayTimeout, "timeout", "could not be connected to in time: ask again in a while")
	case dialFailed:
		return p.problem(http.StatusBadGateway, "unreachable", "could not be connected to: ask again in a while; its operator finds the reason in the log")
	case timeout:
		return p.problem(http.StatusGatewayTimeout, "timeout", "did not answer in time: ask again in a while")
	}
	return p.problem(http.StatusBadGateway, "bad_answer", "broke off its answer: ask again in a while")
}

// roundTrip sends req and has the answer read. It uses the transport itself, since an http.Client would follow
// redirects, secret and all, and write the URL into its errors.
func (p *peer) roundTrip(req *http.Request, body *answerBody, read reader) (status int, err error) {
	resp, err := p.transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	p.failed.Store(0)
	if resp.StatusCode == http.StatusOK {
		return resp.StatusCode, body.read(resp, read)
	}
	drain(resp.Body)
	switch resp.StatusCode {
	case http.StatusNoContent, http.StatusNotFound:
		return resp.StatusCode, nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return resp.StatusCode, p.problem(http.StatusBadGateway, "refused_secret", "did not take the secret it is configured with: its operator has to correct that")
	}
	return resp.StatusCode, p.problem(http.StatusBadGateway, "bad_answer",
		fmt.Sprintf("answered with status %d, which is no answer to this question: ask again in a while", resp.StatusCode))
}

// answerBody is the body of a peer's answer as it is read, within the peer's bound, inflated size included, and within the
// room that all answers share.
type answerBody struct {
	peer *peer
	room *lease
	from io.Reader
	size int64
	err  error // what kept it from being read to its end
}

// read has the body of resp read. What is wrong with reading it comes before what is wrong with what was read.
func (b *answerBody) read(resp *http.Response, read reader) error {
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return b.peer.problem(http.StatusBadGateway, "bad_answer", "sent an encoding that was not asked for: its operator has to correct that")
	}
	if err := b.grow(resp.ContentLength); err != nil {
		return err
	}
	b.from = resp.Body
	if err := read(b); b.err == nil {
		return err
	}
	return b.err
}

// Read implements io.Reader.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.from.Read(p)
	b.size += int64(n)
	if bound := b.grow(b.size); bound != nil {
		err = bound
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// grow makes sure that there may be size bytes of it.
func (b *answerBody) grow(size int64) error {
	if size > b.peer.maxAnswer {
		return b.peer.problem(http.StatusBadGateway, "answer_too_large",
			fmt.Sprintf("sent more than %d bytes: its operator may raise max_report", b.peer.maxAnswer))
	}
	if !b.room.grow(size) {
		return busy
	}
	return nil
}

// busy is for what would take more memory than there is for all questions together.
var busy = &problem{
	status: http.StatusServiceUnavailable, code: "busy", retryAfter: time.Second,
	detail: "the answers that are being read fill the memory there is for them: ask again after Retry-After",
}

// drain reads a little of a body that nobody wants, so that the connection can be used again.
func drain(body io.Reader) { _, _ = io.CopyN(io.Discard, body, 4<<10) }

// isTimeout tells whether err says that something took too long.
func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || (errors.As(err, &timeout) && timeout.Timeout())
}

// dialWatch sees whether a question got a connection. The transport's errors do not tell it when time runs out first.
type dialWatch struct{ dialing, connected atomic.Bool }

func (d *dialWatch) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn: func(string) { // once for every try
			d.dialing.Store(false)
			d.connected.Store(false)
		},
		DNSStart:     func(httptrace.DNSStartInfo) { d.dialing.Store(true) },
		ConnectStart: func(string, string) { d.dialing.Store(true) },
		GotConn:      func(httptrace.GotConnInfo) { d.connected.Store(true) },
	}
}

// failed tells whether connecting was tried, name resolution and TLS included, and came to nothing.
func (d *dialWatch) failed() bool { return d.dialing.Load() && !d.connected.Load() }

// askTask asks a node for the report of one of its tasks.
func (p *peer) askTask(ctx context.Context, taskID string, all bool, room *lease) (*report, error) {
	query := url.Values{"taskID": {taskID}, "all": {"false"}}
	if all {
		query.Set("all", "true")
	}
	var r *report
	status, err := p.ask(ctx, "task", query, room, func(body io.Reader) (err error) {
		if r, err = readReport(body); err != nil {
			return p.problem(http.StatusBadGateway, "bad_answer",
				fmt.Sprintf("sent something that is not a report: %s. Ask again in a while", err))
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusNoContent:
		return nothingYet(time.Now()), nil
	case status == http.StatusNotFound:
		return nil, &problem{
			status: http.StatusNotFound, code: "unknown_task", asked: true,
			detail: "the node does not know this task, or has forgotten it: check the IDs, or submit the file again",
		}
	}
	return r, nil
}

// submission is what the broker did with one.
type submission struct {
	at          time.Time
	queued      bool // not with a node yet
	appServerID string
	taskID      string
}

// answers implements keepable. What became of a submission never changes, so that is good enough for everybody.
func (s *submission) answers(nocache bool) bool { return !nocache || !s.queued }

// isReport implements keepable.
func (s *submission) isReport() bool { return false }

// since implements keepable.
func (s *submission) since() time.Time { return s.at }

// size implements keepable.
func (s *submission) size() int { return len(s.appServerID) + len(s.taskID) }

// askSubmission asks the broker which node a submission went to, and as which task.
func (p *peer) askSubmission(ctx context.Context, submitID string, room *lease) (*submission, error) {
	var sub *submission
	status, err := p.ask(ctx, "submit-result", url.Values{"submitID": {submitID}}, room, func(body io.Reader) (err error) {
		sub, err = p.readSubmission(body)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusNoContent:
		return &submission{at: time.Now(), queued: true}, nil
	case status == http.StatusNotFound:
		return nil, &problem{
			status: http.StatusNotFound, code: "unknown_submission", asked: true,
			detail: "the broker does not know this submission: check submitID, or submit the file again",
		}
	}
	return sub, nil
}

// errSubmissionFailed is the one thing a broker says of a submission that is as final as what it became.
var errSubmissionFailed = &problem{
	status: http.StatusNotFound, code: "submission_failed", asked: true,
	detail: "the broker could not pass this submission to a node: submit the file again",
}

// readSubmission reads the broker's answer. Its exact form is not documented, so what matters is looked for in every
// place where brokers are known or likely to have it.
func (p *peer) readSubmission(body io.Reader) (*submission, error) {
	text, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	var doc object
	if err := json.Unmarshal(text, &doc); err != nil || doc == nil {
		return nil, p.problem(http.StatusBadGateway, "bad_answer", "sent something that is not a JSON object: ask again in a while")
	}
	result := doc.object("result")
	s := state(doc.id("state"))
	if s == "" {
		s = state(result.id("state"))
	}
	if strings.EqualFold(string(s), "FAILED") {
		return nil, errSubmissionFailed
	}
	if s != "" && !s.finished() {
		return &submission{at: time.Now(), queued: true}, nil
	}
	sub := &submission{
		at:          time.Now(),
		appServerID: cmp.Or(doc.id("appServerID"), result.id("appServerID")),
		taskID:      cmp.Or(doc.id("taskID"), result.id("taskID"), scanTaskID(map[string]any(doc))),
	}
	switch {
	case !validID(sub.appServerID):
		return nil, p.problem(http.StatusBadGateway, "bad_answer", "named no node: appServerID is missing in its answer, or is no ID")
	case !validID(sub.taskID):
		return nil, p.problem(http.StatusBadGateway, "bad_answer",
			"named no task: its answer has no ID at taskID, result.taskID or scanTasks[0].taskReference.ID")
	}
	return sub, nil
}

// object is a JSON object of which little is known; nil is one without members.
type object map[string]any

// member finds a member, whatever the case of its name.
func (o object) member(name string) any {
	if v, ok := o[name]; ok {
		return v
	}
	for k, v := range o {
		if strings.EqualFold(k, name) {
			return v
		}
	}
	return nil
}

func (o object) object(name string) object {
	child, _ := o.member(name).(map[string]any)
	return child
}

// id is a member that is a string, or else empty.
func (o object) id(name string) string {
	s, _ := o.member(name).(string)
	return s
}

// scanTaskID finds scanTasks[0].taskReference.ID, however deep the scanTasks are.
func scanTaskID(o object) string {
	if tasks, ok := o.member("scanTasks").([]any); ok && len(tasks) > 0 {
		task, _ := tasks[0].(map[string]any)
		return object(task).object("taskReference").id("ID")
	}
	for _, v := range o {
		if child, ok := v.(map[string]any); ok {
			if id := scanTaskID(child); id != "" {
				return id
			}
		}
	}
	return ""
}
