package fsbroker

import (
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// vary has the request header fields that a response depends on. A shared cache that merges requests for one URL looks at
// nothing else, so it has all that may hold a secret.
const vary = "Accept-Encoding, Authorization, Secret, X-Api-Key, Prefer"

// addVary adds vary to the values of Vary that other handlers have set. Each response has a slice of its own: handlers such as
// Caddy's header may replace the values in place.
func (i *requestInfo) addVary(header http.Header) {
	if len(header["Vary"]) > 0 {
		header.Add("Vary", vary)
		return
	}
	i.vary[0] = vary
	header["Vary"] = i.vary[:]
}

// responder writes the responses of a handler.
type responder struct {
	memory     *memory
	retryAfter time.Duration // for reports that have nothing yet
	logger     *zap.Logger
}

// write writes the report that was found and returns the status of the response. It takes little stack, as a hit must (see
// docs/ARCHITECTURE.md).
func (rp *responder) write(w http.ResponseWriter, r *http.Request, res *result) int {
	status, c := rp.prepare(w, r, res)
	if status != http.StatusOK {
		return status
	}
	defer rp.memory.releaseContent(c)
	w.WriteHeader(status)
	switch {
	case r.Method == http.MethodHead:
	case c.decoder != nil:
		rp.stream(w, res.entry.report)
	default:
		_, _ = w.Write(c.body) // an error means that the client has left
	}
	return status
}

// prepare sets the header fields of the response for a report. If the status is 200, it returns the content, which must be
// released. Any other response it has written.
func (rp *responder) prepare(w http.ResponseWriter, r *http.Request, res *result) (status int, c content) {
	report := res.entry.report
	f := fields{header: w.Header()}
	f.set("Cache-Status", cacheStatus(res))
	f.set("X-Content-Type-Options", "nosniff") // reports hold strings that attackers wrote
	if res.kept() {
		f.set("Age", strconv.Itoa(int(max(0, time.Since(report.At()))/time.Second)))
	}
	if report.Finished() {
		f.set("Cache-Control", "private, no-cache")
	} else {
		f.set("Cache-Control", "no-store")
		w.Header().Set("Retry-After", wholeSeconds(rp.retryAfter))
	}
	if report.IsEmpty() {
		w.WriteHeader(http.StatusNoContent)
		return http.StatusNoContent, c
	}

	e := res.entry
	gzipped := report.Gzipped() && prefersGzip(r.Header)
	inflated := report.Gzipped() && !gzipped
	rep := e.describe(inflated)
	if ifMatch := r.Header["If-Match"]; len(ifMatch) > 0 && !matchesETag(ifMatch, rep.ETag, false) {
		return writeProblem(w, r, errPreconditionFailed, cacheStatus(res)), c
	}
	if matchesETag(r.Header["If-None-Match"], rep.ETag, true) {
		f.set("Etag", rep.ETag)
		w.WriteHeader(http.StatusNotModified)
		return http.StatusNotModified, c
	}
	c, err := rp.memory.acquireContent(e, inflated && r.Method != http.MethodHead)
	if err != nil {
		return rp.refuse(w, r, res, err), c
	}
	f.set("Etag", rep.ETag)
	f.set("Content-Type", "application/json")
	f.set("Content-Length", rep.Length)
	if gzipped {
		f.set("Content-Encoding", "gzip")
	}
	return http.StatusOK, c
}

// refuse writes the problem that keeps a report from being sent: there is no memory for that, or the report is damaged.
func (rp *responder) refuse(w http.ResponseWriter, r *http.Request, res *result, err error) int {
	p := problem.NoRoom
	if !errors.Is(err, budget.ErrNoRoom) {
		rp.logger.Error("a kept report is damaged", zap.Error(err))
		p = errDamaged
	}
	w.Header().Del("Age") // of the report
	res.problem = p
	return writeProblem(w, r, p, cacheStatus(res))
}

// stream writes an inflated document piece by piece. The response cannot say any more that the report is damaged, so it is
// aborted then.
func (rp *responder) stream(w http.ResponseWriter, report *task.Report) {
	if err := report.WriteInflated(w); errors.Is(err, task.ErrDamaged) {
		rp.logger.Error("a kept report is damaged", zap.Error(err))
		panic(http.ErrAbortHandler)
	}
}

// writeProblem writes a problem document and returns the status of the response. Caddy's error handling would log the
// request URI and send no body.
func writeProblem(w http.ResponseWriter, r *http.Request, p *problem.Problem, cacheStatus string) int {
	body := p.Document()
	header := w.Header()
	header.Set("Content-Type", "application/problem+json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Set("Cache-Control", "no-store")
	header.Set("Cache-Status", cacheStatus)
	header.Set("X-Content-Type-Options", "nosniff")
	switch p.Kind {
	case problem.Unauthorized:
		header.Set("WWW-Authenticate", challenge(r.Header))
	case problem.MethodNotAllowed:
		header.Set("Allow", strings.Join(p.Methods, ", "))
	}
	if p.RetryAfter > 0 {
		header.Set("Retry-After", wholeSeconds(p.RetryAfter))
	}
	w.WriteHeader(p.Status())
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // an error means that the client has left
	}
	return p.Status()
}

// writeOptions answers OPTIONS. CORS is left to the site, which can add the header fields that it wants.
func writeOptions(w http.ResponseWriter, e *endpoint) int {
	w.Header().Set("Allow", strings.Join(e.methods, ", "))
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(http.StatusNoContent)
	return http.StatusNoContent
}

// challenge returns the value of WWW-Authenticate (RFC 6750, section 3). There is an error only if Bearer was used.
func challenge(header http.Header) string {
	for _, line := range header["Authorization"] {
		if _, ok := bearerToken(line); ok {
			return `Bearer realm="fsbroker", error="invalid_token"`
		}
	}
	return `Bearer realm="fsbroker"`
}

// errPreconditionFailed means that If-Match names another report.
var errPreconditionFailed = &problem.Problem{
	Kind:   problem.PreconditionFailed,
	Detail: "the report is not the one that If-Match names: ask for it without If-Match",
}

// errDamaged means that the memory of the machine is faulty.
var errDamaged = &problem.Problem{Kind: problem.Internal, Detail: "the kept report cannot be read: try again with nocache"}

// fields sets header fields, whose values share one array: most allocations of a hit would be slices of one string
// (BenchmarkHit). Names must be in the canonical form of http.Header.
type fields struct {
	header http.Header
	values [8]string
	n      int
}

func (f *fields) set(name, value string) {
	f.values[f.n] = value
	f.header[name] = f.values[f.n : f.n+1 : f.n+1]
	f.n++
}

// cacheStatus returns the field of RFC 9211 for a result.
func cacheStatus(res *result) string {
	forward := "fsbroker; fwd=uri-miss"
	if res.nocache {
		forward = "fsbroker; fwd=request"
	}
	switch res.outcome() {
	case outcomeError:
		return forward + "; detail=" + res.problem.Code()
	case outcomeNone:
		return "fsbroker; detail=" + res.problem.Code()
	case outcomeStorage:
		return "fsbroker; hit; detail=storage"
	case outcomeHit:
		return "fsbroker; hit"
	case outcomeCollapsed:
		return forward + "; collapsed"
	}
	if res.entry.unkept {
		return forward
	}
	return forward + "; stored"
}

// wholeSeconds formats d for Retry-After. It rounds up, so callers do not come back too early.
func wholeSeconds(d time.Duration) string {
	return strconv.Itoa(int(math.Ceil(d.Seconds())))
}
