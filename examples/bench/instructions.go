package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// countedRequests is the number of requests of a load whose instructions are counted.
const countedRequests = 1000

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
	var loads []load
	for _, l := range protocolLoads(h.sizes[:2]) {
		if l.conns == 1 && l.streams == 1 && h.options.loads.MatchString(l.String()) {
			loads = append(loads, l)
		}
	}
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
		progress.Printf("instructions of %s, %s", c.name, l)
		n, err := l.count(ctx, c, s)
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

// count returns the instructions of s for a response, after some that are not counted.
func (l load) count(ctx context.Context, c *contender, s *server) (instructions, error) {
	r, got, err := l.prepare(ctx, c, s)
	if err != nil {
		return instructions{}, err
	}
	client := l.protocol.client()
	defer closeClient(client)
	err = l.request(ctx, client, r, got, countedRequests/5)
	if err == nil {
		err = s.control(ctx, "zero")
	}
	if err == nil {
		err = l.request(ctx, client, r, got, countedRequests)
	}
	if err == nil {
		err = s.control(ctx, "dump")
	}
	if err != nil {
		return instructions{}, err
	}
	return s.readDump()
}

// request makes a request n times, and checks the responses.
func (l load) request(ctx context.Context, client *http.Client, r request, got answer, n int) error {
	for range n {
		if err := l.kind.send(ctx, client, r, got); err != nil {
			return err
		}
	}
	return nil
}

// readDump returns what callgrind has counted for a response, and removes its file.
func (s *server) readDump() (instructions, error) {
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
	return parseDump(file)
}

// parseDump reads a file in callgrind's format (https://valgrind.org/docs/manual/cl-format.html).
func parseDump(in io.Reader) (instructions, error) {
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
	return instructions{all: float64(all) / countedRequests, sum: float64(sum) / countedRequests}, nil
}

// printInstructions prints the instructions, and the ratios of those of the bare handler to those of the module: 1 means
// that the module needs as many.
func (r *results) printInstructions(out io.Writer) {
	fmt.Fprint(out, "\n**Instructions of a response, without those of the kernel and of garbage collections**\n\n"+
		"| load | module | bare handler | bare handler / module | SHA-256 in the module | bare handler / module, without SHA-256 |\n"+
		"|---|--:|--:|--:|--:|--:|\n")
	for _, ours := range r.instructions {
		for _, bare := range r.instructions {
			if ours.contender != module || bare.contender != bareHandler || bare.load.String() != ours.load.String() {
				continue
			}
			fmt.Fprintf(out, "| %s | %.0f | %.0f | %.3f |", ours.load, ours.all, bare.all, bare.all/ours.all)
			if ours.sum > 0 {
				fmt.Fprintf(out, " %.0f | %.3f", ours.sum, bare.all/(ours.all-ours.sum))
			} else {
				fmt.Fprint(out, " | ")
			}
			fmt.Fprintln(out, " |")
		}
	}
}
