package fsbroker

import (
	"net/http"
	"testing"
)

func TestMatchesETag(t *testing.T) {
	const etag = `"a,b"`
	for name, test := range map[string]struct {
		lines        []string
		weak, strong bool
	}{
		"the same":                {[]string{`"a,b"`}, true, true},
		"weak":                    {[]string{`W/"a,b"`}, true, false},
		"any":                     {[]string{`*`}, true, true},
		"any, amid space":         {[]string{" * "}, true, true},
		"any, in a list":          {[]string{`"x", *`}, false, false},
		"any, beside a line":      {[]string{`"x"`, "*"}, false, false},
		"in a list":               {[]string{`"x", W/"y" ,"a,b"`}, true, true},
		"in a second line":        {[]string{`"x"`, `"a,b"`}, true, true},
		"amid empty members":      {[]string{`,, "a,b",`}, true, true},
		"a part of it":            {[]string{`"a"`}, false, false},
		"without quotes":          {[]string{`a,b`}, false, false},
		"one quote":               {[]string{`"a,b`}, false, false},
		"after a malformed one":   {[]string{`x"y, "a,b"`}, true, true},
		"a lower case weak":       {[]string{`w/"a,b"`}, false, false},
		"nothing":                 {nil, false, false},
		"empty":                   {[]string{""}, false, false},
		"nothing but the weakest": {[]string{"W/"}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			if weak, strong := matchesETag(test.lines, etag, true), matchesETag(test.lines, etag, false); weak != test.weak || strong != test.strong {
				t.Errorf("weak %v, strong %v", weak, strong)
			}
		})
	}
}

func FuzzMatchesETag(f *testing.F) {
	f.Add(`"a", W/"b", *`)
	f.Fuzz(func(_ *testing.T, line string) { matchesETag([]string{line, line}, `"x"`, true) })
}

func TestPrefersGzip(t *testing.T) {
	for accept, want := range map[string]bool{
		"gzip": true, "GZIP": true, "x-gzip": true, "br, gzip;q=0.5": true, "*": true, "deflate,gzip": true,
		"gzip;q=1, identity;q=0.5": true, "gzip;q=0.5, identity;q=0.5": true, "gzip, *;q=0": true, "identity;q=0, *": true,
		"": false, "identity": false, "gzip;q=0": false, "gzip; q=0.0, *": false, "*;q=0": false, "br": false,
		"gzip;q=0.1, identity;q=1": false, "identity, gzip;q=0.9": false, "gzip;q=x": false, "gzip;q=-1": false, "gzip;q=NaN": false,
		"gzip;q=2": false, "*;q=0.5, identity": false,
	} {
		if got := prefersGzip(http.Header{"Accept-Encoding": {accept}}); got != want {
			t.Errorf("%q: %v", accept, got)
		}
	}
}

func TestCacheDirectives(t *testing.T) {
	for value, want := range map[string][2]bool{
		"no-cache": {true, false}, "No-Cache, max-age=0": {true, false}, "only-if-cached": {false, true},
		"max-stale=3 , ONLY-IF-CACHED": {false, true}, "no-cache, only-if-cached": {true, true},
		"": {false, false}, "max-age=0": {false, false}, "no-cache=1": {false, false}, "x-no-cache": {false, false},
	} {
		if noCache, onlyIfCached := cacheDirectives(http.Header{"Cache-Control": {value}}); noCache != want[0] || onlyIfCached != want[1] {
			t.Errorf("%q: %v, %v", value, noCache, onlyIfCached)
		}
	}
}
