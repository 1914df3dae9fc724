package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

// reloadable is a server with many nodes or sites. A reload changes its grace period.
type reloadable struct {
	contender
	nodes   int      // how many of its nodes are asked in turn
	hosts   []string // of its sites, which are asked in turn
	reports bool     // whether it serves reports
	checks  bool     // whether it checks the health of its nodes
}

const gracePeriod, otherGracePeriod = "grace_period 10s", "grace_period 11s"

// reloadableConfig returns a configuration with these sites.
func reloadableConfig(name, sites string) *template.Template {
	t := template.Must(template.New(name).Funcs(functions).Parse(caddyGlobal + sites))
	return template.Must(t.New("global").Parse(gracePeriod)).Lookup(name)
}

// site returns a site with a body.
func site(host, body string) string {
	return fmt.Sprintf("http://%s:{{port .Plain}} {\n%s\n}\n", host, body)
}

// handler returns the module with that many nodes, which are all the same, and other options.
func handler(nodes int, options string) string {
	var b strings.Builder
	b.WriteString("fsbroker_task {\nsecret bench {{.Secret}}\n")
	for i := range nodes {
		fmt.Fprintf(&b, "node %s {{.Node}} {{.Secret}}\n", nodeName(i))
	}
	b.WriteString(options + "\n}")
	return b.String()
}

func nodeName(i int) string { return fmt.Sprintf("node-%d", i+1) }

// hostNames returns names of sites. They have the same length, because Caddy sorts sites by it.
func hostNames(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("site-%06d.localhost", i+1))
	}
	return all
}

// withNodes returns a server that has one site with many nodes.
func withNodes(nodes int, options string) *reloadable {
	const host = "127.0.0.1"
	return &reloadable{
		contender: contender{name: "fsbroker_task, many nodes", config: reloadableConfig("nodes", site(host, handler(nodes, options)))},
		nodes:     nodes, hosts: []string{host}, reports: true, checks: options != "",
	}
}

// withSites returns a server that has many sites. body returns the body of one of them.
func withSites(sites int, body func(host string) string) *reloadable {
	r := &reloadable{nodes: nodesOfSite, hosts: hostNames(sites), reports: true}
	var config strings.Builder
	for _, host := range r.hosts {
		config.WriteString(site(host, body(host)))
	}
	r.contender = contender{name: "fsbroker_task, many sites", config: reloadableConfig("sites", config.String())}
	return r
}

// nodesOfSite is the number of nodes of each site.
const nodesOfSite = 2

// growthNodes measures servers with few and many nodes, with health checks and without.
func (h *harness) growthNodes(ctx context.Context, _ []*contender, results *results) error {
	of := func(options string) func(*harness, context.Context, int) (sample, error) {
		return func(h *harness, ctx context.Context, n int) (sample, error) {
			return h.sampleOf(ctx, withNodes(n, options))
		}
	}
	return h.grow(ctx, results, "Growth: nodes", powers(h.options.grownNodes, 4),
		variant{"no health checks", of("")}, variant{"health_interval 10s", of("health_interval 10s")})
}

// growthSites measures servers with few and many sites, in one namespace or each in one of its own. The floor is what Caddy
// takes for sites with its own handler.
func (h *harness) growthSites(ctx context.Context, _ []*contender, results *results) error {
	return h.grow(ctx, results, "Growth: sites, each with 2 nodes", powers(h.options.sites, 3),
		variant{"one namespace", func(h *harness, ctx context.Context, n int) (sample, error) {
			return h.sampleOf(ctx, withSites(n, func(string) string { return handler(nodesOfSite, "") }))
		}},
		variant{"a namespace for each", func(h *harness, ctx context.Context, n int) (sample, error) {
			return h.sampleOf(ctx, withSites(n, func(host string) string {
				return handler(nodesOfSite, "cache {\nnamespace "+host+"\n}")
			}))
		}},
		variant{"Caddy respond", func(h *harness, ctx context.Context, n int) (sample, error) {
			floor := withSites(n, func(string) string { return "respond " + floorBody })
			floor.name, floor.reports = "Caddy respond", false
			return h.sampleOf(ctx, floor)
		}})
}

// floorBody is what a site of the floor answers.
const floorBody = "ok"

// sampleOf starts a server and measures it: first without requests, then under requests for all nodes or sites in turn, and
// at last its reload.
func (h *harness) sampleOf(ctx context.Context, r *reloadable) (sample, error) {
	checked := h.node.checks.Load()
	s, err := r.start(ctx, h)
	if err != nil {
		return nil, err
	}
	defer s.process.stop()
	var all sample
	all.add("start, ms", millis(s.process.listening))
	cpu, elapsed, err := h.watch(ctx, s)
	if err != nil {
		return nil, err
	}
	all.add("CPU while idle, ms/s", millis(cpu)/elapsed.Seconds())
	heap, err := h.memoryUsed(ctx, &r.contender, s)
	if err != nil {
		return nil, err
	}
	all.add("heap while idle, MiB", inMiB(heap))
	m, err := h.metrics(ctx, s)
	if err != nil {
		return nil, err
	}
	all.add("goroutines while idle", m["go_goroutines"])
	if n := h.node.checks.Load() - checked; (n > 0) != r.checks {
		return nil, fmt.Errorf("there were %d health checks", n)
	}
	err = errors.Join(h.sampleMisses(ctx, r, s, &all), h.sampleHits(ctx, r, s, &all))
	if err != nil {
		return nil, err
	}
	if heap, err = h.memoryUsed(ctx, &r.contender, s); err != nil {
		return nil, err
	}
	all.add("heap after the requests, MiB", inMiB(heap))
	if err := all.addScrape(ctx, h, s); err != nil {
		return nil, err
	}
	took, err := h.reload(ctx, s)
	all.add("reload, ms", millis(took))
	return all, err
}

// grownMisses is the number of reports that are fetched to measure a miss.
const grownMisses = 2000

// sampleMisses requests a report of each node and site, and then other reports of all.
func (h *harness) sampleMisses(ctx context.Context, r *reloadable, s *server, into *sample) error {
	if !r.reports {
		return nil
	}
	var took calls
	asked := h.node.requests.Load()
	first := max(r.nodes, len(r.hosts))
	for _, part := range []plan{r.reportsOf(h, "first", first), r.reportsOf(h, "miss", grownMisses)} {
		var err error
		if took, err = part.runAll(ctx, s); err != nil {
			return err
		}
	}
	if n := h.node.requests.Load() - asked; n != int64(first+grownMisses) {
		return fmt.Errorf("the node got %d requests instead of %d", n, first+grownMisses)
	}
	into.add("misses/s", took.perSecond())
	into.add("CPU of a miss, µs", micros(took.cpuPerReport()))
	return nil
}

// reportsOf returns a plan that requests different small reports, in turn of all nodes and at all sites.
func (r *reloadable) reportsOf(h *harness, name string, count int) plan {
	p := h.ownReports("small", name, count, 32)
	p.query = func(i int, id string) query {
		return query{http.MethodGet, r.hosts[i%len(r.hosts)], "/task?" + nodeQuery(nodeName(i%r.nodes), id)}
	}
	return p
}

// sampleHits requests the same report of the last node, or what the floor answers, at the last site.
func (h *harness) sampleHits(ctx context.Context, r *reloadable, s *server, into *sample) error {
	host, target := r.hosts[len(r.hosts)-1], "/"
	want := []byte(floorBody)
	if r.reports {
		const task = "own-small-hit"
		target, want = "/task?"+nodeQuery(nodeName(r.nodes-1), task), h.node.document(task)
	}
	c := &caller{server: s}
	defer c.close()
	for range 2 {
		a, err := c.send(ctx, query{http.MethodGet, host, target}, r.reports)
		if err == nil {
			err = checkBody(a.encoding, a.body, want, r.reports)
		}
		if err != nil {
			return err
		}
	}
	asked := h.node.requests.Load()
	m, failed, err := h.wrk(ctx, s, 32, "http://"+s.Plain+target, "Host: "+host, "Authorization: Bearer "+secret, "Accept-Encoding: gzip")
	if err != nil {
		return err
	}
	if n := h.node.requests.Load() - asked; failed > 0 || n > 0 {
		return fmt.Errorf("%g of %g requests failed, and %d were no hits", failed, m.responses, n)
	}
	into.add("hits/s", m.Requests)
	into.add("CPU of a hit, µs", micros(m.CPU)/10_000)
	return nil
}

// reload changes an option of a server, and returns how long that takes.
func (h *harness) reload(ctx context.Context, s *server) (time.Duration, error) {
	config, err := os.ReadFile(filepath.Join(s.Dir, "Caddyfile"))
	if err != nil {
		return 0, err
	}
	config = bytes.Replace(config, []byte(gracePeriod), []byte(otherGracePeriod), 1)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.Admin+"/load", bytes.NewReader(config))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	req.Close = true // a reload closes the connections of the admin endpoint
	begin := time.Now()
	resp, err := h.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	took := time.Since(begin)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("the reload was answered with status %d: %.200s", resp.StatusCode, body)
	}
	if err != nil {
		return took, err
	}
	h.client.CloseIdleConnections()
	period, err := h.get(ctx, "http://"+s.Admin+"/config/apps/http/grace_period", false)
	if err != nil {
		return took, err
	}
	var nanos time.Duration
	if err := json.Unmarshal(period.body, &nanos); err != nil || nanos != 11*time.Second {
		return took, fmt.Errorf("after the reload, the grace period is %.100s", period.body)
	}
	return took, nil
}
