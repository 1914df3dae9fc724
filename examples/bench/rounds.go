package main

import (
	"context"
	"fmt"
)

// inRounds measures each trial once in each round, and returns the rounds of each trial. In a round, the trials come in turn,
// so that other activity on the machine affects all of them.
func inRounds[T fmt.Stringer, R any](ctx context.Context, part string, count int, trials []T, measure func(context.Context, T) (R, error)) ([][]R, error) {
	rounds := make([][]R, len(trials))
	for round := range count {
		for i, t := range trials {
			progress.Printf("%s, %s, round %d of %d", part, t, round+1, count)
			r, err := measure(ctx, t)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", part, t, err)
			}
			rounds[i] = append(rounds[i], r)
		}
	}
	return rounds, nil
}

// ofBoth is inRounds for trials of the module alone. The module before has its turn right after that of today. It returns the
// rounds of today, and compares them.
func ofBoth[T fmt.Stringer, R sampled](ctx context.Context, h *harness, into *results, part string, count int, trials []T, measure func(*harness, context.Context, T) (R, error)) ([][]R, error) {
	pairs, err := inRounds(ctx, part, count, trials, func(ctx context.Context, t T) (pair []R, err error) {
		for _, on := range h.both() {
			r, err := measure(on, ctx, t)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", on.module.name, err)
			}
			pair = append(pair, r)
		}
		return pair, nil
	})
	if err != nil {
		return nil, err
	}
	all := make([][]R, len(trials))
	for i, t := range trials {
		var before []R
		for _, pair := range pairs[i] {
			all[i], before = append(all[i], pair[0]), append(before, pair[1:]...)
		}
		if h.before != nil {
			compare(into, part+", "+t.String(), all[i], before)
		}
	}
	return all, nil
}
