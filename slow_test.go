package fsbroker

import (
	"flag"
	"testing"
)

var slowTests = flag.Bool("slow", false, "also run the tests that take long")

// Slow reports whether the tests that take long are wanted.
func Slow() bool { return *slowTests }

// SkipUnlessSlow skips a test that takes long, unless those are wanted.
func SkipUnlessSlow(t *testing.T) {
	t.Helper()
	if !Slow() {
		t.Skip("it takes long: to run it, set -slow")
	}
}

// SkipIfShort skips a test that -short leaves out.
func SkipIfShort(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short leaves it out")
	}
}
