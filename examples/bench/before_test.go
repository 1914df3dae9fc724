package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// git runs git in a folder, and returns what it prints. Without git, or outside of a repository, the test is skipped.
func git(t *testing.T, folder string, args ...string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("building a commit takes long")
	}
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("git is not installed")
	}
	out, err := output(t.Context(), folder, "git", args...)
	if err != nil {
		t.Skip(err)
	}
	return out
}

// TestBefore measures the last commit in parts that differ in how its module takes its turn: as a contender, with a storage of
// its own, beside the bare handler, and while a number grows.
func TestBefore(t *testing.T) {
	head := git(t, ".", "rev-parse", "--short", "HEAD")
	o := options{
		rounds: 2, stored: 10, delays: []time.Duration{0}, waiters: 10, poll: 100 * time.Millisecond, pending: 1,
		peers: regexp.MustCompile("^bare"), reports: filepath.Join("..", "..", "..", "shared", "reports"),
	}
	h, err := newHarness(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	if err := h.addBefore(t.Context(), ".", "HEAD"); err != nil {
		t.Fatal(err)
	}
	checkPrograms(t, h)

	var all results
	chosen := regexp.MustCompile("^(cold|restart|storage stop|waiting|growth harvest)$")
	for _, p := range h.parts() {
		if !chosen.MatchString(p.name) {
			continue
		}
		if err := p.run(t.Context(), h.participants(), &all); err != nil {
			t.Fatalf("%s: %v", p.name, err)
		}
	}
	for _, c := range all.comparisons {
		if strings.HasSuffix(c.quantity, "reports/s") && (c.today <= 0 || c.before <= 0 || c.ratio <= 0) {
			t.Errorf("%s, %s: %+v", c.of, c.quantity, c)
		}
	}
	if rounds := all.restarts[1]; rounds[0].contender.name != "fsbroker_task, before" || len(rounds) != 2 {
		t.Errorf("after the module, %s has %d rounds", rounds[0].contender.name, len(rounds))
	}
	var out strings.Builder
	all.print(t.Context(), &out, h)
	for _, want := range []string{
		"\nfsbroker_task, before: " + head + " of ",
		"\n| fsbroker_task, before | 200 | 1 | 0 |",
		"\n| cold, fsbroker_task, 200 callers | requests to the node | 1.00 | 1.00 | 1.000 |",
		"\n| memory | HTTP, gzip, 15 KB, 32 conn. | fsbroker_task, before |",
		"\n| restart, fsbroker_task, disk, HTTP, identity, 41 KB, 32 conn. | from the storage: reports/s |",
		"\n| storage stop, 0s | time, ms |",
		"\n| waiting, fsbroker_task, 10 callers wait for 1 reports, HTTP/2 | heap per caller, bytes |",
		"\n| Growth: pending submissions, storage file_system, 1, harvest | heap, MiB |",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	t.Log(out.String())
}

// checkPrograms checks which programs the servers are.
func checkPrograms(t *testing.T, h *harness) {
	t.Helper()
	this, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		*contender
		on   *harness
		want string
	}{
		{module, h, this},
		{h.before.module, h, h.before.module.program},
		{module, h.before, h.before.module.program},
		{withStorage(0, ""), h, this},
		{withStorage(0, ""), h.before, h.before.module.program},
	} {
		s, err := test.start(t.Context(), test.on)
		if err != nil {
			t.Fatal(err)
		}
		program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.process.cmd.Process.Pid))
		s.process.stop()
		if err != nil || program != test.want {
			t.Errorf("%s is run by %s instead of %s, error %v", test.name, program, test.want, err)
		}
	}
}

// TestBuild builds commits of a small repository: one that can be built, and others that cannot. Nothing may be left behind.
func TestBuild(t *testing.T) {
	for _, variable := range []string{"GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"} {
		t.Setenv(variable, os.DevNull)
	}
	repository := t.TempDir()
	git(t, repository, "init", "--quiet")
	commit := func(subject, main string) string {
		t.Helper()
		for name, text := range map[string]string{"README": subject, "examples/bench/go.mod": "module bench\n", "examples/bench/main.go": main} {
			if text == "" {
				continue
			}
			name = filepath.Join(repository, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if main == "" {
			if err := os.RemoveAll(filepath.Join(repository, "examples")); err != nil {
				t.Fatal(err)
			}
		}
		git(t, repository, "add", "--all")
		git(t, repository, "-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "--quiet", "-m", subject)
		return git(t, repository, "rev-parse", "HEAD")
	}
	none := commit("Begin without a benchmark", "")
	good := commit("Print something", "package main\n\nfunc main() { print(1) }\n")
	bad := commit("Use what is not there", "package main\n\nfunc main() { isMissing() }\n")

	program := filepath.Join(t.TempDir(), "bench")
	if got, err := build(t.Context(), repository, good, program); err != nil || !strings.HasSuffix(got, ", Print something") {
		t.Errorf("%q, error %v", got, err)
	}
	if out, err := exec.Command(program).CombinedOutput(); err != nil || string(out) != "1" {
		t.Errorf("the program prints %q, error %v", out, err)
	}
	for _, test := range []struct{ commit, want string }{
		{"no-such-commit", "bad revision 'no-such-commit'"},
		{"--output=file", "bad revision '--output=file'"},
		{none, filepath.Join("examples", "bench") + ": no such file or directory"},
		{bad, "undefined: isMissing"},
	} {
		if _, err := build(t.Context(), repository, test.commit, program); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %q is missing in the error %v", test.commit, test.want, err)
		}
	}
	lines := strings.Split(git(t, repository, "worktree", "list", "--porcelain"), "\n")
	lines = slices.DeleteFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "worktree ") })
	if len(lines) != 1 || isThere(filepath.Join(repository, "file")) {
		t.Errorf("the repository still has %q", lines)
	}
}

// TestCompare compares rounds in which the module before took twice as much, but in one.
func TestCompare(t *testing.T) {
	of := func(values ...float64) (rounds []sample) {
		for _, v := range values {
			rounds = append(rounds, sample{{"time", v}})
		}
		return rounds
	}
	var all results
	compare(&all, "load", of(10, 30, 20), of(20, 31, 40))
	if want := []comparison{{of: "load", quantity: "time", today: 20, before: 31, ratio: 2}}; !slices.Equal(all.comparisons, want) {
		t.Errorf("%+v", all.comparisons)
	}
	var out strings.Builder
	compare(&all, "load", of(0), of(0))
	all.printComparisons(&out)
	for _, want := range []string{"\n| load | time | 20.0 | 31.0 | 2.000 |\n", "\n| load | time | 0.00 | 0.00 |  |\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in %s", want, out.String())
		}
	}
}
