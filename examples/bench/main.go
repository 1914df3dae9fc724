// Command bench measures the module beside its peers, on one machine and in one run: rounds in which each in turn is put
// under the same load. It prints tables in Markdown.
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

	_ "github.com/caddyserver/cache-handler"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-fsbroker/caddy-fsbroker"
)

// beCaddy is the environment variable that makes this program a Caddy with the module, its peers among Caddy's modules
// and the bare handler.
const beCaddy = "FSBROKER_BENCH_BE_CADDY"

// progress is for the console. Caddy has the log package write to its own log.
var progress = log.New(os.Stderr, "", log.Ltime)

func main() {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	var o options
	flag.IntVar(&o.seconds, "seconds", 1, "how long each is under load in a round")
	flag.IntVar(&o.rounds, "rounds", 5, "how many rounds there are for each load")
	flag.IntVar(&o.kept, "kept", 2000, "for how many reports memory is measured")
	flag.IntVar(&o.serverCPUs, "server-cpus", runtime.NumCPU()/2, "how many CPUs the servers have to themselves, while load and node have the rest; 0 for all sharing all")
	peers := flag.String("peers", ".", "a regular expression for the names of those who take part; the module always does")
	loads := flag.String("loads", ".", "a regular expression for the names of the loads, such as '^HTTPS, gzip'")
	flag.StringVar(&o.reports, "reports", filepath.Join("..", "..", "..", "shared", "reports"),
		"a folder of real reports; where one is missing, one of its shape is made")
	flag.Parse()
	var err error
	if o.peers, err = regexp.Compile(*peers); err != nil {
		progress.Fatalf("-peers: %v", err)
	}
	if o.loads, err = regexp.Compile(*loads); err != nil {
		progress.Fatalf("-loads: %v", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o, os.Stdout); err != nil {
		progress.Fatal(err)
	}
}

// options are what a run does.
type options struct {
	seconds    int
	rounds     int
	kept       int
	serverCPUs int
	peers      *regexp.Regexp
	loads      *regexp.Regexp
	reports    string
}

// takesPart tells whether a contender is wanted.
func (o options) takesPart(c *contender) bool {
	return c == module || o.peers.MatchString(c.name)
}

func (o options) String() string {
	whose := "all on all of them"
	if o.serverCPUs > 0 {
		whose = fmt.Sprintf("%d of them the servers' own", o.serverCPUs)
	}
	return fmt.Sprintf("%d cores, %s, %d rounds of %d s", runtime.NumCPU(), whose, o.rounds, o.seconds)
}
