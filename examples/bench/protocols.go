package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/quic-go/quic-go/http3"
)

// protocol is a version of HTTP.
type protocol string

const (
	h1 protocol = "HTTP/1.1"
	h2 protocol = "HTTP/2"
	h3 protocol = "HTTP/3"
)

// supportedBy reports whether c can serve the protocol. nginx 1.22 has no HTTP/3, and cannot serve both HTTP/1.1 and HTTP/2
// without TLS on one port.
func (p protocol) supportedBy(c *contender, tls bool) bool {
	return c.command == nil || p != h3 && (p != h2 || tls)
}

// client returns a client that uses only the protocol.
func (p protocol) client() *http.Client {
	insecure := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // this program generated the certificate
	if p == h3 {
		return &http.Client{Transport: &http3.Transport{DisableCompression: true, TLSClientConfig: insecure}}
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(p == h1)
	protocols.SetHTTP2(p == h2)
	protocols.SetUnencryptedHTTP2(p == h2)
	return &http.Client{Transport: &http.Transport{DisableCompression: true, TLSClientConfig: insecure, Protocols: protocols}}
}

// closeClient closes the connections of a client.
func closeClient(client *http.Client) {
	client.CloseIdleConnections()
	if transport, ok := client.Transport.(io.Closer); ok { // HTTP/3 has sockets too
		_ = transport.Close()
	}
}

// kind is a kind of request for a report.
type kind int

const (
	hit         kind = iota // with the report in the response
	notModified             // of a client that has the report
	head                    // for the header alone
	miss                    // for a report that no request before was for
)

func (k kind) String() string { return [...]string{"hit", "304", "HEAD", "miss"}[k] }

// supportedBy reports whether c is compared with the module. Others than Caddy are only for hits, and misses are only
// counted in instructions, for which there is no other.
func (k kind) supportedBy(c *contender) bool {
	return k == hit || k == miss && c.isModule() || k != miss && c.command == nil
}

// status returns the status of the response.
func (k kind) status() int {
	if k == notModified {
		return http.StatusNotModified
	}
	return http.StatusOK
}

// request returns the request of this kind, for a report with an ETag.
func (k kind) request(url string, gzip bool, etag string) request {
	r := request{method: http.MethodGet, url: url, gzip: gzip}
	switch k {
	case notModified:
		r.etag = etag
	case head:
		r.method = http.MethodHead
	}
	return r
}

// check checks the answer to a request of this kind. got is the answer to a hit.
func (k kind) check(r, got answer) error {
	var body []byte
	if k == hit {
		body = got.body
	}
	if r.status != k.status() || !bytes.Equal(r.body, body) {
		return fmt.Errorf("status %d and a body of %d bytes, instead of %d and %d", r.status, len(r.body), k.status(), len(body))
	}
	if etag := r.header.Get("ETag"); etag != got.header.Get("ETag") {
		return fmt.Errorf("the ETag is %s instead of %s", etag, got.header.Get("ETag"))
	}
	if length := r.header.Get("Content-Length"); k == head && length != got.header.Get("Content-Length") {
		return fmt.Errorf("the Content-Length is %s instead of %s", length, got.header.Get("Content-Length"))
	}
	return nil
}

// send makes a request of this kind, and checks the answer. got is the answer to a hit.
func (k kind) send(ctx context.Context, client *http.Client, r request, got answer) error {
	a, err := r.send(ctx, client)
	if err != nil {
		return err
	}
	return k.check(a, got)
}

// manyStreams is the number of requests at a time on a connection that has more than one.
const manyStreams = 32

// protocolLoads returns the loads over HTTP/1.1 and HTTP/2.
func protocolLoads(sizes []size) []load {
	var all []load
	for _, protocol := range []protocol{h1, h2} {
		for _, l := range allLoads(sizes) {
			l.protocol, l.streams = protocol, 1
			all = append(all, l)
			if protocol == h2 && l.conns == 1 {
				together := l
				together.streams = manyStreams
				all = append(all, together)
			}
			if l.gzip && l.size.name == sizes[1].name {
				for _, l.kind = range []kind{notModified, head} {
					all = append(all, l)
				}
			}
		}
	}
	return all
}

// protocols compares the module with the bare handler and nginx over HTTP/1.1 and HTTP/2.
func (h *harness) protocols(ctx context.Context, participants []*contender, results *results) error {
	return h.measureProtocols(ctx, "protocols", withH2C, protocolLoads(h.sizes), participants, results)
}

// http3 compares the module with the bare handler over HTTP/3. Its servers are others, because Caddy announces HTTP/3 in
// each response over another protocol.
func (h *harness) http3(ctx context.Context, participants []*contender, results *results) error {
	var loads []load
	for _, conns := range connections {
		loads = append(loads, load{size: h.sizes[1], gzip: true, tls: true, conns: conns, protocol: h3, streams: 1})
	}
	return h.measureProtocols(ctx, "http3", "h1 h2 h3", loads, participants, results)
}

// measureProtocols measures loads, for which Caddy serves other protocols than for the other parts.
func (h *harness) measureProtocols(ctx context.Context, part, caddyProtocols string, loads []load, participants []*contender, results *results) error {
	h.caddyProtocols = caddyProtocols
	defer func() { h.caddyProtocols = defaultProtocols }()
	var compared []*contender
	for _, c := range participants {
		if c.isModule() || c == bareHandler || c == nginx1 {
			compared = append(compared, c)
		}
	}
	measured, err := h.measureLoads(ctx, part, loads, compared, results)
	results.protocols = append(results.protocols, measured...)
	return err
}

// runProtocol is run for a load with a protocol.
func (l load) runProtocol(ctx context.Context, h *harness, c *contender, s *server) (measure, error) {
	r, got, err := l.prepare(ctx, c, s)
	if err != nil {
		return measure{}, err
	}
	run := h.h2load
	if l.protocol == h3 || l.protocol == h1 && l.kind == head { // h2load waits for the body of a response to HEAD
		run = h.clients
	}
	before := s.process.cpu()
	all, responses, err := run(ctx, l, r, got)
	cpu := s.process.cpu() - before
	if err == nil && len(all.took) == 0 {
		err = errors.New("there was no response")
	}
	if err != nil {
		return measure{}, err
	}
	return measure{
		Requests: responses / all.elapsed.Seconds(),
		P50:      all.percentile(50),
		P99:      all.percentile(99),
		CPU:      time.Duration(float64(cpu) / responses * 10_000),
	}, nil
}

// prepare returns the request of the load, and the answer to a hit. It checks both over the protocol.
func (l load) prepare(ctx context.Context, c *contender, s *server) (r request, got answer, err error) {
	client := l.protocol.client()
	defer closeClient(client)
	url := l.url(c, s)
	got, err = hit.request(url, l.gzip, "").send(ctx, client)
	if err == nil && got.status != http.StatusOK {
		err = fmt.Errorf("status %d: %.200s", got.status, got.body)
	}
	if err == nil {
		err = got.check(l.size.document, l.gzip)
	}
	if err != nil {
		return request{}, answer{}, err
	}
	r = l.kind.request(url, l.gzip, got.header.Get("ETag"))
	return r, got, l.kind.send(ctx, client, r, got)
}

// clients makes the requests of the load with Go's clients, for what h2load cannot do. They take more CPU time than
// h2load does. Each has a connection of its own. All responses are checked.
func (h *harness) clients(ctx context.Context, l load, r request, got answer) (all calls, responses float64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		wg    sync.WaitGroup
		parts = make([]calls, l.conns)
		begin = time.Now()
		end   = begin.Add(time.Duration(h.options.seconds) * time.Second)
	)
	for i := range parts {
		wg.Go(func() {
			client := l.protocol.client()
			defer closeClient(client)
			for sent := time.Now(); sent.Before(end) && ctx.Err() == nil; sent = time.Now() {
				if err := l.kind.send(ctx, client, r, got); err != nil {
					cancel(err)
				}
				parts[i].took = append(parts[i].took, time.Since(sent))
			}
		})
	}
	wg.Wait()
	all = merge(parts, time.Since(begin))
	return all, float64(len(all.took)), context.Cause(ctx)
}

// printProtocols prints how the module compares with the bare handler and nginx. Ratios of 1 mean that the module is as
// good, and more than 1 that it is better.
func (r *results) printProtocols(out io.Writer) {
	fmt.Fprint(out, "\n**The module over each protocol, compared with others: 1 is as good, more is better**\n\n| load | requests/s | CPU s per 10,000 responses |")
	peers := peersOf(r.protocols)
	for _, c := range peers {
		fmt.Fprintf(out, " %s: requests/s | CPU time |", c.name)
	}
	fmt.Fprint(out, "\n|---|--:|--:|", strings.Repeat("--:|", 2*len(peers)), "\n")
	for _, ours := range r.protocols {
		if ours.contender != module {
			continue
		}
		fmt.Fprintf(out, "| %s | %.0f | %.2f |", ours.load, ours.Requests, ours.CPU.Seconds())
		for _, c := range peers {
			if theirs := find(r.protocols, ours.load, c); theirs != nil {
				fmt.Fprintf(out, " %.2f | %.2f |", theirs.ratio, theirs.cpuRatio)
			} else {
				fmt.Fprint(out, " | |")
			}
		}
		fmt.Fprintln(out)
	}
}

// printProtocolGoals prints how many loads reach the goal of their kind, and which are the worst.
func (r *results) printProtocolGoals(out io.Writer) {
	fmt.Fprint(out, "\n**Goals of the protocols, compared with the bare handler**\n\n"+
		"| responses | goal | loads | reach it in requests/s | reach it in CPU time | worst in requests/s | worst in CPU time |\n|---|--:|--:|--:|--:|---|---|\n")
	for _, g := range []struct {
		text    string
		minimum float64
		kind    kind
	}{
		{"hits", 0.97, hit}, {"304s", 1, notModified}, {"HEADs", 1, head},
	} {
		var all []loadResult
		for _, l := range r.protocols {
			if l.contender == bareHandler && l.kind == g.kind {
				all = append(all, l)
			}
		}
		if len(all) == 0 {
			continue
		}
		reach, worst := ranked(all, g.minimum, func(l loadResult) float64 { return l.ratio })
		reachCPU, worstCPU := ranked(all, g.minimum, func(l loadResult) float64 { return l.cpuRatio })
		fmt.Fprintf(out, "| %s | %.2f | %d | %d | %d | %s | %s |\n", g.text, g.minimum, len(all), reach, reachCPU, worst, worstCPU)
	}
}

// ranked returns how many results reach a minimum, and names the worst.
func ranked(all []loadResult, minimum float64, of func(loadResult) float64) (reach int, worst string) {
	all = slices.SortedFunc(slices.Values(all), func(a, b loadResult) int { return cmp.Compare(of(a), of(b)) })
	var names []string
	for i, l := range all {
		if of(l) >= minimum {
			reach++
		}
		if i < 3 {
			names = append(names, fmt.Sprintf("%.2f: %s", of(l), l.load))
		}
	}
	return reach, strings.Join(names, "; ")
}

// printProtocolLoads prints the medians of all servers.
func (r *results) printProtocolLoads(out io.Writer) {
	fmt.Fprint(out, "\n**All servers over each protocol**\n\n| load | server | requests/s | p50 | p99 | CPU s per 10,000 responses |\n|---|---|--:|--:|--:|--:|\n")
	for _, l := range r.protocols {
		fmt.Fprintf(out, "| %s | %s | %.0f | %s | %s | %.2f |\n", l.load, l.contender.name, l.Requests, short(l.P50), short(l.P99), l.CPU.Seconds())
	}
}
