//go:build !race

package fsbroker

const raceDetector = false
