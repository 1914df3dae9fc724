package task

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func shortened(t testing.TB, text string, oneByte bool) string {
	t.Helper()
	var src io.Reader = strings.NewReader(text)
	if oneByte {
		src = iotest.OneByteReader(src)
	}
	short, err := io.ReadAll(&shortener{src: src})
	if err != nil {
		t.Fatal(err)
	}
	return string(short)
}

func TestShortener(t *testing.T) {
	long := strings.Repeat("x", 10*maxToken)
	escapes := strings.Repeat(`\n\u00e4\"`, maxToken)
	for name, test := range map[string]struct {
		text   string
		longer bool // than what is left of it
		valid  bool
	}{
		"nothing long":                {`{"a":[1,2.5e3,true,null,"b\n\u0041"]}`, false, true},
		"a long string":               {`{"a":"` + long + `","b":1}`, true, true},
		"a long name":                 {`{"` + long + `":1}`, true, true},
		"long escapes":                {`["` + escapes + `"]`, true, true},
		"a long number":               {`[` + strings.Repeat("7", 10*maxToken) + `]`, true, true},
		"a long fraction":             {`[0.` + strings.Repeat("7", 10*maxToken) + `e-12]`, true, true},
		"as long as it may be":        {`[` + strings.Repeat("7", maxToken) + `,"` + long[:maxToken] + `"]`, false, true},
		"a digit too much":            {`[` + strings.Repeat("7", maxToken+1) + `]`, true, true},
		"long white space":            {`[` + strings.Repeat(" \n\t\r", 10*maxToken) + `12345]`, true, true},
		"digits after white space":    {`[` + strings.Repeat(" ", 2*maxToken) + strings.Repeat("1", maxToken) + `]`, true, true},
		"the end of a string in it":   {`["` + long + `\\"]`, true, true},
		"a bad escape, far in":        {`["` + long + `\x"]`, true, false},
		"a bad \\u, far in":           {`["` + long + `\u00g0"]`, true, false},
		"a control character, far in": {`["` + long + "\x01" + `"]`, true, false},
		"unterminated":                {`["` + long, true, false},
		"unterminated escape":         {`["` + long + `\`, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			short := shortened(t, test.text, false)
			if json.Valid([]byte(test.text)) != test.valid || json.Valid([]byte(short)) != test.valid {
				t.Errorf("valid: %v, shortened %v, want %v", json.Valid([]byte(test.text)), json.Valid([]byte(short)), test.valid)
			}
			if (len(short) < len(test.text)) != test.longer || len(short) > 4*maxToken {
				t.Errorf("%d bytes became %d", len(test.text), len(short))
			}
			if again := shortened(t, test.text, true); again != short {
				t.Errorf("byte by byte it became %.100q instead of %.100q", again, short)
			}
		})
	}
}

// What is a hexadecimal digit in an escape is one as well where the string is left out.
func TestShortenerHexDigits(t *testing.T) {
	for c := ' '; c <= '~'; c++ {
		text := `["` + strings.Repeat("x", 2*maxToken) + `\u00` + string(c) + `0"]`
		if short := shortened(t, text, false); json.Valid([]byte(short)) != json.Valid([]byte(text)) {
			t.Errorf("%q: valid %v", c, json.Valid([]byte(short)))
		}
	}
}

// An error says where it is, unless something before it was left out.
func TestPlaceOfAnError(t *testing.T) {
	for text, want := range map[string]string{
		`"short"`: "it is not JSON, or it is incomplete (byte 12)",
		`"` + strings.Repeat("x", maxToken) + `"`:             fmt.Sprintf("it is not JSON, or it is incomplete (byte %d)", maxToken+7),
		`"` + strings.Repeat("x", maxToken+1) + `"`:           "it is not JSON, or it is incomplete",
		strings.Repeat("1", maxToken+1):                       "it is not JSON, or it is incomplete",
		`["` + strings.Repeat("x", maxToken+1) + `","short"]`: "it is not JSON, or it is incomplete",
	} {
		if _, err := judge(&shortener{src: strings.NewReader(`{"a":` + text + `!`)}); err == nil || err.Error() != want {
			t.Errorf("after %d bytes: error %v, want %s", len(text), err, want)
		}
	}
}

// What is left says the same, as far as anybody looks, and so does a document that is parsed in place.
func FuzzShortener(f *testing.F) {
	f.Add(`{"result":{"taskReference":{"state":"SUCCESS"}}}`)
	f.Add(`{"result":{"taskReference":{"state":"` + strings.Repeat("A", maxToken+1) + `"}}}`)
	f.Add(`{"result":{"taskReference":{"additionalInfo":{"digests":{"SHA-256":"` + strings.Repeat("0a", 32) + `"}}}}}`)
	f.Add(`[0.` + strings.Repeat("7", 2*maxToken) + `E+1, "\ud800"]`)
	f.Fuzz(func(t *testing.T, text string) {
		short := shortened(t, text, false)
		if json.Valid([]byte(text)) != json.Valid([]byte(short)) {
			t.Errorf("%q became %q", text, short)
		}
		j, err := judge(strings.NewReader(text))
		jToo, errToo := judge(&shortener{src: strings.NewReader(text)})
		if j != jToo || (err == nil) != (errToo == nil) {
			t.Errorf("%q: %+v, %v; shortened %+v, %v", text, j, err, jToo, errToo)
		}
		if inPlace, errToo := judge(bytes.NewBufferString(text)); j != inPlace || (err == nil) != (errToo == nil) {
			t.Errorf("%q: %+v, %v; in place %+v, %v", text, j, err, inPlace, errToo)
		}
	})
}

// However large its strings are, a document is read in the same memory.
func TestLongStringsTakeNoMemory(t *testing.T) {
	const size = 64 << 20
	document := io.MultiReader(
		strings.NewReader(`{"result":{"taskReference":{"state":"SUCCESS"},"text":"`),
		io.LimitReader(repeat("no two are alike: 0123456789 "), size),
		strings.NewReader(`"}}`),
	)
	var most int64
	r, err := ReadReport(document, func(held int64) error {
		most = max(most, held)
		return nil
	})
	if err != nil || !r.Finished() {
		t.Fatal(err)
	}
	if most > 4<<20 {
		t.Errorf("a document of %d MiB took %.1f MiB", size>>20, float64(most)/(1<<20))
	}
}

// repeat is a reader of a text, again and again.
type repeat string

func (r repeat) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		n += copy(p[n:], r)
	}
	return n, nil
}
