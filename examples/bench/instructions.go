package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// countedRequests returns the number of requests whose instructions are counted. A miss takes many times those of a hit.
func (l load) countedRequests() int {
	if l.kind != miss {
		return 1000
	}
	return 300 * small / len(l.size.document)
}

// instructionsResult is how many instructions a contender executes for a response, without those of the kernel.
type instructionsResult struct {
	load
	*contender
	instructions
}

// instructions are numbers of instructions.
type instructions struct {
	all float64
	sum float64 // in the inner function of SHA-256; 0 if the program has no names of functions
}

func (n instructions) sample() sample {
	all := sample{{"instructions", n.all}}
	if n.sum > 0 {
		all.add("instructions without SHA-256", n.all-n.sum)
	}
	return all
}

// countedContenders returns the contenders that are compared by their instructions, the module first.
func (h *harness) countedContenders() (all []*contender) {
	for _, on := range h.both() {
		all = append(all, on.module)
	}
	return append(all, bareHandler)
}

// countInstructions counts the instructions of the module and of the bare handler with valgrind's callgrind, so that other
// load on the machine hardly matters.
func (h *harness) countInstructions(ctx context.Context, _ []*contender, results *results) error {
	loads := h.countedLoads()
	if len(loads) == 0 {
		return nil
	}
	if !module.underCallgrind().installed() {
		progress.Print("valgrind is not installed, so instructions are not counted")
		return nil
	}
	h.caddyProtocols = withH2C
	defer func() { h.caddyProtocols = defaultProtocols }()
	for _, c := range h.countedContenders() {
		if err := h.countOf(ctx, c, loads, results); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	if h.before != nil {
		today, before := results.instructions[:len(loads)], results.instructions[len(loads):]
		for i, l := range loads {
			compare(results, "instructions, "+l.String(), today[i:i+1], before[i:i+1])
		}
	}
	return nil
}

// countedLoads returns the selected loads of one caller who makes one request at a time: those of the part protocols, and misses.
func (h *harness) countedLoads() []load {
	all := protocolLoads(h.sizes[:2])
	for _, size := range h.sizes[:3] {
		all = append(all, load{size: size, gzip: true, conns: 1, protocol: h1, streams: 1, kind: miss})
	}
	return slices.DeleteFunc(all, func(l load) bool {
		return l.conns != 1 || l.streams != 1 || !h.options.loads.MatchString(l.String())
	})
}

// countOf counts the instructions of c under each load. The module comes first, and its responses are recorded.
func (h *harness) countOf(ctx context.Context, c *contender, loads []load, results *results) error {
	s, err := c.underCallgrind().start(ctx, h)
	if err != nil {
		return err
	}
	defer s.process.stop()
	if c == module {
		if err := h.record(ctx, s); err != nil {
			return err
		}
	}
	if err := s.control(ctx, "instrumentation", "on"); err != nil {
		return err
	}
	for _, l := range loads {
		if !l.supportedBy(c) {
			continue
		}
		progress.Printf("instructions of %s, %s", c.name, l)
		n, err := h.count(ctx, l, c, s)
		if err != nil {
			return fmt.Errorf("%s: %w", l, err)
		}
		results.instructions = append(results.instructions, instructionsResult{l, c, n})
	}
	return nil
}

// underCallgrind returns c with its server run by callgrind, which must be told to count. GOMAXPROCS is 1, so that no idle
// thread spins while it looks for work. Garbage is not collected, because that takes many instructions at rare times. Go
// does not preempt goroutines, because callgrind cannot handle the signals for that.
func (c contender) underCallgrind() *contender {
	c.env = []string{"GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1"}
	c.command = func(config string, s *server) (string, []string) {
		return "valgrind", []string{
			"--tool=callgrind", "--callgrind-out-file=" + s.dump(), "--instr-atstart=no", "--dump-instr=no", "--collect-jumps=no",
			"--separate-threads=no", cmp.Or(c.program, os.Args[0]), "run", "--config", config,
		}
	}
	return &c
}

// dump returns what the names of callgrind's files begin with.
func (s *server) dump() string { return filepath.Join(s.Dir, "callgrind") }

// control gives a command to callgrind.
func (s *server) control(ctx context.Context, command ...string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	args := append([]string{"--pid=" + strconv.Itoa(s.process.cmd.Process.Pid)}, command...)
	out, err := exec.CommandContext(ctx, "vgdb", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("vgdb %v: %w\n%s", args, err, out)
	}
	return nil
}

// count returns the instructions of s for a response to a load, after some that are not counted.
func (h *harness) count(ctx context.Context, l load, c *contender, s *server) (instructions, error) {
	client := l.protocol.client()
	defer closeClient(client)
	request, err := h.countedRequest(ctx, l, c, s, client)
	if err != nil {
		return instructions{}, err
	}
	repeat := func(from, to int) (err error) {
		for i := from; i < to && err == nil; i++ {
			err = request(i)
		}
		return err
	}
	asked, n := h.node.requests.Load(), l.countedRequests()
	warm := n / 5
	err = repeat(0, warm)
	if err == nil {
		err = s.control(ctx, "zero")
	}
	if err == nil {
		err = repeat(warm, warm+n)
	}
	if err == nil {
		err = s.control(ctx, "dump")
	}
	if asked = h.node.requests.Load() - asked; err == nil && l.kind == miss && asked != int64(warm+n) {
		err = fmt.Errorf("the node received %d requests for %d reports", asked, warm+n)
	}
	if err != nil {
		return instructions{}, err
	}
	return s.readDump(n)
}

// countedRequest returns a function that makes the i-th request of a load, and checks the response.
func (h *harness) countedRequest(ctx context.Context, l load, c *contender, s *server, client *http.Client) (func(i int) error, error) {
	if l.kind != miss {
		r, got, err := l.prepare(ctx, c, s)
		return func(int) error { return l.kind.send(ctx, client, r, got) }, err
	}
	return func(i int) error {
		task := fmt.Sprintf("own-%s-counted%d", l.size.id(), i)
		got, err := request{method: http.MethodGet, url: l.urlOf(c, s, task), gzip: l.gzip}.send(ctx, client)
		if err == nil {
			err = got.check(h.node.document(task), l.gzip)
		}
		return err
	}, nil
}

// readDump returns what callgrind has counted for each of a number of responses, and removes its file.
func (s *server) readDump(responses int) (instructions, error) {
	names, err := filepath.Glob(s.dump() + ".*")
	if err == nil && len(names) != 1 {
		err = fmt.Errorf("callgrind has written %d files instead of 1", len(names))
	}
	if err != nil {
		return instructions{}, err
	}
	defer os.Remove(names[0])
	file, err := os.Open(names[0])
	if err != nil {
		return instructions{}, err
	}
	defer file.Close()
	return parseDump(file, responses)
}

// parseDump reads a file in callgrind's format (https://valgrind.org/docs/manual/cl-format.html).
func parseDump(in io.Reader, responses int) (instructions, error) {
	var all, sum uint64
	names := make(map[string]string) // of functions: a number stands for a name after its first use
	var function string
	var isCall bool // the next line is the cost of a call, which the called function has as well
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if isCall {
			isCall = false
			continue
		}
		switch name, value, _ := strings.Cut(lines.Text(), "="); name {
		case "fn", "cfn":
			number, text, isFirst := strings.Cut(value, " ")
			if isFirst {
				names[number] = text
			}
			if name == "fn" {
				function = names[number]
			}
			continue
		case "calls":
			isCall = true
			continue
		}
		fields := strings.Fields(lines.Text())
		if len(fields) != 2 {
			continue
		}
		cost, err := strconv.ParseUint(fields[1], 10, 64)
		switch {
		case err != nil:
		case fields[0] == "totals:":
			all = cost
		case strings.Contains(function, "sha256.block"):
			sum += cost
		}
	}
	if err := lines.Err(); err != nil {
		return instructions{}, err
	}
	if all == 0 {
		return instructions{}, errors.New("callgrind has counted nothing")
	}
	n := float64(responses)
	return instructions{all: float64(all) / n, sum: float64(sum) / n}, nil
}

// printInstructions prints the instructions, and the ratios of those of the bare handler to those of the module: 1 means
// that the module needs as many.
func (r *results) printInstructions(out io.Writer) {
	fmt.Fprint(out, "\n**Instructions of a response, without those of the kernel and of garbage collections**\n\n"+
		"| load | module | bare handler | bare handler / module | SHA-256 in the module | bare handler / module, without SHA-256 |\n"+
		"|---|--:|--:|--:|--:|--:|\n")
	for _, ours := range r.instructions {
		if ours.contender != module {
			continue
		}
		bare, sum := math.NaN(), math.NaN() // unless they are known
		for _, theirs := range r.instructions {
			if theirs.contender == bareHandler && theirs.load.String() == ours.load.String() {
				bare = theirs.all
			}
		}
		if ours.sum > 0 {
			sum = ours.sum
		}
		fmt.Fprintf(out, "| %s | %.0f | %s | %s | %s | %s |\n", ours.load, ours.all, significant(bare), inThousandths(bare/ours.all),
			significant(sum), inThousandths(bare/(ours.all-sum)))
	}
}
