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

// doubts returns what in the configuration is possible, but is probably not meant. It must be called before the defaults are
// filled in.
func (h *Handler) doubts() (doubts []string) {
	for _, short := range []struct {
		name         string
		value, least caddy.Duration
		effect       string
	}{
		{"timeout", h.Timeout, caddy.Duration(100 * time.Millisecond), "an upstream hardly answers in that time"},
		{"poll_interval", h.PollInterval, caddy.Duration(100 * time.Millisecond), "an upstream is asked that often for each unfinished report"},
		{"max_wait", h.MaxWait, caddy.Duration(time.Second), "callers wait for whole seconds"},
		{"health_interval", h.HealthInterval, caddy.Duration(time.Second), "each upstream is checked that often"},
	} {
		if short.value > 0 && short.value < short.least {
			doubts = append(doubts, fmt.Sprintf("%s is only %s: %s; perhaps %ds is meant",
				short.name, time.Duration(short.value), short.effect, time.Duration(short.value).Milliseconds()))
		}
	}
	doubts = append(doubts, doubtSize("max_report", h.MaxReport, smallestReport, "hardly a report is that small")...)
	if h.Cache != nil {
		doubts = append(doubts, doubtSize("max_size", h.Cache.MaxSize, smallestCache, "hardly a report is kept in memory")...)
		if h.Cache.AcceptUnencrypted {
			doubts = append(doubts, "accept_unencrypted is set: whoever can write to the storage can forge reports without a key; remove it when the retention has passed since encryption_key was set")
		}
	}
	if h.HealthTimeout > 0 && h.HealthInterval == 0 {
		doubts = append(doubts, "health_timeout is set, but nothing is checked without health_interval: set that as well; only the request of the admin API's /fsbroker/nodes has that timeout")
	}
	return doubts
}

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
