package fsbroker

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
)

// write answers with the report that was found.
func (h *Handler) write(w http.ResponseWriter, r *http.Request, found finding) {
	report := found.entry.report()
	header := w.Header()
	header.Set("Cache-Status", found.cacheStatus(nil))
	addVary(header)
	if found.hit {
		header.Set("Age", strconv.Itoa(int(time.Since(report.at)/time.Second)))
	}
	if report.finished {
		header.Set("Cache-Control", "private, no-cache")
	} else {
		header.Set("Cache-Control", "no-store")
	}
	if report.isEmpty() {
		header.Set("Retry-After", wholeSeconds(time.Duration(h.PollInterval)))
		w.WriteHeader(http.StatusNoContent)
		return
	}

	gzipped := report.gzipped.Load()
	if gzipped != nil && !acceptsGzip(r.Header) {
		gzipped = nil
	}
	etag := `"` + report.hash + `"`
	if gzipped != nil {
		etag = `"` + report.hash + `-gz"`
	}
	header.Set("ETag", etag)
	if matches(r.Header, etag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}

	header.Set("Content-Type", "application/json")
	body := found.document
	switch {
	case gzipped != nil:
		header.Set("Content-Encoding", "gzip")
		body = *gzipped
	case body == nil:
		var err error
		if body, err = h.store.plain(found.entry); err != nil {
			h.logger.Error("a kept report is damaged", zap.Error(err))
			damaged.write(w, r, found.cacheStatus(damaged))
			return
		}
	}
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	writeBody(w, r, body)
}

// writeBody ends an answer. An error means that the client has left; handed on to Caddy, it would come into the log
// with the request's URI.
func writeBody(w http.ResponseWriter, r *http.Request, body []byte) {
	if r.Method != http.MethodHead {
		_, _ = w.Write(body)
	}
}

// damaged is for what cannot happen while the memory is sound.
var damaged = &problem{
	status: http.StatusInternalServerError, code: "internal",
	detail: "the kept report cannot be read: ask with nocache",
}

// cacheStatus is the field of RFC 9211 for this finding, or for the problem there was instead.
func (f *finding) cacheStatus(p *problem) string {
	forward := "fsbroker; fwd=uri-miss"
	if f.nocache {
		forward = "fsbroker; fwd=request"
	}
	switch {
	case p != nil && p.asked:
		return forward + "; detail=" + p.code
	case p != nil:
		return "fsbroker; detail=" + p.code
	case f.hit:
		return "fsbroker; hit"
	case f.joined:
		return forward + "; collapsed"
	}
	return forward + "; stored"
}

// addVary adds to what other handlers may have put there.
func addVary(header http.Header) {
	for _, v := range header["Vary"] {
		if strings.EqualFold(v, "Accept-Encoding") {
			return
		}
	}
	header.Add("Vary", "Accept-Encoding")
}

// matches tells whether If-None-Match names etag (RFC 9110, section 13.1.2).
func matches(header http.Header, etag string) bool {
	for _, line := range header["If-None-Match"] {
		for candidate := range strings.SplitSeq(line, ",") {
			candidate = strings.TrimSpace(candidate)
			if candidate == "*" || strings.TrimPrefix(candidate, "W/") == etag {
				return true
			}
		}
	}
	return false
}

// acceptsGzip tells whether a response may be compressed with gzip (RFC 9110, section 12.5.3).
func acceptsGzip(header http.Header) bool {
	accepted := false
	for _, line := range header["Accept-Encoding"] {
		for item := range strings.SplitSeq(line, ",") {
			coding, weight, _ := strings.Cut(item, ";")
			switch coding = strings.TrimSpace(coding); {
			case strings.EqualFold(coding, "gzip"):
				return weighsAnything(weight)
			case coding == "*":
				accepted = weighsAnything(weight)
			}
		}
	}
	return accepted
}

// weighsAnything tells whether a weight such as "q=0.5" is more than nothing; none at all is 1.
func weighsAnything(weight string) bool {
	value, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(weight)), "q=")
	if !ok {
		return true
	}
	q, err := strconv.ParseFloat(value, 64)
	return err == nil && q > 0
}
