package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// addBefore builds the benchmark of a commit of a repository, so that the module before takes part. Its harness has
// storages of its own, because their layout may differ.
func (h *harness) addBefore(ctx context.Context, repository, commit string) error {
	progress.Printf("building %s", commit)
	before := *h
	before.dir, before.values, before.kept = filepath.Join(h.dir, "before"), filepath.Join(h.values, "before"), make(map[string]bool)
	if err := errors.Join(os.Mkdir(before.dir, 0o700), os.Mkdir(before.values, 0o700)); err != nil {
		return err
	}
	program := filepath.Join(before.dir, "bench")
	var err error
	if before.commit, err = build(ctx, repository, commit, program); err != nil {
		return fmt.Errorf("building %s: %w", commit, err)
	}
	before.module = module.before(program)
	h.before = &before
	return nil
}

// both returns the harness, and that of the module before if it takes part.
func (h *harness) both() []*harness {
	if h.before == nil {
		return []*harness{h}
	}
	return []*harness{h, h.before}
}

// build builds the benchmark of a commit of a repository. It returns the hash, the date and the subject of the commit.
func build(ctx context.Context, repository, commit, program string) (description string, err error) {
	description, err = output(ctx, repository, "git", "log", "-1", "--format=%h of %cs, %s", "--end-of-options", commit, "--")
	if err != nil {
		return "", err
	}
	hash, _, _ := strings.Cut(description, " ")
	parent, err := os.MkdirTemp("", "fsbroker-bench-source-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(parent)
	source := filepath.Join(parent, hash)
	if _, err := output(ctx, repository, "git", "worktree", "add", "--detach", source, hash); err != nil {
		return "", err
	}
	defer func() {
		_, removeErr := output(context.WithoutCancel(ctx), repository, "git", "worktree", "remove", "--force", source)
		err = errors.Join(err, removeErr)
	}()
	_, err = output(ctx, filepath.Join(source, "examples", "bench"), "go", "build", "-buildvcs=false", "-o", program, ".")
	return description, err
}

// output runs a command in a folder, and returns what it prints. The error has what it prints about its failure.
func output(ctx context.Context, folder, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = folder
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // git tidies up
	var failure strings.Builder
	cmd.Stderr = &failure
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, args[0], err, failure.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// comparison is a quantity of the module of today and of the one before. Each is the median of the rounds, and so is the
// ratio.
type comparison struct {
	of, quantity         string
	today, before, ratio float64 // the ratio is before / today
}

// sampled is a result that has quantities.
type sampled interface{ sample() sample }

// compare compares the rounds of the module of today with those of the one before.
func compare[R sampled](into *results, of string, today, before []R) {
	for _, q := range today[0].sample() {
		value := func(r R) float64 { return r.sample().value(q.name) }
		ratios := make([]float64, len(today))
		for k := range today {
			ratios[k] = value(before[k]) / value(today[k])
		}
		into.comparisons = append(into.comparisons, comparison{
			of: of, quantity: q.name, today: median(today, value), before: median(before, value),
			ratio: median(ratios, func(r float64) float64 { return r }),
		})
	}
}

// contended is a result of a contender.
type contended interface {
	fmt.Stringer
	sampled
	by() *contender
}

// compareContenders compares the rounds of the trials of the module of today with those of the one before, each of which
// comes right after them.
func compareContenders[R contended](into *results, part string, trials [][]R) {
	for i, before := range trials {
		if before[0].by().isBefore() {
			today := trials[i-1]
			compare(into, part+", "+today[0].String(), today, before)
		}
	}
}

// once returns trials, each with its result as the only round.
func once[R any](all []R) (trials [][]R) {
	for _, r := range all {
		trials = append(trials, []R{r})
	}
	return trials
}

// printComparisons prints how the module before compares with that of today.
func (r *results) printComparisons(out io.Writer) {
	fmt.Fprint(out, "\n**The module before, compared with that of today**\n\n| part and load | measure | today | before | before / today |\n|---|---|--:|--:|--:|\n")
	for _, c := range r.comparisons {
		fmt.Fprintf(out, "| %s | %s | %s | %s | %s |\n", c.of, c.quantity, significant(c.today), significant(c.before), inThousandths(c.ratio))
	}
}
