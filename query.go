package fsbroker

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/harvest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// target is the report that a caller asks for, by its submission, or by its node and task.
type target struct {
	harvest.ID
	kind task.Kind
}

// query is what a caller asks for with GET /task.
type query struct {
	target
	sha256     string // the SHA-256 sum of a file, whose newest report is wanted; instead of a submission or a task
	nocache    bool   // ask an upstream, whatever is kept
	onlyCached bool   // ask no upstream
}

// parsedQuery is a query with what the query of a request has beside it.
type parsedQuery struct {
	query
	wait uint32 // seconds to hold the answer until the report is finished; if it is not given, the header Prefer counts

	given          parameter        // the parameters that the query has
	serect, secret string           // the caller's secret, in both spellings
	problem        *problem.Problem // the first problem of the query; only told to a caller with a valid secret
}

// parseQuery parses a raw query. It returns the secrets even if the rest is malformed, so that the caller is
// authenticated before anything is said about the query.
func parseQuery(rawQuery string) parsedQuery {
	var q parsedQuery
	for pair := range strings.SplitSeq(rawQuery, "&") {
		if pair != "" {
			q.parse(pair)
		}
	}
	q.check()
	return q
}

// parameter is a set of the query parameters of the Task API.
type parameter uint16

const (
	paramSerect parameter = 1 << iota
	paramSecret
	paramSubmitID
	paramAppServerID
	paramTaskID
	paramSHA256
	paramAll
	paramNoCache
	paramWait

	paramsSecret = paramSerect | paramSecret

	// paramsBesideFile are those that make no sense beside a file: they name another report, or concern the upstreams.
	paramsBesideFile = paramSubmitID | paramAppServerID | paramTaskID | paramNoCache | paramWait
)

// cutSecrets takes the caller's secrets out of a raw query for the broker. It returns them, and the rest of the query as it
// was. A parameter whose name differs from that of a secret in its case presents none, but is left out as well.
func cutSecrets(rawQuery string) (q parsedQuery, rest string) {
	var kept []string
	for pair := range strings.SplitSeq(rawQuery, "&") {
		switch name, _, ok := q.split(pair); {
		case !ok:
		case name == "serect", name == "secret":
			q.parse(pair)
		case !strings.EqualFold(name, "serect") && !strings.EqualFold(name, "secret"):
			kept = append(kept, pair)
		}
	}
	return q, strings.Join(kept, "&")
}

// split splits a name=value pair. A malformed one is rejected.
func (q *parsedQuery) split(pair string) (name, value string, ok bool) {
	rawName, rawValue, _ := strings.Cut(pair, "=")
	if strings.IndexByte(pair, '%') < 0 && strings.IndexByte(pair, '+') < 0 && strings.IndexByte(pair, ';') < 0 {
		return rawName, rawValue, true // most are like this, and QueryUnescape looks at each byte
	}
	name, nameErr := url.QueryUnescape(rawName)
	value, valueErr := url.QueryUnescape(rawValue)
	if nameErr != nil || valueErr != nil || strings.Contains(pair, ";") {
		q.reject(problem.MalformedQuery, "the query is malformed: percent-encode its values and separate parameters with &")
		return "", "", false
	}
	return name, value, true
}

// parse parses one name=value pair. Parameters that are not of the Task API are ignored.
func (q *parsedQuery) parse(pair string) {
	name, value, ok := q.split(pair)
	if !ok {
		return
	}

	var which parameter
	var text *string
	var flag *bool
	var all bool
	switch name {
	case "serect":
		which, text = paramSerect, &q.serect
	case "secret":
		which, text = paramSecret, &q.secret
	case "submitID":
		which, text = paramSubmitID, &q.SubmitID
	case "appServerID":
		which, text = paramAppServerID, &q.AppServerID
	case "taskID":
		which, text = paramTaskID, &q.TaskID
	case "sha256":
		which, text = paramSHA256, &q.sha256
	case "all":
		which, flag = paramAll, &all
	case "nocache":
		which, flag = paramNoCache, &q.nocache
	case "wait":
		which = paramWait
	default:
		return
	}

	if q.given&which != 0 {
		q.reject(problem.RepeatedParameter, fmt.Sprintf("the parameter %s is given more than once: give it once", name))
		if which&paramsSecret != 0 && *text != value {
			*text = "" // which is no secret: all of them must be right, and only one is kept
		}
		return
	}
	q.given |= which
	switch {
	case text != nil:
		*text = value
	case flag != nil:
		if *flag, ok = parseBool(value); !ok {
			q.reject(problem.MalformedParameter, fmt.Sprintf("the parameter %s must be true or false (or 1/0, yes/no, on/off)", name))
		}
		if all {
			q.kind = task.Complete
		}
	default:
		if q.wait, ok = parseSeconds(value); !ok {
			q.reject(problem.MalformedParameter, fmt.Sprintf("the parameter %s must be a whole number of seconds", name))
		}
	}
}

// check checks that the given parameters identify a report.
func (q *parsedQuery) check() {
	switch {
	case q.given&paramSHA256 != 0:
		q.checkFile()
	case q.given&paramSubmitID != 0: // which wins over the pair
		q.AppServerID, q.TaskID = "", ""
		q.checkID("submitID", q.SubmitID)
	case q.given&(paramAppServerID|paramTaskID) == 0:
		q.reject(problem.MissingParameter, "no report is named: give submitID, or appServerID and taskID together, or sha256")
	case q.given&paramAppServerID == 0:
		q.reject(problem.MissingParameter, "taskID needs appServerID beside it (or give submitID instead of both)")
	case q.given&paramTaskID == 0:
		q.reject(problem.MissingParameter, "appServerID needs taskID beside it (or give submitID instead of both)")
	default:
		q.checkID("appServerID", q.AppServerID)
		q.checkID("taskID", q.TaskID)
	}
}

func (q *parsedQuery) checkID(name, id string) {
	if !task.ValidID(id) {
		q.reject(problem.MalformedParameter, fmt.Sprintf("the parameter %s must be an ID of 1 to %d bytes without control characters", name, task.MaxIDLength))
	}
}

func (q *parsedQuery) checkFile() {
	if _, ok := parseSum(q.sha256); !ok {
		q.reject(problem.MalformedParameter, "the parameter sha256 must be 64 hexadecimal digits")
	}
	if q.given&paramsBesideFile != 0 {
		q.reject(problem.ConflictingParameter, "sha256 cannot be used with submitID, appServerID, taskID, nocache or wait: leave them out")
	}
}

// direct applies the directives of a request's Cache-Control.
func (q *parsedQuery) direct(header http.Header) {
	noCache, onlyCached := cacheDirectives(header)
	if noCache && q.sha256 != "" {
		q.reject(problem.ConflictingParameter, "sha256 only finds what is kept: leave out Cache-Control: no-cache")
	}
	q.nocache, q.onlyCached = q.nocache || noCache, onlyCached
}

// reject keeps the first problem.
func (q *parsedQuery) reject(kind problem.Kind, detail string) {
	if q.problem == nil {
		q.problem = &problem.Problem{Kind: kind, Detail: detail}
	}
}

// parseSum parses the SHA-256 sum of a file.
func parseSum(s string) (sum [sha256.Size]byte, ok bool) {
	if len(s) != hex.EncodedLen(len(sum)) {
		return sum, false
	}
	_, err := hex.Decode(sum[:], []byte(s))
	return sum, err == nil
}

// parseBool parses a boolean of the Task API. A parameter without a value is true.
func parseBool(s string) (value, ok bool) {
	switch strings.ToLower(s) {
	case "", "true", "1", "yes", "on":
		return true, true
	case "false", "0", "no", "off":
		return false, true
	}
	return false, false
}

// parseSeconds parses a whole number of seconds. A number that is too large is the largest one.
func parseSeconds(s string) (seconds uint32, ok bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil || errors.Is(err, strconv.ErrRange)
}

// preferredWait returns the first wait preference (RFC 7240, section 4.3). A malformed one is ignored.
func preferredWait(header http.Header) (seconds uint32) {
	for _, line := range header["Prefer"] {
		for more := true; more; {
			var preference string
			preference, line, more = cutUnquoted(line, ',')
			preference, _, _ = cutUnquoted(preference, ';') // parameters have no meaning here
			name, value, _ := strings.Cut(preference, "=")
			if strings.EqualFold(strings.TrimSpace(name), "wait") {
				seconds, _ = parseSeconds(unquote(strings.TrimSpace(value)))
				return seconds
			}
		}
	}
	return 0
}

// cutUnquoted cuts s at the first separator outside a quoted string.
func cutUnquoted(s string, separator byte) (before, after string, found bool) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == separator && !quoted:
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

// unquote returns the content of a quoted string, or the word itself. A number contains no escapes.
func unquote(word string) string {
	if inner, ok := strings.CutPrefix(word, `"`); ok {
		if inner, ok = strings.CutSuffix(inner, `"`); ok {
			return inner
		}
	}
	return word
}
