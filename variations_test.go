package fsbroker_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
	productbackend "github.com/caddy-fsbroker/caddy-fsbroker/examples/quickstart/backend"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testsite"
)

// product is a broker with one node, as the documentation describes them, in one of its variations.
type product struct {
	node, broker *httptest.Server
	nodeForgets  time.Duration
	certificate  string // a file to pin; empty for plain HTTP
}

// variation is what the documentation leaves open, or has differently in different versions.
type variation struct {
	secretIn     productbackend.SecretPlace
	https        bool
	submitResult productbackend.SubmitResultMode
	refuse       int           // the status of an answer to a wrong secret
	nodeForget   time.Duration // how long the node keeps a finished task; 0 for long
}

// appServerID is a number, as the node's task IDs are: both are IDs all the same.
const appServerID = "7"

func startProduct(t *testing.T, v variation) *product {
	t.Helper()
	if v.nodeForget == 0 {
		v.nodeForget = time.Hour
	}
	p := &product{nodeForgets: v.nodeForget}
	var config *tls.Config
	client := &http.Client{Transport: &http.Transport{DialContext: dial}}
	if v.https {
		cert, err := productbackend.NewCertificate()
		if err != nil {
			t.Fatal(err)
		}
		config, client, p.certificate = cert.ServerConfig(), cert.Client(), writeFile(t, string(cert.PEM))
	}
	serve := func(handler http.Handler) *httptest.Server {
		s := newServer(t, handler)
		if s.TLS = config; config != nil {
			s.Listener = tls.NewListener(s.Listener, config)
			s.Start()
			s.URL = "https://" + s.Listener.Addr().String()
		} else {
			s.Start()
		}
		return s
	}
	node := productbackend.NewNode(nodeSecret, 50*time.Millisecond, v.nodeForget)
	node.SecretIn, node.Refuse, node.NumericIDs = []productbackend.SecretPlace{v.secretIn}, v.refuse, true
	p.node = serve(node)
	broker := productbackend.NewBroker(brokerSecret, productbackend.NodeRef{AppServerID: appServerID, Address: p.node.URL, Secret: nodeSecret})
	broker.SecretIn, broker.Refuse, broker.SubmitResult, broker.NodeClient = node.SecretIn, v.refuse, v.submitResult, client
	p.broker = serve(broker)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		broker.Run(ctx)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		client.CloseIdleConnections()
	})
	return p
}

// directives configures the module for the product.
func (p *product) directives(withNode, withBroker bool, more string) string {
	var text strings.Builder
	text.WriteString("fsbroker_task {\nsecret {env.CALLER_SECRET}\npoll_interval 100ms\n")
	if withNode {
		fmt.Fprintf(&text, "node %s %s {env.NODE_SECRET}\n", appServerID, p.node.URL)
	}
	if withBroker {
		fmt.Fprintf(&text, "broker %s {env.BROKER_SECRET}\n", p.broker.URL)
	}
	if p.certificate != "" {
		fmt.Fprintf(&text, "transport http {\ntls_trust_pool file %s\n}\n", p.certificate)
	}
	text.WriteString(more + "\n}")
	return text.String()
}

// upload posts a file to the product, past the module, and returns the response.
func (p *product) upload(t *testing.T, server *httptest.Server, path, secret string) []byte {
	t.Helper()
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	part, err := w.CreateFormFile("file", "sample.txt")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(part, "a sample with the address 192.0.2.1")
	_ = w.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+path+"?secret="+secret+"&serect="+secret, &form)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", w.FormDataContentType())
	req.Header.Set("secret", secret)
	client := &http.Client{Transport: &http.Transport{DialContext: dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: status %d: %s, error %v", path, resp.StatusCode, body, err)
	}
	return body
}

// submit submits a file to the broker and returns the submission.
func (p *product) submit(t *testing.T) string {
	t.Helper()
	var doc struct{ AcceptedFiles []struct{ ID string } }
	if err := json.Unmarshal(p.upload(t, p.broker, "/submit", brokerSecret), &doc); err != nil || len(doc.AcceptedFiles) != 1 {
		t.Fatalf("%+v, error %v", doc, err)
	}
	return doc.AcceptedFiles[0].ID
}

// taskOf returns the task of a report.
func taskOf(t *testing.T, r reply) string {
	t.Helper()
	var doc struct {
		Result struct{ TaskReference struct{ ID, State string } }
	}
	if err := json.Unmarshal(r.body, &doc); err != nil || doc.Result.TaskReference.ID == "" {
		t.Fatalf("status %d: %s, error %v", r.status, r.body, err)
	}
	return doc.Result.TaskReference.ID
}

// Each documented variation of the product is served.
func TestDocumentedVariations(t *testing.T) {
	fsbroker.SkipIfShort(t)
	for _, secretIn := range []productbackend.SecretPlace{productbackend.SecretInHeader, productbackend.SecretInQuery, productbackend.SecretInSerect} {
		for _, https := range []bool{true, false} {
			for _, submitResult := range []productbackend.SubmitResultMode{
				productbackend.SubmitResultManual, productbackend.SubmitResultIDs, productbackend.SubmitResultNumbers, productbackend.SubmitResultAbsent,
			} {
				t.Run(fmt.Sprintf("secret in %s, https %v, submit-result %s", secretIn, https, submitResult), func(t *testing.T) {
					p := startProduct(t, variation{secretIn: secretIn, https: https, submitResult: submitResult})
					p.testServed(t)
				})
			}
		}
	}
}

// testServed checks a submission and its task, with a broker, a node, and both.
func (p *product) testServed(t *testing.T) {
	submitID := p.submit(t)
	s := startSite(t, p.directives(true, true, ""))
	report := s.get("/task?wait=60&submitID=" + submitID)
	report.wantStatus(t, http.StatusOK)
	report.wantHeader(t, "Cache-Control", "private, no-cache")
	taskID := taskOf(t, report)
	pair := "/task?appServerID=" + appServerID + "&taskID=" + taskID
	s.get(pair).wantStatus(t, http.StatusOK)
	s.get("/task?wait=60&all=true&submitID="+submitID).wantStatus(t, http.StatusOK)
	s.get("/task?submitID=unknown").wantProblem(t, http.StatusNotFound, "unknown_submission")
	s.get("/task?appServerID="+appServerID+"&taskID=1").wantProblem(t, http.StatusNotFound, "unknown_task")
	s.get("/task?appServerID=other&taskID=1").wantProblem(t, http.StatusNotFound, "unknown_task")
	s.wantNoSecretInLog()

	s = startSite(t, p.directives(false, true, "")) // a broker alone
	if r := s.get("/task?wait=60&submitID=" + submitID); taskOf(t, r) != taskID {
		t.Errorf("a broker alone: status %d: %s", r.status, r.body)
	}
	s.get(pair).wantStatus(t, http.StatusOK)
	s.get("/task?submitID=unknown").wantProblem(t, http.StatusNotFound, "unknown_submission")
	s.wantNoSecretInLog()

	s = startSite(t, p.directives(true, false, "")) // nodes alone
	s.get(pair).wantStatus(t, http.StatusOK)
	s.get("/task?submitID="+submitID).wantProblem(t, http.StatusBadRequest, "no_broker")
	s.get("/task?appServerID=other&taskID=1").wantProblem(t, http.StatusNotFound, "unknown_node")
	s.wantNoSecretInLog()
}

// A node that has deleted its task costs nothing that the broker, or the module, still has.
func TestForgetfulNode(t *testing.T) {
	for _, submitResult := range []productbackend.SubmitResultMode{productbackend.SubmitResultManual, productbackend.SubmitResultIDs} {
		t.Run(string(submitResult), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				p := startProduct(t, variation{secretIn: productbackend.SecretInHeader, submitResult: submitResult, nodeForget: 500 * time.Millisecond})
				submitID := p.submit(t)
				s := startSite(t, p.directives(true, true, ""))
				report := s.get("/task?wait=60&submitID=" + submitID)
				report.wantStatus(t, http.StatusOK) // by way of the broker, which keeps it
				pair := "/task?appServerID=" + appServerID + "&taskID=" + taskOf(t, report)

				alone := startSite(t, p.directives(true, false, ""))
				alone.getUntil(pair+"&nocache", "the node to forget", func(r reply) bool { return r.status == http.StatusNotFound }).
					wantProblem(t, http.StatusNotFound, "unknown_task")

				s = startSite(t, p.directives(true, true, ""))
				s.get(pair).wantStatus(t, http.StatusOK)
				s.get("/task?submitID="+submitID).wantStatus(t, http.StatusOK)
				s.get("/task?submitID="+submitID).wantHeader(t, "Cache-Status", "fsbroker; hit")
				s.wantNoSecretInLog()
			})
		})
	}
}

// A wrong secret is told apart, whichever status the product answers with.
func TestWrongSecret(t *testing.T) {
	for _, secretIn := range []productbackend.SecretPlace{productbackend.SecretInHeader, productbackend.SecretInQuery, productbackend.SecretInSerect} {
		for refuse, code := range map[int]string{400: "rejected_request", 401: "refused_secret", 403: "refused_secret"} {
			t.Run(fmt.Sprintf("%s, %d", secretIn, refuse), func(t *testing.T) {
				p := startProduct(t, variation{secretIn: secretIn, refuse: refuse})
				right := p.directives(true, true, "")
				wrong := strings.NewReplacer("{env.NODE_SECRET}", "{env.CALLER_SECRET}", "{env.BROKER_SECRET}", "{env.CALLER_SECRET}").Replace(right)
				s := startSite(t, wrong)
				for path, role := range map[string]string{"/task?submitID=s1": "broker", "/task?taskID=1&appServerID=" + appServerID: "node"} {
					r := s.get(path)
					r.wantProblem(t, http.StatusBadGateway, role+"_"+code)
					if !strings.Contains(string(r.body), "secret_in") {
						t.Errorf("the problem does not say what to change: %s", r.body)
					}
				}
				s.wantNoSecretInLog()

				// A secret in a place where the product does not look is refused as well.
				place := "header"
				if secretIn == productbackend.SecretInHeader {
					place = "secret"
				}
				misplaced := strings.Replace(right, "{env.BROKER_SECRET}", "{env.BROKER_SECRET} {\nsecret_in "+place+"\n}", 1)
				s = startSite(t, misplaced)
				s.get("/task?submitID=s1").wantProblem(t, http.StatusBadGateway, "broker_"+code)
			})
		}
	}
}

// What keeps an upstream from being connected to is told apart, in the problem and in the log.
func TestConnectionProblems(t *testing.T) {
	document := reportOf("t1", "SUCCESS")
	secure := newServer(t, responds(http.StatusOK, document))
	secure.StartTLS()
	plain := newBackend(t, responds(http.StatusOK, document))
	tomorrow := time.Now().Add(24 * time.Hour)
	expired := startWithCertificate(t, x509.Certificate{NotAfter: time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC), IPAddresses: []net.IP{{127, 0, 0, 1}}})
	early := startWithCertificate(t, x509.Certificate{NotBefore: tomorrow, NotAfter: tomorrow.Add(time.Hour)})
	resets := startTLSListener(t, true) // as some TLS servers do with a plain request
	breaksOff := startTLSListener(t, false)
	for name, test := range map[string]struct {
		address, more string
		code          string
		detail        string // of the problem
		logged        map[string]string
	}{
		"closed":                    {"https://" + testsite.Refused(t), "", "node_unreachable", "could not be connected to", map[string]string{"cause": "connection refused"}},
		"no such host":              {"https://no-such-host.invalid:22001", "", "node_unreachable", "could not be connected to", map[string]string{"cause": "no-such-host.invalid"}},
		"speaks TLS, answers 400":   {strings.Replace(secure.URL, "https", "http", 1), "", "node_wrong_scheme", "must write https://", nil},
		"speaks TLS, resets":        {"http://" + resets, "", "node_wrong_scheme", "must write https://", nil},
		"breaks off, without TLS":   {"http://" + breaksOff, "", "node_bad_answer", "closed the connection without an answer", nil},
		"does not speak TLS":        {strings.Replace(plain.URL, "http", "https", 1), "", "node_wrong_scheme", "must write http://", nil},
		"certificate not trusted":   {secure.URL, "", "node_untrusted_certificate", "not trusted", map[string]string{"issuer": "O=Acme Co", "hint": "tls_trust_pool", "names": "example.com", "cause": "unknown authority", "not_after": "2084-01-29T16:00:00Z"}},
		"expired certificate":       {expired.URL, "", "node_untrusted_certificate", "not trusted", map[string]string{"cause": "has expired", "hint": "renewed, and do not trust", "not_after": "2001-02-03T04:05:06Z"}},
		"expired, but trusted":      {expired.URL, "transport http {\ntls_trust_pool file " + pinned(t, expired) + "\n}", "node_untrusted_certificate", "not trusted", map[string]string{"hint": "has expired"}},
		"certificate of tomorrow":   {early.URL, "", "node_untrusted_certificate", "not trusted", map[string]string{"hint": "not valid yet"}},
		"certificate of other name": {"https://localhost:" + portOf(secure.URL), "transport http {\ntls_trust_pool file " + pinned(t, secure) + "\n}", "node_untrusted_certificate", "not trusted", map[string]string{"cause": "localhost", "names": "example.com", "hint": "tls_server_name"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSite(t, fmt.Sprintf("fsbroker_task {\nsecret {env.CALLER_SECRET}\nnode node-1 %s {env.NODE_SECRET}\nfail_duration 1h\n%s\n}", test.address, test.more))
			r := s.get(pair)
			r.wantProblem(t, http.StatusBadGateway, test.code)
			if !strings.Contains(string(r.body), test.detail) || strings.Contains(string(r.body), "127.0.0.1") {
				t.Errorf("the problem is %s", r.body)
			}
			if test.code != "node_bad_answer" {
				again, status, code := s.get(pair), http.StatusServiceUnavailable, "node_down"
				if test.code != "node_unreachable" { // which nothing but a change ends
					status, code = http.StatusBadGateway, test.code
				}
				again.wantProblem(t, status, code)
				if again.header.Get("Retry-After") == "" {
					t.Error("there is no Retry-After")
				}
				again.wantHeader(t, "Cache-Status", "fsbroker; detail="+code) // no upstream was asked
				lines := s.logged("fails")
				if len(lines) != 1 || lines[0]["code"] != test.code {
					t.Fatalf("the log has %v", lines)
				}
				for field, want := range test.logged {
					if got := fmt.Sprint(lines[0][field]); !strings.Contains(got, want) {
						t.Errorf("the log has %q in %s, want %q", got, field, want)
					}
				}
			}
			s.wantNoSecretInLog()
		})
	}
}

func portOf(url string) string { return url[strings.LastIndexByte(url, ':')+1:] }

// pinned writes the certificate of a server to a file.
func pinned(t *testing.T, s *httptest.Server) string {
	t.Helper()
	return writeFile(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
}

// startWithCertificate starts a server with a certificate that it has signed itself, until the test ends.
func startWithCertificate(t *testing.T, template x509.Certificate) *httptest.Server {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(1)
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(responds(http.StatusOK, ""))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: private}}}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server
}

// startTLSListener starts a server that resets every connection that does not begin with a TLS handshake, which it answers
// if it speaks TLS.
func startTLSListener(t *testing.T, speaksTLS bool) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := productbackend.NewCertificate()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			first := make([]byte, 1)
			_, err = io.ReadFull(conn, first)
			if handshake := first[0] == 0x16; err == nil && handshake && speaksTLS {
				_ = tls.Server(&rereadConn{Conn: conn, first: first}, cert.ServerConfig()).HandshakeContext(t.Context())
			}
			_ = conn.(*net.TCPConn).SetLinger(0)
			_ = conn.Close()
		}
	}()
	return l.Addr().String()
}

// rereadConn is a connection whose first bytes have been read.
type rereadConn struct {
	net.Conn
	first []byte
}

func (c *rereadConn) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// An upstream is probed for TLS once in fail_duration, and nothing is sent to it meanwhile.
func TestTLSProbeIsBounded(t *testing.T) {
	var conns atomic.Int64
	node := newServer(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) }))
	node.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	node.Start()
	s := startSite(t, fmt.Sprintf("fsbroker_task {\nsecret {env.CALLER_SECRET}\nnode node-1 %s {env.NODE_SECRET}\n}", node.URL))
	for range 20 {
		s.get(pair).wantProblem(t, http.StatusBadGateway, "node_rejected_request")
	}
	if n := conns.Load(); n > 2 { // one for the requests, and one for the probe
		t.Errorf("the node got %d connections", n)
	}
}

func TestSchemes(t *testing.T) {
	plain := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	host := strings.TrimPrefix(plain.URL, "http://")
	site := func(address, transport string) string {
		return fmt.Sprintf("fsbroker_task {\nsecret {env.CALLER_SECRET}\nnode node-1 %s {env.NODE_SECRET}\ntransport http {\n%s\n}\n}", address, transport)
	}
	s := newSite(t)
	if err := s.tryLoad(site(plain.URL, "tls")); err == nil || !strings.Contains(err.Error(), "tls_except_ports") {
		t.Errorf("an http address beside TLS: %v", err)
	}
	for _, address := range []string{host, plain.URL} {
		s := startSite(t, site(address, "tls\ntls_except_ports "+portOf(plain.URL)))
		s.get(pair).wantStatus(t, http.StatusOK)
	}
}
