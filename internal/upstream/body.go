package upstream

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// answerBody reads the body of an answer, within the upstream's limit, which counts inflated bytes. Memory is reserved for what
// is held of it, and not for the size that the upstream states.
type answerBody struct {
	upstream    *Upstream
	reservation *budget.Reservation
	body        io.Reader
	size        int64
	err         error // the first error of reading the body
}

// read reads the body of resp. An error of reading the body takes precedence over an error of read.
func (b *answerBody) read(resp *http.Response, read bodyReader) error {
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return b.upstream.problem(problem.BadAnswer, "sent a content encoding that it was not asked for: its operator must correct that")
	}
	if err := b.checkSize(resp.ContentLength); err != nil {
		return err
	}
	b.body = resp.Body
	if err := read(b, b.reservation.Grow); b.err == nil {
		return err
	}
	return b.err
}

// Read implements io.Reader.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	b.size += int64(n)
	if tooLarge := b.checkSize(b.size); tooLarge != nil {
		err = tooLarge
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// marker is a reader that remembers the first byte that is not white space.
type marker struct {
	io.Reader
	first byte
}

// Read implements io.Reader.
func (m *marker) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	if m.first == 0 {
		if text := bytes.TrimLeft(p[:n], " \t\r\n"); len(text) > 0 {
			m.first = text[0]
		}
	}
	return n, err
}

// isHTML reports whether what was read looks like HTML, or another kind of XML.
func (m *marker) isHTML() bool { return m.first == '<' }

// checkSize checks the size of the body so far, or the size that the upstream states.
func (b *answerBody) checkSize(size int64) error {
	if size > b.upstream.MaxAnswer {
		return b.upstream.problem(problem.AnswerTooLarge,
			fmt.Sprintf("sent more than %d bytes: its operator may raise max_report", b.upstream.MaxAnswer))
	}
	return nil
}

// drain reads a small unwanted body, so that the connection can be reused. It does not wait for a body that is late.
func drain(resp *http.Response) {
	const small, late = 4 << 10, 100 * time.Millisecond
	if resp.ContentLength == 0 || resp.ContentLength > small {
		return
	}
	timer := time.AfterFunc(late, func() { _ = resp.Body.Close() })
	defer timer.Stop()
	_, _ = io.CopyN(io.Discard, resp.Body, small)
}
