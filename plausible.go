package fsbroker

import (
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2"
)

// leastDuration is the least value of an option that is a duration. It refuses a number in JSON that is meant in seconds or
// milliseconds: Caddy takes it for nanoseconds.
const leastDuration = time.Millisecond

// checkDuration checks a duration. 0 means that there is none.
func checkDuration(name string, d caddy.Duration) error {
	if d <= 0 || time.Duration(d) >= leastDuration {
		return checkSign(name, d)
	}
	meant := fmt.Sprintf("%ds", d)
	if d >= 1000 {
		meant = fmt.Sprintf("%dms", d)
	}
	return fmt.Errorf("%s is only %s: in JSON, a number is in nanoseconds; write a string with the unit, such as %q", name, time.Duration(d), meant)
}

func checkSign[T ~int64](name string, value T) error {
	if value < 0 {
		return fmt.Errorf("%s must be more than 0 (or left out, for its default)", name)
	}
	return nil
}

// maxUnitless is below which a size in a Caddyfile must have a unit: so few bytes are hardly meant.
const maxUnitless = 64 << 10

const (
	smallestCache  = 1 << 20
	smallestReport = 64 << 10
)

// doubtSize doubts a size that is too small to be useful.
func doubtSize(name string, size, least int64, effect string) []string {
	if size <= 0 || size >= least {
		return nil
	}
	return []string{fmt.Sprintf("%s is only %s: %s; perhaps %d MiB is meant: %dMiB in a Caddyfile, %d in JSON",
		name, humanize.IBytes(uint64(size)), effect, size, size, size<<20)}
}

// doubtMatcher doubts a matcher that leaves the path open, so the handler responds to what other handlers should. It
// returns an empty string if there is no doubt.
func doubtMatcher(matchers caddy.ModuleMap) string {
	for name, value := range matchers {
		switch name {
		case "path", "path_regexp", "vars", "vars_regexp", "file": // vars may have the path
			return ""
		case "expression":
			if strings.Contains(string(value), "path") {
				return ""
			}
		}
	}
	return "the matcher of fsbroker_task has no path, so it answers every request that matches, whatever its path: add `path /task` to the matcher, unless it is in a handle or route with a path"
}
