package fsbroker_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

// uploadSize is the size of the uploads that are refused early. It is more than the buffers of the connections hold.
const uploadSize = 5 << 20

// zeros is a reader of n zeros, whose length a client does not know.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// earlyBroker starts a broker that handles the connection of a request when its header has arrived.
func earlyBroker(t *testing.T, then func(conn *net.TCPConn, body io.Reader)) (url string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				if first, err := r.Peek(1); err != nil || first[0] == 0x16 { // a TLS handshake
					return
				}
				for line := ""; line != "\r\n"; {
					if line, err = r.ReadString('\n'); err != nil {
						return
					}
				}
				then(conn.(*net.TCPConn), r)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		conns.Wait()
	})
	return "http://" + listener.Addr().String()
}

// refuse answers with 413.
func refuse(conn net.Conn) {
	_, _ = io.WriteString(conn, "HTTP/1.1 413 Content Too Large\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\ntoo large")
}

// refusals are the ways in which a broker refuses an upload before it has arrived.
var refusals = map[string]func(conn *net.TCPConn, body io.Reader){
	"lingers": func(conn *net.TCPConn, body io.Reader) {
		refuse(conn)
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, body)
	},
	"closes": func(conn *net.TCPConn, _ io.Reader) { // with unread data, so the system resets the connection
		refuse(conn)
		time.Sleep(20 * time.Millisecond)
	},
}

// Each caller whose upload is refused early sees that, whatever client it uses.
func TestUploadRefusedEarly(t *testing.T) {
	fsbroker.SkipIfShort(t)
	uploads := 2
	if fsbroker.Slow() {
		uploads = 15
	}
	for name, refuse := range refusals {
		s := startPlainSite(t, proxied(earlyBroker(t, refuse), "", "fail_duration 1ms"))
		for _, framing := range []string{"length", "chunked"} {
			t.Run(name+", "+framing+", Go", func(t *testing.T) {
				for range uploads {
					body := zeros(uploadSize)
					req := s.in(t).request("POST", "/submit", body, bearer)
					if framing == "length" {
						req.ContentLength = uploadSize
					}
					resp, err := s.client.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					text, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					if resp.StatusCode != http.StatusRequestEntityTooLarge || string(text) != "too large" || err != nil {
						t.Fatalf("got %d %s: %v", resp.StatusCode, text, err)
					}
				}
			})
			t.Run(name+", "+framing+", a client that sends everything first", func(t *testing.T) {
				for range uploads {
					status, text := s.in(t).exchange(uploadHeader(framing, uploadSize), framing, uploadSize)
					if status != http.StatusRequestEntityTooLarge || text != "too large" {
						t.Fatalf("got %d %s", status, text)
					}
				}
			})
			t.Run(name+", "+framing+", Python", func(t *testing.T) {
				python, err := exec.LookPath("python3")
				if err != nil {
					t.Skip("there is no python3")
				}
				host, port, _ := net.SplitHostPort(strings.TrimPrefix(s.base, "http://"))
				out, err := exec.CommandContext(t.Context(), python, "testdata/upload.py", host, port, callerSecret, framing,
					fmt.Sprint(uploadSize), fmt.Sprint(uploads)).CombinedOutput()
				if got, want := strings.TrimSpace(string(out)), fmt.Sprintf("413:%d", uploads); got != want || err != nil {
					t.Errorf("got %s, want %s: %v", got, want, err)
				}
			})
			t.Run(name+", "+framing+", curl", func(t *testing.T) {
				curl, err := exec.LookPath("curl")
				if err != nil {
					t.Skip("there is no curl")
				}
				file := s.write("zeros", make([]byte, uploadSize))
				args := []string{"-sS", "-o", os.DevNull, "-w", "%{http_code}", "-H", bearer, "-H", "Expect:", "--data-binary", "@" + file}
				if framing == "chunked" {
					args = append(args, "-H", "Transfer-Encoding: chunked")
				}
				for range uploads {
					out, err := exec.CommandContext(t.Context(), curl, append(args, s.base+"/submit")...).CombinedOutput()
					if string(out) != "413" || err != nil {
						t.Fatalf("got %s: %v", out, err)
					}
				}
			})
		}
	}
}

// uploadHeader returns the header of an upload.
func uploadHeader(framing string, size int, more ...string) string {
	length := "Transfer-Encoding: chunked"
	if framing == "length" {
		length = fmt.Sprintf("Content-Length: %d", size)
	}
	return "POST /submit HTTP/1.1\r\nHost: localhost\r\n" + strings.Join(append(more, bearer, length), "\r\n") + "\r\n\r\n"
}

// dial opens a connection to the site.
func (s *site) dial() net.Conn {
	s.t.Helper()
	conn, err := s.dialContext(s.t.Context(), "", "")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// exchange sends a request with a body of zeros, reads its response, and checks the end of the connection: either it ends,
// or the body was read to its end, so that another request gets its own response.
func (s *site) exchange(header, framing string, size int) (status int, body string) {
	s.t.Helper()
	conn := s.dial()
	defer conn.Close()
	chunk := make([]byte, 64<<10)
	before, after, end := "", "", ""
	if framing == "chunked" {
		before, after, end = fmt.Sprintf("%x\r\n", len(chunk)), "\r\n", "0\r\n\r\n"
	}
	if _, err := io.WriteString(conn, header); err != nil {
		s.t.Fatal(err)
	}
	for sent := 0; sent < size; sent += len(chunk) {
		if _, err := fmt.Fprintf(conn, "%s%s%s", before, chunk, after); err != nil {
			s.t.Fatalf("after %d bytes: %v", sent, err)
		}
	}
	if _, err := io.WriteString(conn, end); err != nil {
		s.t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	resp, text := s.response(r)
	if resp.Close {
		if rest, err := io.ReadAll(r); len(rest) > 0 || err != nil {
			s.t.Fatalf("the connection ends with %q, %v", rest, err)
		}
		return resp.StatusCode, text
	}
	if _, err := io.WriteString(conn, "OPTIONS /task HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		s.t.Fatal(err)
	}
	if next, text := s.response(r); next.StatusCode != http.StatusNoContent {
		s.t.Fatalf("the next response is %s %s", next.Status, text)
	}
	return resp.StatusCode, text
}

// response reads a response and its body.
func (s *site) response(r *bufio.Reader) (resp *http.Response, body string) {
	s.t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(text)
}

// What is refused before its body was read is refused in the same way: the caller sees why, and the connection ends.
func TestUnreadBody(t *testing.T) {
	broker := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	s := startPlainSite(t, "request_body {\n max_size 1MB\n }\n"+proxied(broker.URL, "", ""))
	for name, test := range map[string]struct {
		header, framing string
		size, status    int
	}{
		"no secret":           {strings.Replace(uploadHeader("length", 1<<19), bearer, "X-Other: 1", 1), "length", 1 << 19, 401},
		"no secret, chunked":  {strings.Replace(uploadHeader("chunked", 0), bearer, "X-Other: 1", 1), "chunked", 1 << 19, 401},
		"another method":      {strings.Replace(uploadHeader("length", 1<<19), "POST", "TRACK", 1), "length", 1 << 19, 405},
		"a report":            {strings.Replace(uploadHeader("length", 1<<19), "/submit", "/task?submitID=1", 1), "length", 1 << 19, 405},
		"more than the limit": {uploadHeader("chunked", 0), "chunked", 8 << 20, 413},
	} {
		t.Run(name, func(t *testing.T) {
			if status, text := s.in(t).exchange(test.header, test.framing, test.size); status != test.status {
				t.Errorf("got %d %s", status, text)
			}
		})
	}
	// A body that is read to its end leaves the connection as it is.
	conn := s.dial()
	r := bufio.NewReader(conn)
	for range 2 {
		if _, err := io.WriteString(conn, uploadHeader("length", 5)+"zeros"); err != nil {
			t.Fatal(err)
		}
		if resp, _ := s.response(r); resp.StatusCode != http.StatusOK || resp.Close {
			t.Errorf("got %s, the connection ends: %v", resp.Status, resp.Close)
		}
	}
}

// A caller that asks whether it may send its body is answered at once, and is not told to go on.
func TestExpectContinue(t *testing.T) {
	s := startPlainSite(t, fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		secret reader {env.NODE_SECRET} {
			allow /task
		}
		broker http://%s {env.BROKER_SECRET} {
			proxy
		}
		fail_duration 1h
	}`, refused(t)))
	s.send("POST", "/submit", strings.NewReader("zeros"), bearer).wantProblem(t, http.StatusBadGateway, "broker_unreachable")
	expect := uploadHeader("length", uploadSize, "Expect: 100-continue")
	for header, status := range map[string]string{
		strings.Replace(expect, bearer, "X-Other: 1", 1):                    "401 Unauthorized",
		strings.Replace(expect, callerSecret, nodeSecret, 1):                "403 Forbidden",
		strings.Replace(expect, "POST", "TRACK", 1):                         "405 Method Not Allowed",
		strings.Replace(expect, "POST /submit", "POST /task?submitID=1", 1): "405 Method Not Allowed",
		expect: "503 Service Unavailable",
	} {
		t.Run(status, func(t *testing.T) {
			conn := s.in(t).dial()
			if _, err := io.WriteString(conn, header); err != nil {
				t.Fatal(err)
			}
			resp, _ := s.in(t).response(bufio.NewReader(conn)) // an interim response would be the first
			if resp.Status != status || !resp.Close {
				t.Errorf("got %s, the connection ends: %v", resp.Status, resp.Close)
			}
		})
	}
}

// A caller that has stopped sending is answered when the broker's connection ends, and is told why.
func TestUploadWithoutAnswer(t *testing.T) {
	for name, end := range map[string]func(conn *net.TCPConn, body io.Reader){
		"resets": func(conn *net.TCPConn, body io.Reader) {
			_, _ = io.ReadFull(body, make([]byte, 1<<16))
			_ = conn.SetLinger(0)
		},
		"closes": func(_ *net.TCPConn, body io.Reader) { _, _ = io.ReadFull(body, make([]byte, 1<<16)) },
	} {
		s := startPlainSite(t, proxied(earlyBroker(t, end), "", ""))
		for _, framing := range []string{"length", "chunked"} {
			t.Run(name+", "+framing, func(t *testing.T) {
				conn := s.in(t).dial()
				begun := strings.Repeat("\x00", 1<<16)
				if framing == "chunked" {
					begun = fmt.Sprintf("%x\r\n%s\r\n", len(begun), begun)
				}
				if _, err := io.WriteString(conn, uploadHeader(framing, uploadSize)+begun); err != nil {
					t.Fatal(err)
				}
				resp, text := s.in(t).response(bufio.NewReader(conn))
				if resp.StatusCode != http.StatusBadGateway || !strings.Contains(text, "the broker closed the connection without an answer") || !resp.Close {
					t.Errorf("got %s %s, the connection ends: %v", resp.Status, text, resp.Close)
				}
			})
		}
	}
}

// Over HTTP/2, an upload that is refused early ends its stream alone, on the way to the broker as well.
func TestUploadRefusedEarlyOverHTTP2(t *testing.T) {
	broker := httptest.NewUnstartedServer(responds(http.StatusRequestEntityTooLarge, "too large"))
	broker.EnableHTTP2 = true
	broker.StartTLS()
	t.Cleanup(broker.Close)
	for name, address := range map[string]string{"HTTP/1.1": earlyBroker(t, refusals["lingers"]), "HTTP/2": broker.URL} {
		t.Run("to the broker over "+name, func(t *testing.T) { testUploadRefusedEarlyOverHTTP2(t, address) })
	}
}

func testUploadRefusedEarlyOverHTTP2(t *testing.T, broker string) {
	reports := httptest.NewTLSServer(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	t.Cleanup(reports.Close)
	transport := "transport http {\n tls_insecure_skip_verify\n"
	if strings.HasPrefix(broker, "http:") {
		transport += "tls_except_ports " + broker[strings.LastIndexByte(broker, ':')+1:] + "\n"
	}
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret tester {env.CALLER_SECRET}
		node node-1 %s {env.NODE_SECRET}
		broker %s {env.BROKER_SECRET} {
			proxy
		}
		%s }
	}`, reports.URL, broker, transport))
	client := s.client.Transport.(*http.Transport).Clone()
	client.ForceAttemptHTTP2 = true
	conns := 0
	client.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conns++
		return s.dialContext(ctx, network, address)
	}
	defer client.CloseIdleConnections()
	s.client = &http.Client{Transport: client}
	for range 5 {
		resp, err := s.client.Do(s.request("POST", "/submit", zeros(uploadSize), bearer))
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusRequestEntityTooLarge || resp.ProtoMajor != 2 || resp.Header.Get("Connection") != "" {
			t.Errorf("got %s %d %v", resp.Proto, resp.StatusCode, resp.Header)
		}
		s.get(pair).wantStatus(t, http.StatusOK)
	}
	if conns != 1 {
		t.Errorf("there were %d connections, want 1", conns)
	}
}
