package fsbroker

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
)

// write answers with the report that was found, and gives the status of the answer.
func (h *Handler) write(w http.ResponseWriter, r *http.Request, found finding) int {
	report := found.entry.report()
	f := fields{header: w.Header()}
	f.set("Cache-Status", found.cacheStatus(nil))
	f.addVary("Accept-Encoding")
	if found.hit {
		f.set("Age", strconv.Itoa(int(max(0, time.Since(report.at))/time.Second)))
	}
	if report.finished {
		f.set("Cache-Control", "private, no-cache")
	} else {
		f.set("Cache-Control", "no-store")
	}
	if report.isEmpty() {
		f.set("Retry-After", wholeSeconds(time.Duration(h.PollInterval)))
		w.WriteHeader(http.StatusNoContent)
		return http.StatusNoContent
	}

	chosen, err := h.choose(found, r.Header)
	if err != nil {
		h.logger.Error("a kept report is damaged", zap.Error(err))
		return damaged.write(w, r, found.cacheStatus(damaged))
	}
	f.set("Etag", chosen.etag)
	if matches(r.Header, chosen.etag) {
		w.WriteHeader(http.StatusNotModified)
		return http.StatusNotModified
	}
	f.set("Content-Type", "application/json")
	f.set("Content-Length", chosen.length)
	if chosen == report.gzipped.Load() {
		f.set("Content-Encoding", "gzip")
	}
	w.WriteHeader(http.StatusOK)
	writeBody(w, r, chosen.body)
	return http.StatusOK
}

// choose gives the form of the report that the caller takes.
func (h *Handler) choose(found finding, header http.Header) (*form, error) {
	if gzipped := found.entry.report().gzipped.Load(); gzipped != nil && acceptsGzip(header) {
		return gzipped, nil
	}
	return h.store.plain(found.entry)
}

// fields sets header fields with room for all their values in one piece, since most of what a hit would allocate is
// slices for one string each (BenchmarkHit). The names have to be in the canonical form that http.Header has.
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

// addVary adds to what other handlers may have put into Vary.
func (f *fields) addVary(name string) {
	for _, v := range f.header["Vary"] {
		if strings.EqualFold(v, name) {
			return
		}
	}
	if len(f.header["Vary"]) == 0 {
		f.set("Vary", name)
		return
	}
	f.header.Add("Vary", name)
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
	switch f.outcome(p) {
	case outcomeError:
		return forward + "; detail=" + p.code
	case outcomeNone:
		return "fsbroker; detail=" + p.code
	case outcomeStorage:
		return "fsbroker; hit; detail=storage"
	case outcomeHit:
		return "fsbroker; hit"
	case outcomeCollapsed:
		return forward + "; collapsed"
	}
	if f.entry.number == 0 {
		return forward
	}
	return forward + "; stored"
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
