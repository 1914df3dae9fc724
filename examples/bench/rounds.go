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
