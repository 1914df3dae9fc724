// Command bench compares the module with other servers, on one machine and in one run, and measures what the module costs.
// It prints tables in Markdown.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	_ "github.com/caddyserver/cache-handler"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
)

// beCaddy is the environment variable that makes this program run as Caddy, with the module, the Caddy modules that it
// is compared with, and the bare handlers.
const beCaddy = "FSBROKER_BENCH_BE_CADDY"

// progress logs to the console. Caddy redirects the standard logger to its own log.
var progress = log.New(os.Stderr, "", log.Ltime)

func main() {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	var o options
	flag.IntVar(&o.seconds, "seconds", 1, "duration of a load in a round, in seconds")
	flag.IntVar(&o.rounds, "rounds", 5, "number of rounds for each load")
	flag.IntVar(&o.kept, "kept", 2000, "number of cached reports for which memory is measured")
	flag.IntVar(&o.serverCPUs, "server-cpus", runtime.NumCPU()/2, "number of CPUs that are reserved for the servers; the clients and the node use the others. With 0, all share all CPUs")
	peers := flag.String("peers", ".", "regular expression for the names of the servers to compare with the module")
	loads := flag.String("loads", ".", "regular expression for the names of the loads, such as '^HTTPS, gzip'")
	parts := flag.String("parts", ".", "regular expression for what to measure: load, unauthorized, memory, cold, miss, misses, polls, compression, collections, waiting, protocols, http3, instructions, "+
		"storage hits, storage writes, storage stop, storage purge, storage sweep, storage heap, restart, "+
		"growth nodes, growth sites, growth stored, growth harvest")
	flag.StringVar(&o.before, "before", "", "commit of this repository whose module is measured as well, in each part with a server, in the same rounds")
	delays := flag.String("delays", "0s,5ms,20ms", "how long each operation of the storage takes at least")
	flag.IntVar(&o.stored, "stored", 10_000, "number of reports in the storage")
	flag.IntVar(&o.through, "through", 1_000_000, "number of reports that go through while memory is measured")
	flag.IntVar(&o.misses, "misses", 5000, "number of misses in a round, each of another report; fewer if the report is large")
	flag.IntVar(&o.pollers, "pollers", 1000, "number of callers that poll, each for another unfinished report")
	flag.DurationVar(&o.polling, "polling", 6*time.Second, "how long they poll in a round")
	flag.IntVar(&o.many, "many", 1_000_000, "number of small reports that are kept while collections are measured")
	flag.IntVar(&o.grownNodes, "grown-nodes", 1000, "largest number of nodes in the part 'growth nodes'. The others are the powers of ten below it")
	flag.IntVar(&o.sites, "sites", 100, "largest number of sites in the part 'growth sites'")
	flag.IntVar(&o.grown, "grown", 1_000_000, "largest number of small reports in the storage in the part 'growth stored'. A million need about 10 GB")
	flag.IntVar(&o.pending, "pending", 10_000, "largest number of pending submissions in the part 'growth harvest'")
	flag.IntVar(&o.quiet, "quiet", 30, "how long a server without requests is measured in the parts 'growth', in seconds")
	flag.IntVar(&o.waiters, "waiters", 100_000, "number of callers that wait for one report; a tenth of it wait for one each")
	flag.DurationVar(&o.poll, "poll-interval", 2*time.Second, "poll interval of the module while callers wait")
	flag.StringVar(&o.reports, "reports", filepath.Join("..", "..", "..", "shared", "reports"),
		"folder of real reports; if one is missing, a similar one is generated")
	flag.Parse()
	var err error
	if o.delays, err = parseDelays(*delays); err != nil {
		progress.Fatalf("-delays: %v", err)
	}
	if o.peers, err = regexp.Compile(*peers); err != nil {
		progress.Fatalf("-peers: %v", err)
	}
	if o.loads, err = regexp.Compile(*loads); err != nil {
		progress.Fatalf("-loads: %v", err)
	}
	if o.parts, err = regexp.Compile(*parts); err != nil {
		progress.Fatalf("-parts: %v", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, os.Stdout); err != nil {
		progress.Fatal(err)
	}
}

// parseDelays parses durations between commas.
func parseDelays(text string) (delays []time.Duration, err error) {
	for field := range strings.SplitSeq(text, ",") {
		delay, err := time.ParseDuration(field)
		if err != nil {
			return nil, err
		}
		delays = append(delays, delay)
	}
	return delays, nil
}

// options are the settings of a run.
type options struct {
	seconds    int
	rounds     int
	kept       int
	delays     []time.Duration
	stored     int
	through    int
	many       int
	misses     int
	pollers    int
	polling    time.Duration
	grownNodes int
	sites      int
	grown      int
	pending    int
	quiet      int
	waiters    int
	poll       time.Duration
	serverCPUs int
	peers      *regexp.Regexp
	loads      *regexp.Regexp
	before     string
	parts      *regexp.Regexp
	reports    string
}

// includes reports whether c is selected.
func (o options) includes(c *contender) bool {
	return c == module || o.peers.MatchString(c.name)
}

func (o options) String() string {
	whose := "shared by all processes"
	if o.serverCPUs > 0 {
		whose = fmt.Sprintf("%d of them reserved for the servers", o.serverCPUs)
	}
	return fmt.Sprintf("%d cores, %s, %d rounds of %d s", runtime.NumCPU(), whose, o.rounds, o.seconds)
}
