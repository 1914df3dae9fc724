package fsbroker

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"
)

// problemBase is where each problem's code is explained: the README's table has an anchor for every one of them.
const problemBase = "https://github.com/caddy-fsbroker/caddy-fsbroker#"

// problem says why a request got no report. It becomes the RFC 9457 document that the caller reads, so neither its
// detail nor its code may ever hold a secret, a query or a node's address.
type problem struct {
	status     int
	code       string        // stable, for machines, e.g. "unknown_task"
	detail     string        // for people: what happened and what to do next
	retryAfter time.Duration // when asking again makes sense; 0 says nothing
	asked      bool          // a node or the broker was asked, or at least tried
}

// Error makes a problem an error, so that it can come back from a question.
func (p *problem) Error() string { return p.code + ": " + p.detail }

// adding is p with more to its detail. It is another problem, as others may be given p.
func (p *problem) adding(detail string) *problem {
	more := *p
	more.detail += "; " + detail
	return &more
}

// problemDocument is the JSON of RFC 9457, section 3, and the code as its one extension member.
type problemDocument struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Code   string `json:"code"`
}

// write answers with p itself, since Caddy's error handling would log the request's URI and send no body. It gives the
// status of the answer.
func (p *problem) write(w http.ResponseWriter, r *http.Request, cacheStatus string) int {
	body, _ := json.Marshal(problemDocument{ // strings and a number: nothing that could fail
		Type:   problemBase + p.code,
		Title:  http.StatusText(p.status),
		Status: p.status,
		Detail: p.detail,
		Code:   p.code,
	})
	header := w.Header()
	header.Set("Content-Type", "application/problem+json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Set("Cache-Control", "no-store")
	header.Set("Cache-Status", cacheStatus)
	switch p.status {
	case http.StatusUnauthorized:
		header.Set("WWW-Authenticate", "Bearer")
	case http.StatusMethodNotAllowed:
		header.Set("Allow", "GET, HEAD")
	}
	if p.retryAfter > 0 {
		header.Set("Retry-After", wholeSeconds(p.retryAfter))
	}
	w.WriteHeader(p.status)
	writeBody(w, r, body)
	return p.status
}

// wholeSeconds renders d as Retry-After wants it, rounded up so that nobody comes back too early.
func wholeSeconds(d time.Duration) string {
	return strconv.Itoa(int(math.Ceil(d.Seconds())))
}
