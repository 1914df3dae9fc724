package fsbroker

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxIDLength bounds submission, node and task IDs, in bytes. Real ones are UUIDs.
const maxIDLength = 256

// question is what a caller wants to know, as the query of GET /task says it.
type question struct {
	submitID    string // wins over the pair below
	appServerID string
	taskID      string
	all         bool   // the complete report instead of the high-level one
	nocache     bool   // ask the node, whatever is kept
	waitGiven   bool   // it says how long to wait, or else the header may
	wait        uint32 // for how many seconds to have the answer wait for the report to be finished

	serect, secret string   // the caller's secret under both of its spellings
	bad            *problem // what is wrong with the query; told to nobody without a right secret
}

// subject is the question without what is only about its caller.
func (q question) subject() question {
	s := question{submitID: q.submitID, all: q.all, nocache: q.nocache}
	if s.submitID == "" {
		s.appServerID, s.taskID = q.appServerID, q.taskID
	}
	return s
}

// readQuestion reads a raw query. It always comes back with the secrets it could find, so that a request is
// authenticated before anything is said of it; what is wrong with the rest is in question.bad.
func readQuestion(rawQuery string) question {
	var q question
	var seen parameter
	for pair := range strings.SplitSeq(rawQuery, "&") {
		if pair != "" {
			q.read(pair, &seen)
		}
	}
	q.check(seen)
	return q
}

// parameter is a set of the query parameters that the Task API knows.
type parameter uint8

const (
	paramSerect parameter = 1 << iota
	paramSecret
	paramSubmitID
	paramAppServerID
	paramTaskID
	paramAll
	paramNoCache
	paramWait
)

// read takes in one name=value pair. Parameters the Task API does not know are nobody's trouble.
func (q *question) read(pair string, seen *parameter) {
	rawName, rawValue, _ := strings.Cut(pair, "=")
	name, nameErr := url.QueryUnescape(rawName)
	value, valueErr := url.QueryUnescape(rawValue)
	if nameErr != nil || valueErr != nil || strings.Contains(pair, ";") {
		q.refuse("malformed_query", "the query is not well-formed: percent-encode its values and separate parameters with &")
		return
	}

	var which parameter
	var text *string
	var flag *bool
	switch name {
	case "serect":
		which, text = paramSerect, &q.serect
	case "secret":
		which, text = paramSecret, &q.secret
	case "submitID":
		which, text = paramSubmitID, &q.submitID
	case "appServerID":
		which, text = paramAppServerID, &q.appServerID
	case "taskID":
		which, text = paramTaskID, &q.taskID
	case "all":
		which, flag = paramAll, &q.all
	case "nocache":
		which, flag = paramNoCache, &q.nocache
	case "wait":
		which, q.waitGiven = paramWait, true
	default:
		return
	}

	if *seen&which != 0 {
		q.refuse("repeated_parameter", fmt.Sprintf("the parameter %s is given more than once: give it once", name))
		return
	}
	*seen |= which
	var ok bool
	switch {
	case text != nil:
		*text = value
	case flag != nil:
		if *flag, ok = parseBool(value); !ok {
			q.refuse("malformed_parameter", fmt.Sprintf("the parameter %s wants true or false (or 1/0, yes/no, on/off)", name))
		}
	default:
		if q.wait, ok = parseSeconds(value); !ok {
			q.refuse("malformed_parameter", fmt.Sprintf("the parameter %s wants a number of whole seconds", name))
		}
	}
}

// check tells whether the parameters that were seen make a question.
func (q *question) check(seen parameter) {
	switch {
	case seen&paramSubmitID != 0:
		q.checkID("submitID", q.submitID)
	case seen&(paramAppServerID|paramTaskID) == 0:
		q.refuse("missing_parameter", "name the report: give submitID, or appServerID and taskID together")
	case seen&paramAppServerID == 0:
		q.refuse("missing_parameter", "taskID needs appServerID beside it (or give submitID instead of both)")
	case seen&paramTaskID == 0:
		q.refuse("missing_parameter", "appServerID needs taskID beside it (or give submitID instead of both)")
	default:
		q.checkID("appServerID", q.appServerID)
		q.checkID("taskID", q.taskID)
	}
}

func (q *question) checkID(name, id string) {
	if !validID(id) {
		q.refuse("malformed_parameter", fmt.Sprintf("the parameter %s wants an ID of 1 to %d bytes without control characters", name, maxIDLength))
	}
}

// refuse keeps the first thing that is wrong.
func (q *question) refuse(code, detail string) {
	if q.bad == nil {
		q.bad = &problem{status: http.StatusBadRequest, code: code, detail: detail}
	}
}

// validID tells whether id can be a submission's, a node's or a task's: something short that can be printed.
func validID(id string) bool {
	return id != "" && len(id) <= maxIDLength && utf8.ValidString(id) && !strings.ContainsFunc(id, unicode.IsControl)
}

// parseBool reads the Task API's booleans. A parameter that stands there without a value is true.
func parseBool(s string) (value, ok bool) {
	switch strings.ToLower(s) {
	case "", "true", "1", "yes", "on":
		return true, true
	case "false", "0", "no", "off":
		return false, true
	}
	return false, false
}

// parseSeconds reads a number of whole seconds. One that is too large for that is as good as the largest.
func parseSeconds(s string) (seconds uint32, ok bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil || errors.Is(err, strconv.ErrRange)
}

// preferredWait reads the wait preference (RFC 7240, section 4.3), of which the first one counts. What is malformed is
// nobody's preference.
func preferredWait(header http.Header) (seconds uint32) {
	for _, line := range header["Prefer"] {
		for more := true; more; {
			var preference string
			preference, line, more = cutUnquoted(line, ',')
			preference, _, _ = cutUnquoted(preference, ';') // its parameters are not for us
			name, value, _ := strings.Cut(preference, "=")
			if strings.EqualFold(strings.TrimSpace(name), "wait") {
				seconds, _ = parseSeconds(unquote(strings.TrimSpace(value)))
				return seconds
			}
		}
	}
	return 0
}

// cutUnquoted cuts s at the first separator that is not part of a quoted string.
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

// unquote is what a word says that may be a quoted string. Numbers have nothing to escape.
func unquote(word string) string {
	if inner, ok := strings.CutPrefix(word, `"`); ok {
		if inner, ok = strings.CutSuffix(inner, `"`); ok {
			return inner
		}
	}
	return word
}
