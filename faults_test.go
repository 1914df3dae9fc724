package fsbroker_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// A secret in the names of a node's certificate does not reach the log.
func TestSecretInACertificate(t *testing.T) {
	node := startWithCertificate(t, x509.Certificate{DNSNames: []string{nodeSecret + ".example"}, NotAfter: time.Now().Add(time.Hour)})
	s := startSite(t, options(&backend{Server: node}, ""))
	s.get(pair).wantProblem(t, 502, "node_untrusted_certificate")
	s.wantNoSecretInLog()
}

// A broker that refuses to explain why it has no report is not unhealthy: callers could make it so.
func TestExplanationsDoNotChangeHealth(t *testing.T) {
	broker := newBackend(t, brokerResponds(responds(404, ""), responds(403, "")))
	s := startWithAdmin(t, fmt.Sprintf("fsbroker_task {\n secret {env.CALLER_SECRET}\n %s\n}", brokerOption(broker)), recordEvents)
	for i := range 4 {
		s.get(fmt.Sprintf("/task?submitID=x%d", i)).wantProblem(t, 404, "unknown_submission")
	}
	wantEvents(t)
}

// A health check does not undo the diagnosis of a wrong scheme.
func TestWrongSchemeStays(t *testing.T) {
	var conns atomic.Int64
	tlsNode := newServer(t, responds(200, reportOf("t1", "SUCCESS")))
	tlsNode.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	tlsNode.StartTLS()
	s := startWithAdmin(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		node node-1 http://%s {env.NODE_SECRET}
		fail_duration 1h
		health_interval 10ms
	}`, tlsNode.Listener.Addr()), "")
	eventually(t, "checks", func() bool { return conns.Load() > 5 })
	s.get(pair).wantProblem(t, 502, "node_wrong_scheme")
	s.requestAdmin("GET", "/fsbroker/nodes")
	for _, line := range s.logged("fails") {
		if line["code"] != "node_wrong_scheme" {
			t.Errorf("the log has %v", line["code"])
		}
	}
}

// Neither does the admin API.
func TestWrongSchemeStaysWithoutChecks(t *testing.T) {
	tlsNode := startTLSServer(t, responds(200, reportOf("t1", "SUCCESS")))
	s := startWithAdmin(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		node node-1 http://%s {env.NODE_SECRET}
		fail_duration 1h
	}`, tlsNode.Listener.Addr()), "")
	s.get(pair).wantProblem(t, 502, "node_wrong_scheme")
	s.requestAdmin("GET", "/fsbroker/nodes")
	s.get(pair).wantProblem(t, 502, "node_wrong_scheme")
}

// A server that answers the handshake with an alert speaks TLS, although an address says http.
func TestTLSAlert(t *testing.T) {
	for name, config := range map[string]*tls.Config{
		"old versions only":              {MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11},
		"a client certificate is wanted": {MaxVersion: tls.VersionTLS12, ClientAuth: tls.RequireAnyClientCert},
	} {
		t.Run(name, func(t *testing.T) {
			node := newServer(t, responds(200, ""))
			node.TLS = config
			node.StartTLS()
			s := startSite(t, fmt.Sprintf("fsbroker_task {\nsecret {env.CALLER_SECRET}\nnode node-1 http://%s {env.NODE_SECRET}\n}", node.Listener.Addr()))
			s.get(pair).wantProblem(t, 502, "node_wrong_scheme")
		})
	}
}

// A node that has answered plain HTTP is not probed, although it also speaks TLS on that port.
func TestNoProbeAfterPlainHTTP(t *testing.T) {
	plain := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("taskID") == "odd" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		responds(200, reportOf("t1", "SUCCESS"))(w, r)
	})
	secure := startTLSServer(t, plain.Config.Handler)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				first, err := br.Peek(1)
				if err != nil {
					return
				}
				to := plain.Listener.Addr().String()
				if first[0] == 0x16 {
					to = secure.Listener.Addr().String()
				}
				d, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer d.Close()
				go func() { _, _ = io.Copy(d, br); d.Close() }()
				_, _ = io.Copy(c, d)
			}()
		}
	}()
	s := startSite(t, fmt.Sprintf(`fsbroker_task {
		secret {env.CALLER_SECRET}
		node node-1 http://%s {env.NODE_SECRET}
	}`, l.Addr()))
	s.get(pair).wantStatus(t, 200)
	s.get("/task?appServerID=node-1&taskID=odd").wantProblem(t, 502, "node_rejected_request")
	s.get(pair+"2").wantStatus(t, 200)
}

// A report that is larger than the cache is served, by its task and by its submission.
func TestReportLargerThanTheCache(t *testing.T) {
	document := dense(2 << 20)
	node := newBackend(t, responds(200, document))
	broker := newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	s := startSite(t, options(node, brokerOption(broker)+"\ncache {\n max_size 1MiB\n }"))
	s.get(pair).wantStatus(t, 200)
	s.get("/task?submitID=s1").wantStatus(t, 200)
}

// An answer whose request began before a dial failed says nothing about connecting.
func TestAnswerFromBeforeADialFailure(t *testing.T) {
	headers, finish := make(chan struct{}), make(chan struct{})
	document := reportOf("t1", "SUCCESS")
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("taskID") != "slow" {
			responds(200, document)(w, r)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(document)))
		_, _ = io.WriteString(w, document[:10])
		_ = http.NewResponseController(w).Flush()
		close(headers)
		<-finish
		_, _ = io.WriteString(w, document[10:])
	})
	s := startWithAdmin(t, options(node, "fail_duration 1h"), recordEvents)
	slow := s.goGet("/task?appServerID=node-1&taskID=slow")
	<-headers
	_ = node.Listener.Close()
	s.get(pair).wantProblem(t, 502, "node_unreachable")
	close(finish)
	(<-slow).wantStatus(t, 200)
	wantEvents(t, "fsbroker_node_unhealthy of http.handlers.fsbroker_task: node node-1 at "+node.Listener.Addr().String()+", since node_unreachable")
	r := s.get(pair)
	for k, v := range s.scrape() {
		if strings.Contains(k, "node_up") {
			if v == "1" && r.status == 503 {
				t.Error("node_up is 1, a healthy event was emitted, and callers get node_down")
			}
		}
	}
}

// A call of a configuration that has ended leaves no connection open.
func TestRetiredTransportKeepsNoConnection(t *testing.T) {
	g := newGate()
	var mu sync.Mutex
	conns := map[net.Conn]http.ConnState{}
	server := newServer(t, brokerResponds(g.then(responds(404, "")), responds(204, "")))
	server.Config.ConnState = func(c net.Conn, state http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		conns[c] = state
	}
	server.Start()
	node := &backend{Server: server}
	conf := func(more string) string {
		return fmt.Sprintf("fsbroker_task {\n secret {env.CALLER_SECRET}\n %s\n %s\n}", brokerOption(node), more)
	}
	const path = "/task?submitID=s1"
	s := startSite(t, conf(""))
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := s.try(ctx, "GET", path, "Authorization: Bearer "+callerSecret)
		left <- err
	}()
	within(t, "the request", g.entered)
	s.load(conf("poll_interval 3s"))
	s.client.CloseIdleConnections()
	second := s.goGet(path)
	wantHeld(t, 2)
	leave()
	<-left
	wantHeld(t, 1)
	close(g.open)
	(<-second).wantStatus(t, 204)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all connections to close", func() bool {
		mu.Lock()
		defer mu.Unlock()
		for _, state := range conns {
			if state != http.StateClosed {
				return false
			}
		}
		return true
	})
}

// An empty secret of an upstream is an error, not no secret.
func TestEmptyUpstreamSecret(t *testing.T) {
	var secrets atomic.Value
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		secrets.Store(r.URL.RawQuery)
		responds(200, reportOf("t1", "SUCCESS"))(w, r)
	})
	for _, conf := range []string{
		"node node-1 " + node.URL + ` "{$NOT_SET_AT_ALL}"`,
		"node node-1 " + node.URL + " {\nsecret \"{$NOT_SET_AT_ALL}\"\n}",
		"node node-1 " + node.URL + " {\nsecret \"\"\n secret {env.NODE_SECRET}\n}",
	} {
		s := newSite(t)
		err := s.tryLoad("fsbroker_task {\n secret {env.CALLER_SECRET}\n" + conf + "\n}")
		if err == nil {
			t.Errorf("%s: an empty secret is accepted", conf)
		}
	}
}

// A node that can be connected to again is not unreachable any more, whatever it answers.
func TestReachableAgain(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(200, ""))
		address := node.Listener.Addr().String()
		s := startWithAdmin(t, options(node, "fail_duration 1ms"), recordEvents)
		node.Close()
		s.get(pair).wantProblem(t, 502, "node_unreachable")
		restartBackend(t, address, responds(500, ""))
		for range 2 {
			time.Sleep(50 * time.Millisecond)
			s.get(pair).wantProblem(t, 502, "node_bad_answer")
		}
		wantEvents(t, "fsbroker_node_unhealthy of http.handlers.fsbroker_task: node node-1 at "+address+", since node_unreachable",
			"fsbroker_node_healthy of http.handlers.fsbroker_task: node node-1 at "+address+", since node_unreachable")
		_, body := s.requestAdmin("GET", "/fsbroker/nodes")
		if strings.Contains(body, "unhealthy") || !strings.Contains(body, `"degraded","last_problem":{"code":"node_bad_answer"`) {
			t.Errorf("unhealthy since node_unreachable, though every dial succeeds: %s", body)
		}
	})
}

// A 404 whose body never ends does not delay the next upstream.
func TestUnknownWithoutAnEnd(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(http.StatusNotFound)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		})
		broker := newBackend(t, responds(200, reportOf("t1", "SUCCESS")))
		s := startSite(t, options(node, brokerOption(broker)+"\ntimeout 3s"))
		start := time.Now()
		s.get(pair).wantStatus(t, 200)
		if took := time.Since(start); took > time.Second {
			t.Errorf("a 404 took %s", took)
		}
	})
}

// A check that succeeds says nothing about a secret that requests found refused.
func TestChecksDoNotHideARefusedSecret(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var info atomic.Int32
		info.Store(200)
		node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/system-info" {
				responds(int(info.Load()), "{}")(w, r)
				return
			}
			w.WriteHeader(http.StatusForbidden)
		})
		s := startWithAdmin(t, options(node, "health_interval 50ms"), "")
		time.Sleep(200 * time.Millisecond)
		s.get(pair).wantProblem(t, 502, "node_refused_secret")
		up := func() string {
			for k, v := range s.scrape() {
				if strings.Contains(k, "node_up") {
					return v
				}
			}
			return ""
		}
		if up() != "0" {
			t.Fatal("up")
		}
		info.Store(500)
		time.Sleep(300 * time.Millisecond)
		info.Store(200)
		time.Sleep(300 * time.Millisecond)
		if up() != "0" {
			t.Error("the node refuses the secret, was never asked successfully since, and node_up is 1")
		}
	})
}
