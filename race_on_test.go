//go:build race

package fsbroker

// raceDetector reports whether the race detector is on, which makes allocations larger.
const raceDetector = true
