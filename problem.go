package fsbroker

import (
	"bytes"
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"
)

// role is what an upstream is.
type role uint8

const (
	roleNone role = iota
	roleNode
	roleBroker
)

// String returns the role as it stands in codes, details, logs and labels.
func (r role) String() string { return [...]string{"", "node", "broker"}[r] }

// problemKind is what a problem is, apart from how it is written.
type problemKind uint8

const (
	problemUnauthorized problemKind = iota
	problemForbidden
	problemMethodNotAllowed
	problemPreconditionFailed
	problemNotCached
	problemMissingParameter
	problemRepeatedParameter
	problemMalformedParameter
	problemMalformedQuery
	problemRequestTooLarge
	problemRequestTimeout
	problemIncompleteRequest
	problemConflictingParameter
	problemNoBroker
	problemUnknownSubmission
	problemSubmissionFailed
	problemUnknownNode
	problemUnknownTask
	problemUnknownFile
	problemUnreachable
	problemDown
	problemTimeout
	problemBadAnswer
	problemAnswerTooLarge
	problemRefusedSecret
	problemRejectedRequest
	problemOverloaded
	problemWrongScheme
	problemUntrustedCertificate
	problemBusy
	problemStorageUnavailable
	problemInternal
)

// problemKinds has the status and the stable code of each kind. The code of an upstream's problem follows its role, as in
// node_timeout. A problem is requested if an upstream was asked, or was tried, before it arose.
var problemKinds = [...]struct {
	status    int
	code      string
	upstream  bool
	requested bool
}{
	problemUnauthorized:         {status: http.StatusUnauthorized, code: "unauthorized"},
	problemForbidden:            {status: http.StatusForbidden, code: "forbidden"},
	problemMethodNotAllowed:     {status: http.StatusMethodNotAllowed, code: "method_not_allowed"},
	problemPreconditionFailed:   {status: http.StatusPreconditionFailed, code: "precondition_failed"},
	problemNotCached:            {status: http.StatusGatewayTimeout, code: "not_cached"},
	problemMissingParameter:     {status: http.StatusBadRequest, code: "missing_parameter"},
	problemRepeatedParameter:    {status: http.StatusBadRequest, code: "repeated_parameter"},
	problemMalformedParameter:   {status: http.StatusBadRequest, code: "malformed_parameter"},
	problemMalformedQuery:       {status: http.StatusBadRequest, code: "malformed_query"},
	problemRequestTooLarge:      {status: http.StatusRequestEntityTooLarge, code: "request_too_large"},
	problemRequestTimeout:       {status: http.StatusRequestTimeout, code: "request_timeout"},
	problemIncompleteRequest:    {status: http.StatusBadRequest, code: "incomplete_request"},
	problemConflictingParameter: {status: http.StatusBadRequest, code: "conflicting_parameter"},
	problemNoBroker:             {status: http.StatusBadRequest, code: "no_broker"},
	problemUnknownSubmission:    {status: http.StatusNotFound, code: "unknown_submission", requested: true},
	problemSubmissionFailed:     {status: http.StatusNotFound, code: "submission_failed", requested: true},
	problemUnknownNode:          {status: http.StatusNotFound, code: "unknown_node"},
	problemUnknownTask:          {status: http.StatusNotFound, code: "unknown_task", requested: true},
	problemUnknownFile:          {status: http.StatusNotFound, code: "unknown_file"},
	problemUnreachable:          {status: http.StatusBadGateway, code: "unreachable", upstream: true, requested: true},
	problemDown:                 {status: http.StatusServiceUnavailable, code: "down", upstream: true},
	problemTimeout:              {status: http.StatusGatewayTimeout, code: "timeout", upstream: true, requested: true},
	problemBadAnswer:            {status: http.StatusBadGateway, code: "bad_answer", upstream: true, requested: true},
	problemAnswerTooLarge:       {status: http.StatusBadGateway, code: "answer_too_large", upstream: true, requested: true},
	problemRefusedSecret:        {status: http.StatusBadGateway, code: "refused_secret", upstream: true, requested: true},
	problemRejectedRequest:      {status: http.StatusBadGateway, code: "rejected_request", upstream: true, requested: true},
	problemOverloaded:           {status: http.StatusServiceUnavailable, code: "overloaded", upstream: true, requested: true},
	problemWrongScheme:          {status: http.StatusBadGateway, code: "wrong_scheme", upstream: true, requested: true},
	problemUntrustedCertificate: {status: http.StatusBadGateway, code: "untrusted_certificate", upstream: true, requested: true},
	problemBusy:                 {status: http.StatusServiceUnavailable, code: "busy"},
	problemStorageUnavailable:   {status: http.StatusServiceUnavailable, code: "storage_unavailable", requested: true},
	problemInternal:             {status: http.StatusInternalServerError, code: "internal"},
}

// problem is why a request gets no report, or no response of the broker. It becomes the problem document that the caller
// reads, so its detail must not hold a secret, a query or an upstream's address.
type problem struct {
	kind       problemKind
	role       role          // of the upstream, if it is an upstream's problem
	detail     string        // for people: what happened, and what to do next
	retryAfter time.Duration // when to try again; 0 if that is not known
	methods    []string      // those that the endpoint has, if the request has another one
	earlier    bool          // an earlier attempt met it, so no upstream was asked for this request
}

// tryAgain is the advice at the end of a detail if nothing but trying again helps.
const tryAgain = ": try again after Retry-After"

// Error implements error.
func (p *problem) Error() string { return p.code() + ": " + p.detail }

func (p *problem) status() int { return problemKinds[p.kind].status }

// code returns the stable code, such as "unknown_task" or "node_timeout".
func (p *problem) code() string {
	if problemKinds[p.kind].upstream {
		return p.role.String() + "_" + p.reason()
	}
	return p.reason()
}

// reason returns the code without the upstream's role.
func (p *problem) reason() string { return problemKinds[p.kind].code }

// requested reports whether an upstream was asked, or was tried.
func (p *problem) requested() bool { return problemKinds[p.kind].requested && !p.earlier }

// errPanicked is what the callers of a call get that has panicked.
var errPanicked = &problem{
	kind:   problemInternal,
	detail: "the request has met a fault of the server, which is in its log: try again, and tell its operator if that does not help",
}

// asProblem returns the problem that an error means if a call has panicked, or else the error. What a storage has wrapped is a
// failure of the storage like any other.
func asProblem(err error) error {
	if err == guard.ErrPanic { //nolint:errorlint // on purpose
		return errPanicked
	}
	return err
}

// isPassing reports whether an upstream could not be asked, for reasons that may pass.
func (p *problem) isPassing() bool {
	switch p.kind {
	case problemUnreachable, problemDown, problemTimeout, problemBusy, problemOverloaded, problemWrongScheme, problemUntrustedCertificate:
		return true
	}
	return false
}

// with returns a copy of p with more detail. Other requests may share p.
func (p *problem) with(detail string) *problem {
	more := *p
	more.detail += "; " + detail
	return &more
}

// problemBase is where each code is explained: the page has an anchor for every code.
const problemBase = "https://github.com/caddy-fsbroker/caddy-fsbroker/blob/main/docs/API.md#"

// document returns the problem as JSON (RFC 9457, section 3), with the code as its extension member.
func (p *problem) document() []byte {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false) // people read it, and browsers do not take it for a page
	_ = encoder.Encode(struct {  // strings and a number never fail
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
		Code   string `json:"code"`
	}{problemBase + p.code(), http.StatusText(p.status()), p.status(), p.detail, p.code()})
	return bytes.TrimSuffix(body.Bytes(), []byte("\n"))
}

// wholeSeconds formats d for Retry-After. It rounds up, so callers do not come back too early.
func wholeSeconds(d time.Duration) string {
	return strconv.Itoa(int(math.Ceil(d.Seconds())))
}
