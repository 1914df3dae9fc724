package fsbroker

import (
	"net/http"
	"strconv"
	"strings"
)

// matchesETag reports whether lines of If-Match or If-None-Match match the entity tag of a response, which is a strong one
// (RFC 9110, sections 13.1.1 and 13.1.2). In a weak comparison, a weak tag matches as well.
func matchesETag(lines []string, etag string, weak bool) bool {
	if len(lines) == 1 && strings.TrimSpace(lines[0]) == "*" {
		return true
	}
	for _, line := range lines {
		for rest := line; rest != ""; {
			var tag string
			var isWeak bool
			tag, isWeak, rest = nextETag(rest)
			if tag == etag && (weak || !isWeak) {
				return true
			}
		}
	}
	return false
}

// nextETag returns the first entity tag of a list and the rest of the list. A member that is malformed is an empty tag.
func nextETag(list string) (tag string, weak bool, rest string) {
	list = strings.TrimLeft(list, " \t,")
	if after, ok := strings.CutPrefix(list, "W/"); ok {
		weak, list = true, after
	}
	if end := strings.IndexByte(strings.TrimPrefix(list, `"`), '"'); end >= 0 && list[0] == '"' {
		return list[:end+2], weak, list[end+2:]
	}
	_, rest, _ = strings.Cut(list, ",")
	return "", false, rest
}

// prefersGzip reports whether a response is best compressed with gzip (RFC 9110, section 12.5.3): gzip is acceptable, and
// the caller does not prefer no coding.
func prefersGzip(header http.Header) bool {
	gzip, identity, rest := -1.0, -1.0, -1.0 // not given
	for _, line := range header["Accept-Encoding"] {
		for item := range strings.SplitSeq(line, ",") {
			coding, parameter, _ := strings.Cut(item, ";")
			switch coding = strings.TrimSpace(coding); {
			case strings.EqualFold(coding, "gzip"), strings.EqualFold(coding, "x-gzip"):
				gzip = weight(parameter)
			case strings.EqualFold(coding, "identity"):
				identity = weight(parameter)
			case coding == "*":
				rest = weight(parameter)
			}
		}
	}
	if gzip < 0 {
		gzip = rest
	}
	return gzip > 0 && gzip >= identity
}

// weight parses a weight such as "q=0.5". A missing weight is 1, and a malformed one is 0.
func weight(parameter string) float64 {
	if parameter == "" {
		return 1
	}
	value, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(parameter)), "q=")
	if !ok {
		return 1
	}
	q, err := strconv.ParseFloat(value, 64)
	if err != nil || !(q >= 0 && q <= 1) {
		return 0
	}
	return q
}

// cacheDirectives returns the directives of a request's Cache-Control that matter here (RFC 9111, section 5.2.1). With
// no-cache, the caller wants no kept report. With only-if-cached, it wants no other.
func cacheDirectives(header http.Header) (noCache, onlyIfCached bool) {
	for _, line := range header["Cache-Control"] {
		for directive := range strings.SplitSeq(line, ",") {
			switch directive = strings.TrimSpace(directive); {
			case strings.EqualFold(directive, "no-cache"):
				noCache = true
			case strings.EqualFold(directive, "only-if-cached"):
				onlyIfCached = true
			}
		}
	}
	return noCache, onlyIfCached
}
