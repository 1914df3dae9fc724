package fsbroker_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
)

// maxSoakUpload is the size of the largest uploads. It is more than the buffers of the connections hold.
const maxSoakUpload = 4 * mib

// accept responds to an upload like a broker: it reads it and says how much that was, refuses it early, or dies.
func (s *soak) accept(w http.ResponseWriter, r *http.Request) {
	s.arrived.Store(r.Header.Get("X-Upload"), true)
	choice := rand.IntN(6)
	switch choice {
	case 0, 1:
		n, err := io.Copy(io.Discard, r.Body)
		if err == nil {
			_, _ = fmt.Fprintf(w, `{"acceptedFiles":[],"rejectedFiles":[],"read":%d}`, n)
		}
		return
	case 2: // net/http takes care of the connection
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		_, _ = io.WriteString(w, "too large")
		return
	case 3:
		_, _ = io.CopyN(io.Discard, r.Body, rand.Int64N(mib))
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.t.Error(err)
		return
	}
	defer conn.Close()
	s.refusedUploads.Add(1)
	switch choice {
	case 3:
		_ = conn.(*net.TCPConn).SetLinger(0)
	case 4:
		refusals["closes"](conn.(*net.TCPConn), conn)
	case 5:
		refusals["lingers"](conn.(*net.TCPConn), conn)
	}
}

// upload uploads zeros. The response is the broker's, whole, or a problem. During a reload, and while the old configuration
// ends after it, Caddy may close a connection that it has only just accepted, before it reads a request.
func (s *soak) upload(ctx context.Context, ns *soakNamespace) {
	s.running.RLock()
	defer s.running.RUnlock()
	size := rand.Int64N(maxSoakUpload)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+"/upload/"+ns.name+"/submit", zeros(size))
	if err != nil {
		s.t.Error(err)
		return
	}
	if rand.IntN(2) == 0 {
		req.ContentLength = size
	}
	req.Header.Set("Authorization", "Bearer "+callerSecret)
	id := fmt.Sprint(rand.Int64())
	req.Header.Set("X-Upload", id)
	status, text, err := s.sendUpload(req)
	switch {
	case err != nil:
		switch _, arrived := s.arrived.Load(id); {
		case ctx.Err() != nil:
		case arrived || s.reloads.Load() == 0:
			s.t.Errorf("%s: an upload gets no response: %v", ns.name, err)
		default:
			s.excused.Add(1)
		}
	case status == http.StatusOK && strings.HasSuffix(text, fmt.Sprintf(`"read":%d}`, size)),
		status == http.StatusRequestEntityTooLarge && text == "too large",
		strings.Contains(text, `"code":"broker_`):
		s.uploads.Add(1)
	default:
		s.t.Errorf("%s: an upload of %d bytes gets %d %s", ns.name, size, status, text)
	}
}

// sendUpload sends an upload over a new connection, and returns the response.
func (s *soak) sendUpload(req *http.Request) (status int, text string, err error) {
	transport := s.client.Transport.(*http.Transport).Clone()
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	s.wantNoSecret(body)
	return resp.StatusCode, string(body), err
}
