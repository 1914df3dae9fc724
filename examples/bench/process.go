package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a running server, including its child processes.
type process struct {
	cmd       *exec.Cmd
	log       string
	began     time.Time     // when it was started
	listening time.Duration // how long it took until it listened
}

// reserveCPUs keeps this process and its child processes off the first serverCPUs CPUs, which are for the servers.
func reserveCPUs(ctx context.Context, serverCPUs int) error {
	if serverCPUs == 0 {
		return nil
	}
	rest := fmt.Sprintf("%d-%d", serverCPUs, runtime.NumCPU()-1)
	if out, err := exec.CommandContext(ctx, "taskset", "--all-tasks", "--cpu-list", "--pid", rest, strconv.Itoa(os.Getpid())).CombinedOutput(); err != nil {
		return fmt.Errorf("reserving CPUs for the servers (use -server-cpus 0 to share all CPUs): %w\n%s", err, out)
	}
	return nil
}

// onServerCPUs returns a command that runs name on the CPUs for the servers.
func onServerCPUs(serverCPUs int, name string, args []string) (string, []string) {
	if serverCPUs == 0 {
		return name, args
	}
	return "taskset", append([]string{"--cpu-list", fmt.Sprintf("0-%d", serverCPUs-1), name}, args...)
}

// maxStart is how long a process may take until it listens.
const maxStart = time.Minute

// startProcess starts a command and waits until it listens on address.
func startProcess(ctx context.Context, folder, address string, env []string, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, name, args...), log: filepath.Join(folder, "log")} //nolint:gosec // it is a contender
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd.Dir, p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = folder, append(os.Environ(), env...), log, log
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = 10 * time.Second
	p.began = time.Now()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: time.Second}
	for time.Since(p.began) < maxStart {
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err == nil {
			p.listening = time.Since(p.began)
			return p, conn.Close()
		}
		time.Sleep(2 * time.Millisecond)
	}
	p.stop()
	text, _ := os.ReadFile(p.log)
	return nil, fmt.Errorf("%s does not listen on %s:\n%s", name, address, text)
}

func (p *process) stop() {
	_ = p.cmd.Cancel()
	_ = p.cmd.Wait()
}

// processTree returns the IDs of the process and its descendants.
func (p *process) processTree() []int {
	parents := make(map[int][]int)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if fields := stat(pid); fields != nil {
			parent, _ := strconv.Atoi(fields[1])
			parents[parent] = append(parents[parent], pid)
		}
	}
	pids := []int{p.cmd.Process.Pid}
	for i := 0; i < len(pids); i++ {
		pids = append(pids, parents[pids[i]]...)
	}
	return pids
}

// stat returns the fields of /proc/<pid>/stat that follow the name, beginning with the state (see proc(5)).
func stat(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return strings.Fields(rest)
}

// ticks is the number of clock ticks per second on all Linux platforms that Go supports.
const ticks = 100

// cpu returns the CPU time of the process and its descendants.
func (p *process) cpu() time.Duration {
	var sum int
	for _, pid := range p.processTree() {
		if fields := stat(pid); len(fields) > 12 {
			user, _ := strconv.Atoi(fields[11])
			system, _ := strconv.Atoi(fields[12])
			sum += user + system
		}
	}
	return time.Duration(sum) * time.Second / ticks
}

// ownCPU returns the CPU time of this process.
func ownCPU() time.Duration {
	var usage syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &usage) // it cannot fail with these arguments
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// memory sums a line of /proc/<pid>/status, such as VmRSS, over the process and its descendants, in bytes.
func (p *process) memory(line string) int64 {
	var sum int64
	for _, pid := range p.processTree() {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		for l := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(l, line+":"); ok {
				kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
				sum += kib << 10
			}
		}
	}
	return sum
}

// resetPeak resets VmHWM (see clear_refs in proc(5)).
func (p *process) resetPeak() error {
	for _, pid := range p.processTree() {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
			return err
		}
	}
	return nil
}

// findAddresses sets loopback addresses on which no process listens. They differ, because all are taken for a moment.
func findAddresses(ctx context.Context, addresses ...*string) error {
	for _, address := range addresses {
		listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer listener.Close()
		*address = listener.Addr().String()
	}
	return nil
}
