//go:build race

package fsbroker

// raceDetector is on: allocations are larger than they are without it.
const raceDetector = true
