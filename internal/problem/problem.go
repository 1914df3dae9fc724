// Package problem has the problems that keep a request from getting what it asks for, with their stable codes. It does not know
// how they arise.
package problem

import (
	"bytes"
	"encoding/json"
	"net/http"
	"time"
)

// Role is what an upstream is.
type Role uint8

// The roles of upstreams.
const (
	RoleNone Role = iota
	RoleNode
	RoleBroker
)

// String returns the role as it stands in codes, details, logs and labels.
func (r Role) String() string { return [...]string{"", "node", "broker"}[r] }

// Kind is what a problem is, apart from how it is written.
type Kind uint8

// The kinds of problems. docs/API.md explains them, by their codes.
const (
	Unauthorized Kind = iota
	Forbidden
	MethodNotAllowed
	PreconditionFailed
	NotCached
	MissingParameter
	RepeatedParameter
	MalformedParameter
	MalformedQuery
	RequestTooLarge
	RequestTimeout
	IncompleteRequest
	ConflictingParameter
	NoBroker
	UnknownSubmission
	SubmissionFailed
	UnknownNode
	UnknownTask
	UnknownFile
	Unreachable
	Down
	Timeout
	BadAnswer
	AnswerTooLarge
	RefusedSecret
	RejectedRequest
	Overloaded
	WrongScheme
	UntrustedCertificate
	Busy
	StorageUnavailable
	Internal
	CallerLeft // the last one; no caller reads it
)

// kinds has the status and the stable code of each kind. The code of an upstream's problem follows its role, as in
// node_timeout. A kind is requested if an upstream was asked, or was tried, before the problem arose.
var kinds = [...]struct {
	status    int
	code      string
	upstream  bool
	requested bool
}{
	Unauthorized:         {status: http.StatusUnauthorized, code: "unauthorized"},
	Forbidden:            {status: http.StatusForbidden, code: "forbidden"},
	MethodNotAllowed:     {status: http.StatusMethodNotAllowed, code: "method_not_allowed"},
	PreconditionFailed:   {status: http.StatusPreconditionFailed, code: "precondition_failed"},
	NotCached:            {status: http.StatusGatewayTimeout, code: "not_cached"},
	MissingParameter:     {status: http.StatusBadRequest, code: "missing_parameter"},
	RepeatedParameter:    {status: http.StatusBadRequest, code: "repeated_parameter"},
	MalformedParameter:   {status: http.StatusBadRequest, code: "malformed_parameter"},
	MalformedQuery:       {status: http.StatusBadRequest, code: "malformed_query"},
	RequestTooLarge:      {status: http.StatusRequestEntityTooLarge, code: "request_too_large"},
	RequestTimeout:       {status: http.StatusRequestTimeout, code: "request_timeout"},
	IncompleteRequest:    {status: http.StatusBadRequest, code: "incomplete_request"},
	ConflictingParameter: {status: http.StatusBadRequest, code: "conflicting_parameter"},
	NoBroker:             {status: http.StatusBadRequest, code: "no_broker"},
	UnknownSubmission:    {status: http.StatusNotFound, code: "unknown_submission", requested: true},
	SubmissionFailed:     {status: http.StatusNotFound, code: "submission_failed", requested: true},
	UnknownNode:          {status: http.StatusNotFound, code: "unknown_node"},
	UnknownTask:          {status: http.StatusNotFound, code: "unknown_task", requested: true},
	UnknownFile:          {status: http.StatusNotFound, code: "unknown_file"},
	Unreachable:          {status: http.StatusBadGateway, code: "unreachable", upstream: true, requested: true},
	Down:                 {status: http.StatusServiceUnavailable, code: "down", upstream: true},
	Timeout:              {status: http.StatusGatewayTimeout, code: "timeout", upstream: true, requested: true},
	BadAnswer:            {status: http.StatusBadGateway, code: "bad_answer", upstream: true, requested: true},
	AnswerTooLarge:       {status: http.StatusBadGateway, code: "answer_too_large", upstream: true, requested: true},
	RefusedSecret:        {status: http.StatusBadGateway, code: "refused_secret", upstream: true, requested: true},
	RejectedRequest:      {status: http.StatusBadGateway, code: "rejected_request", upstream: true, requested: true},
	Overloaded:           {status: http.StatusServiceUnavailable, code: "overloaded", upstream: true, requested: true},
	WrongScheme:          {status: http.StatusBadGateway, code: "wrong_scheme", upstream: true, requested: true},
	UntrustedCertificate: {status: http.StatusBadGateway, code: "untrusted_certificate", upstream: true, requested: true},
	Busy:                 {status: http.StatusServiceUnavailable, code: "busy"},
	StorageUnavailable:   {status: http.StatusServiceUnavailable, code: "storage_unavailable", requested: true},
	Internal:             {status: http.StatusInternalServerError, code: "internal"},
	CallerLeft:           {status: StatusCallerLeft, code: "client_closed_request"},
}

// StatusCallerLeft is the status that nginx and Caddy log if the caller has left before the response.
const StatusCallerLeft = 499

// Codes returns the codes that callers can read, those of upstreams once for each role.
func Codes() (codes []string) {
	for kind := range CallerLeft {
		if !kinds[kind].upstream {
			codes = append(codes, kinds[kind].code)
			continue
		}
		for _, role := range [...]Role{RoleNode, RoleBroker} {
			codes = append(codes, (&Problem{Kind: kind, Role: role}).Code())
		}
	}
	return codes
}

// Problem is why a request gets no report, or no response of the broker. It becomes the problem document that the caller
// reads, so its detail must not hold a secret, a query or an upstream's address.
type Problem struct {
	Kind       Kind
	Role       Role          // of the upstream, if it is an upstream's problem
	Detail     string        // for people: what happened, and what to do next
	RetryAfter time.Duration // when to try again; 0 if that is not known
	Methods    []string      // those that the endpoint has, if the request has another one
	Earlier    bool          // an earlier attempt met it, so no upstream was asked for this request
}

// TryAgain is the advice at the end of a detail if nothing but trying again helps.
const TryAgain = ": try again after Retry-After"

// Error implements error.
func (p *Problem) Error() string { return p.Code() + ": " + p.Detail }

// Status returns the status of the response.
func (p *Problem) Status() int { return kinds[p.Kind].status }

// Code returns the stable code, such as "unknown_task" or "node_timeout".
func (p *Problem) Code() string {
	if kinds[p.Kind].upstream {
		return p.Role.String() + "_" + p.Reason()
	}
	return p.Reason()
}

// Reason returns the code without the upstream's role.
func (p *Problem) Reason() string { return kinds[p.Kind].code }

// Requested reports whether an upstream was asked, or was tried.
func (p *Problem) Requested() bool { return kinds[p.Kind].requested && !p.Earlier }

// Left is what a caller gets that has left, so nobody reads it.
var Left = &Problem{Kind: CallerLeft, Detail: "the caller has left before there was a response"}

// NoRoom is what a caller gets for whose report there is no memory.
var NoRoom = &Problem{
	Kind: Busy, RetryAfter: time.Second,
	Detail: "the reports that are being read and sent use up the memory for them" + TryAgain,
}

// Panicked is what the callers of a call get that has panicked.
var Panicked = &Problem{
	Kind:   Internal,
	Detail: "the request has met a fault of the server, which is in its log: try again, and tell its operator if that does not help",
}

// IsPassing reports whether an upstream could not be asked, or did not get to answer, for reasons that may pass.
func (p *Problem) IsPassing() bool {
	switch p.Kind {
	case Unreachable, Down, Timeout, Busy, Overloaded, WrongScheme, UntrustedCertificate:
		return true
	}
	return false
}

// With returns a copy of p with more detail. Other requests may share p.
func (p *Problem) With(detail string) *Problem {
	more := *p
	more.Detail += "; " + detail
	return &more
}

// base is where each code is explained: the page has an anchor for every code.
const base = "https://github.com/caddy-fsbroker/caddy-fsbroker/blob/main/docs/API.md#"

// Document returns the problem as JSON (RFC 9457, section 3), with the code as its extension member.
func (p *Problem) Document() []byte {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false) // people read it, and browsers do not take it for a page
	_ = encoder.Encode(struct {  // strings and a number never fail
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
		Code   string `json:"code"`
	}{base + p.Code(), http.StatusText(p.Status()), p.Status(), p.Detail, p.Code()})
	return bytes.TrimSuffix(body.Bytes(), []byte("\n"))
}
