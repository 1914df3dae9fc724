package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// harness measures contenders.
type harness struct {
	options options
	dir     string
	values  string // folder of the storages
	files   string // folder of the files that contenders need: a certificate, the reports, recorded responses
	script  string // path of the wrk script
	sizes   []size
	node    *node
	client  *http.Client
	kept    map[string]bool // folders of storages that have their reports

	module *contender // the module that is measured
	before *harness   // the same with the module of another commit; nil without one
	commit string     // that commit, in the harness of the module before

	caddyProtocols string // the protocols that Caddy serves
}

// defaultProtocols are those of the parts that do not compare protocols.
const defaultProtocols = "h1 h2"

// withH2C are those of the parts that compare protocols over TCP.
const withH2C = "h1 h2 h2c"

func newHarness(ctx context.Context, o options) (*harness, error) {
	h := &harness{options: o, caddyProtocols: defaultProtocols, kept: make(map[string]bool), module: module}
	var err error
	if h.dir, err = os.MkdirTemp("", "fsbroker-bench-"); err != nil {
		return nil, err
	}
	if h.values, err = os.MkdirTemp(inMemory(), "fsbroker-bench-storage-"); err != nil {
		return nil, err
	}
	h.files, h.script = filepath.Join(h.dir, "files"), filepath.Join(h.dir, "wrk.lua")
	if h.sizes, err = sizes(o.reports); err != nil {
		return nil, err
	}
	if h.node, err = startNode(ctx, h.sizes); err != nil {
		return nil, err
	}
	h.client = h1.client()
	err = errors.Join(
		os.Mkdir(h.files, 0o700),
		os.WriteFile(h.script, []byte(script), 0o600),
		writeCertificate(h.files),
	)
	for _, size := range h.sizes {
		err = errors.Join(err, os.WriteFile(filepath.Join(h.files, size.id()+".json"), size.document, 0o600))
	}
	return h, err
}

// inMemory returns the folder of Linux that is in memory, or nothing if there is none. On a disk, new files cost a server
// several times the CPU time that the client of a database takes.
func inMemory() string {
	const folder = "/dev/shm"
	if !isThere(folder) {
		return ""
	}
	return folder
}

func (h *harness) close() {
	h.client.CloseIdleConnections()
	_ = h.node.server.Close()
	_ = errors.Join(os.RemoveAll(h.dir), os.RemoveAll(h.values))
}

// writeCertificate generates a certificate for 127.0.0.1.
func writeCertificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600),
	)
}

// run does all measurements and prints the results.
func run(ctx context.Context, o options, out io.Writer) error {
	h, err := newHarness(ctx, o)
	if h != nil && h.node != nil {
		defer h.close()
	}
	if err != nil {
		return err
	}
	if o.before != "" {
		if err := h.addBefore(ctx, ".", o.before); err != nil {
			return err
		}
	}
	if err := reserveCPUs(ctx, o.serverCPUs); err != nil {
		return err
	}
	var all results
	participants := h.participants()
	for _, p := range h.parts() {
		if !o.parts.MatchString(p.name) {
			continue
		}
		if err = p.run(ctx, participants, &all); err != nil {
			break
		}
	}
	all.print(ctx, out, h) // of a run that failed, the parts before
	return err
}

// participants returns the contenders that are selected and installed.
func (h *harness) participants() (all []*contender) {
	for _, c := range contenders {
		if !c.installed() {
			progress.Printf("%s is not installed and is skipped", c.name)
		} else if h.options.includes(c) {
			all = append(all, c)
		}
		if c == module && h.before != nil {
			all = append(all, h.before.module)
		}
	}
	return all
}

// part is a part of a run.
type part struct {
	name string
	run  func(context.Context, []*contender, *results) error
}

// parts returns all parts, in their order.
func (h *harness) parts() []part {
	return []part{
		{"load", h.load}, {"unauthorized", h.unauthorized}, {"memory", h.memory}, {"cold", h.cold}, {"miss", h.miss},
		{"misses", h.misses}, {"polls", h.polls}, {"compression", h.compression}, {"collections", h.collections},
		{"waiting", h.waiting},
		{"protocols", h.protocols}, {"http3", h.http3}, {"instructions", h.countInstructions},
		{"storage hits", h.storageHits}, {"storage writes", h.storageWrites}, {"storage stop", h.storageStop},
		{"storage purge", h.storagePurge}, {"storage sweep", h.storageSweep}, {"storage heap", h.storageHeap},
		{"restart", h.restart},
		{"growth nodes", h.growthNodes}, {"growth sites", h.growthSites}, {"growth stored", h.growthStored},
		{"growth harvest", h.growthHarvest},
	}
}

// load measures every participant under every load of wrk.
func (h *harness) load(ctx context.Context, participants []*contender, results *results) (err error) {
	results.loads, err = h.measureLoads(ctx, "load", allLoads(h.sizes), participants, results)
	return err
}

// measureLoads measures participants under loads, in rounds. Servers are restarted for each round, because the memory
// layout of a process makes it a few percent faster or slower for its whole life.
func (h *harness) measureLoads(ctx context.Context, part string, loads []load, participants []*contender, into *results) ([]loadResult, error) {
	type trial struct {
		load      load
		contender *contender
		ours      *trial // the trial of the module under the same load
		rounds    []measure
	}
	var trials []*trial
	for _, l := range loads {
		var ours *trial
		for _, c := range participants {
			if !l.supportedBy(c) || !h.options.loads.MatchString(l.String()) {
				continue
			}
			t := &trial{load: l, contender: c}
			if c == module {
				ours = t
			}
			t.ours = ours
			trials = append(trials, t)
		}
	}
	for round := range h.options.rounds {
		progress.Printf("round %d of %d", round+1, h.options.rounds)
		servers, err := h.startAll(ctx, participants)
		for _, t := range trials {
			if err != nil {
				break
			}
			s := servers.of(t.contender)
			if err = h.check(ctx, t.load, t.contender, s); err == nil {
				var m measure
				m, err = t.load.run(ctx, h, t.contender, s)
				t.rounds = append(t.rounds, m)
			}
		}
		servers.stop()
		if err != nil {
			return nil, err
		}
	}
	var all []loadResult
	for _, t := range trials {
		all = append(all, summarize(t.load, t.contender, t.rounds, t.ours.rounds))
		if t.contender.isBefore() {
			compare(into, part+", "+t.load.String(), t.ours.rounds, t.rounds)
		}
	}
	return all, nil
}

// servers are running servers, each of one contender or of several that share it.
type servers map[string]*server

func (s servers) of(c *contender) *server { return s[c.shared()] }

func (s servers) stop() {
	for _, one := range s {
		one.process.stop()
	}
}

// startAll starts the servers of all participants. Before it starts the bare handler, it records the responses of the
// module, which the bare handler plays back.
func (h *harness) startAll(ctx context.Context, participants []*contender) (servers, error) {
	all := make(servers)
	for _, c := range participants {
		if all.of(c) != nil {
			continue
		}
		if c == bareHandler {
			if err := h.record(ctx, all.of(module)); err != nil {
				return all, err
			}
		}
		s, err := c.start(ctx, h)
		if err != nil {
			return all, err
		}
		all[c.shared()] = s
	}
	return all, nil
}

// record saves the module's responses for the bare handler.
func (h *harness) record(ctx context.Context, s *server) error {
	for _, l := range allLoads(h.sizes) {
		if l.tls || l.conns > 1 { // the response is the same
			continue
		}
		var a response
		for range 2 { // the second request is a hit
			var err error
			if a, err = h.get(ctx, l.url(module, s), l.gzip); err != nil {
				return err
			}
		}
		etag := a.header.Get("ETag")
		match, err := notModified.request(l.url(module, s), l.gzip, etag).send(ctx, h.client)
		if err == nil && (match.status != http.StatusNotModified || etag == "") {
			err = fmt.Errorf("%s: status %d for a client that has the ETag %q", l, match.status, etag)
		}
		if err != nil {
			return err
		}
		if err := h.save(recordedName(l.representation()), recorded{pairQuery(l.representation()), a.header, a.body, etag, match.header}); err != nil {
			return err
		}
	}
	return nil
}

// recordedName returns the name of the file with the recorded response that has a representation of a report.
func recordedName(representation string) string { return representation + ".recorded" }

// save saves a response of the module to a file of that name, for the servers that are started from now on.
func (h *harness) save(name string, r recorded) error {
	for _, own := range []string{"Server", "Date", "Alt-Svc"} { // Caddy and Go set these
		r.Header.Del(own)
		r.NotModified.Del(own)
	}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(h.files, name), text, 0o600)
}

// response is the response of a contender.
type response struct {
	header http.Header
	body   []byte
}

// check checks that the response has the report, compressed if it must be.
func (r response) check(want []byte, gzipped bool) error {
	return checkBody(r.header.Get("Content-Encoding"), r.body, want, gzipped)
}

// get requests a URL that has a report.
func (h *harness) get(ctx context.Context, url string, gzipped bool) (response, error) {
	a, err := h.getTimed(ctx, url, gzipped)
	return a.response, err
}

// getTimed is get, with the times.
func (h *harness) getTimed(ctx context.Context, url string, gzipped bool) (answer, error) {
	a, err := request{method: http.MethodGet, url: url, gzip: gzipped}.send(ctx, h.client)
	if err == nil && a.status != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %.200s", url, a.status, a.body)
	}
	return a, err
}

// answer is the response to a request, with the times until it was there.
type answer struct {
	status int
	response
	first time.Duration // until the first byte of the body
	took  time.Duration // until the last
}

// request is a request for a report.
type request struct {
	method string
	url    string
	gzip   bool   // whether the client accepts gzip
	etag   string // that the client has; empty if it has none
}

// header returns the header of the request.
func (r request) header() http.Header {
	header := make(http.Header)
	if r.gzip {
		header.Set("Accept-Encoding", "gzip")
	}
	if r.etag != "" {
		header.Set("If-None-Match", r.etag)
	}
	return header
}

// send makes the request.
func (r request) send(ctx context.Context, client *http.Client) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, r.method, r.url, nil)
	if err != nil {
		return answer{}, err
	}
	req.Header = r.header()
	begin := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	_, _ = in.Peek(1) // the error is that of reading the rest
	first := time.Since(begin)
	body, err := io.ReadAll(in)
	return answer{resp.StatusCode, response{resp.Header, body}, first, time.Since(begin)}, err
}

// check checks that a contender returns the report three times in a row, compressed if the load has gzip.
func (h *harness) check(ctx context.Context, l load, c *contender, s *server) error {
	for range 3 {
		a, err := h.get(ctx, l.url(c, s), l.gzip)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if err := a.check(l.size.document, l.gzip); err != nil {
			return fmt.Errorf("%s, %s: %w", c.name, l, err)
		}
	}
	return nil
}

func gunzip(encoding string, body []byte) ([]byte, error) {
	if encoding != "gzip" {
		return nil, fmt.Errorf("the response has Content-Encoding %q instead of gzip", encoding)
	}
	zr, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(zr)
}

// summarize returns the medians of the rounds. The ratio is the median of the ratios per round, because other activity
// on the machine in a round affects all contenders.
func summarize(l load, c *contender, rounds, ours []measure) loadResult {
	ratios, cpuRatios := make([]float64, len(rounds)), make([]float64, len(rounds))
	for i := range rounds {
		ratios[i] = ours[i].Requests / rounds[i].Requests
		cpuRatios[i] = float64(rounds[i].CPU) / float64(ours[i].CPU)
	}
	return loadResult{
		load: l, contender: c,
		ratio:    median(ratios, func(r float64) float64 { return r }),
		cpuRatio: median(cpuRatios, func(r float64) float64 { return r }),
		measure: measure{
			Requests: median(rounds, func(m measure) float64 { return m.Requests }),
			P50:      median(rounds, func(m measure) time.Duration { return m.P50 }),
			P99:      median(rounds, func(m measure) time.Duration { return m.P99 }),
			CPU:      median(rounds, func(m measure) time.Duration { return m.CPU }),
			Wire:     median(rounds, func(m measure) float64 { return m.Wire }),
		},
	}
}

// median returns the median of the values that of returns for all elements.
func median[E any, V cmp.Ordered](all []E, of func(E) V) V {
	values := make([]V, len(all))
	for i, e := range all {
		values[i] = of(e)
	}
	slices.Sort(values)
	return values[len(values)/2]
}
