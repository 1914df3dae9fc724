package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
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
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// laboratory is where contenders are measured.
type laboratory struct {
	options options
	dir     string
	files   string // a folder of what contenders need: a certificate, the reports, recorded answers
	script  string // of wrk
	sizes   []size
	node    *node
	client  *http.Client
}

func newLaboratory(o options) (*laboratory, error) {
	if _, err := exec.LookPath("wrk"); err != nil {
		return nil, fmt.Errorf("wrk makes the load: install it (apt-get install wrk nginx varnish): %w", err)
	}
	lab := &laboratory{options: o}
	var err error
	if lab.dir, err = os.MkdirTemp("", "fsbroker-bench-"); err != nil {
		return nil, err
	}
	lab.files, lab.script = filepath.Join(lab.dir, "files"), filepath.Join(lab.dir, "wrk.lua")
	if lab.sizes, err = sizes(o.reports); err != nil {
		return nil, err
	}
	if lab.node, err = startNode(lab.sizes); err != nil {
		return nil, err
	}
	lab.client = &http.Client{Transport: &http.Transport{
		DisableCompression: true,
		TLSClientConfig:    &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the certificate has just been made
	}}
	err = errors.Join(
		os.Mkdir(lab.files, 0o700),
		os.WriteFile(lab.script, []byte(script), 0o600),
		writeCertificate(lab.files),
	)
	for _, size := range lab.sizes {
		err = errors.Join(err, os.WriteFile(filepath.Join(lab.files, size.id()+".json"), size.document, 0o600))
	}
	return lab, err
}

func (lab *laboratory) close() {
	lab.client.CloseIdleConnections()
	_ = lab.node.server.Close()
	_ = os.RemoveAll(lab.dir)
}

// writeCertificate makes a certificate for 127.0.0.1.
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

// run measures everything, and prints it.
func run(ctx context.Context, o options, out io.Writer) error {
	lab, err := newLaboratory(o)
	if lab != nil && lab.node != nil {
		defer lab.close()
	}
	if err != nil {
		return err
	}
	if err := keepOff(o.serverCPUs); err != nil {
		return err
	}
	var all results
	var taking []*contender
	for _, c := range contenders {
		if !c.isThere() {
			progress.Printf("%s is not installed here, and takes no part", c.name)
		} else if o.takesPart(c) {
			taking = append(taking, c)
		}
	}
	for _, part := range []func(context.Context, []*contender, *results) error{lab.load, lab.memory, lab.cold, lab.miss, lab.forms} {
		if err := part(ctx, taking, &all); err != nil {
			return err
		}
	}
	all.print(out, lab)
	return nil
}

// load puts everybody under every load, in rounds in which each has its turn. Servers start anew for each round, since
// how a process happens to lie in memory makes it a few percent faster or slower for as long as it lives.
func (lab *laboratory) load(ctx context.Context, taking []*contender, results *results) error {
	type trial struct {
		load   load
		by     *contender
		ours   *trial // of the module
		rounds []measure
	}
	var trials []*trial
	for _, l := range allLoads(lab.sizes) {
		var ours *trial
		for _, c := range taking {
			if !l.suits(c) || !lab.options.loads.MatchString(l.String()) {
				continue
			}
			t := &trial{load: l, by: c}
			if c == module {
				ours = t
			}
			t.ours = ours
			trials = append(trials, t)
		}
	}
	for round := range lab.options.rounds {
		progress.Printf("round %d of %d", round+1, lab.options.rounds)
		servers, err := lab.startAll(ctx, taking)
		for _, t := range trials {
			if err != nil {
				break
			}
			s := servers[t.by.config.Name()]
			if err = lab.check(ctx, t.load, t.by, s); err == nil {
				var m measure
				m, err = t.load.put(ctx, lab, t.by, s)
				t.rounds = append(t.rounds, m)
			}
		}
		stopAll(servers)
		if err != nil {
			return err
		}
	}
	for _, t := range trials {
		results.loads = append(results.loads, summarize(t.load, t.by, t.rounds, t.ours.rounds))
	}
	return nil
}

// startAll starts the servers of all who take part. The bare handler's is started last but for what it plays back being
// recorded: the answers of the module.
func (lab *laboratory) startAll(ctx context.Context, taking []*contender) (map[string]*server, error) {
	servers := make(map[string]*server)
	for _, c := range taking {
		if servers[c.config.Name()] != nil {
			continue
		}
		if c == bareHandler {
			if err := lab.record(ctx, servers[module.config.Name()]); err != nil {
				return servers, err
			}
		}
		s, err := c.start(ctx, lab)
		if err != nil {
			return servers, err
		}
		servers[c.config.Name()] = s
	}
	return servers, nil
}

func stopAll(servers map[string]*server) {
	for _, s := range servers {
		s.process.stop()
	}
}

// record saves the module's answers for the bare handler.
func (lab *laboratory) record(ctx context.Context, s *server) error {
	for _, l := range allLoads(lab.sizes) {
		if l.tls || l.conns > 1 { // the answer is the same
			continue
		}
		var a answer
		for range 2 { // the second is a hit
			var err error
			if a, err = lab.get(ctx, l.url(module, s), l.gzip); err != nil {
				return err
			}
		}
		for _, own := range []string{"Server", "Date", "Alt-Svc"} { // Caddy and Go set these
			a.header.Del(own)
		}
		text, err := json.Marshal(recorded{pairQuery(l.form()), a.header, a.body})
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(lab.files, l.form()+".recorded"), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// answer is what a contender said.
type answer struct {
	header http.Header
	body   []byte
}

func (lab *laboratory) get(ctx context.Context, url string, gzipped bool) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	if gzipped {
		req.Header.Set("Accept-Encoding", "gzip")
	}
	resp, err := lab.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %.200s", url, resp.StatusCode, body)
	}
	return answer{resp.Header, body}, err
}

// check makes sure that a contender gives what is asked for, compressed where that is wanted, again and again.
func (lab *laboratory) check(ctx context.Context, l load, c *contender, s *server) error {
	for range 3 {
		a, err := lab.get(ctx, l.url(c, s), l.gzip)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if l.gzip {
			if a.body, err = gunzip(a); err != nil {
				return fmt.Errorf("%s, %s: %w", c.name, l, err)
			}
		}
		if !bytes.Equal(a.body, l.size.document) {
			return fmt.Errorf("%s, %s: %d bytes came, which are not the report", c.name, l, len(a.body))
		}
	}
	return nil
}

func gunzip(a answer) ([]byte, error) {
	if encoding := a.header.Get("Content-Encoding"); encoding != "gzip" {
		return nil, fmt.Errorf("the answer is encoded as %q, not as gzip", encoding)
	}
	zr, err := gzip.NewReader(bytes.NewReader(a.body))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(zr)
}

// summarize takes the medians of rounds. The ratio is the median of the rounds' ratios, since whatever else the machine
// does in a round is done to all.
func summarize(l load, c *contender, rounds, ours []measure) loadResult {
	ratios := make([]float64, len(rounds))
	for i := range rounds {
		ratios[i] = ours[i].Requests / rounds[i].Requests
	}
	return loadResult{
		load: l, contender: c, ratio: median(ratios, func(r float64) float64 { return r }),
		measure: measure{
			Requests: median(rounds, func(m measure) float64 { return m.Requests }),
			P50:      median(rounds, func(m measure) time.Duration { return m.P50 }),
			P99:      median(rounds, func(m measure) time.Duration { return m.P99 }),
			CPU:      median(rounds, func(m measure) time.Duration { return m.CPU }),
			Wire:     median(rounds, func(m measure) float64 { return m.Wire }),
		},
	}
}

// median is the middle one of what of takes from each.
func median[E any, V cmp.Ordered](all []E, of func(E) V) V {
	values := make([]V, len(all))
	for i, e := range all {
		values[i] = of(e)
	}
	slices.Sort(values)
	return values[len(values)/2]
}
