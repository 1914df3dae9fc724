// Package redact takes the secrets of the Task API out of texts. It finds them by the names of parameters and of JSON members.
package redact

import (
	"bytes"
	"encoding/hex"
)

// Placeholder takes the place of a secret.
const Placeholder = "REDACTED"

// Line returns a line of a log, or another text, with Placeholder for the values of parameters and of JSON members whose names
// end with secret or serect. found reports whether there were any. If not, clean is line itself.
func Line(line []byte) (clean []byte, found bool) {
	done := 0 // how much of line is dealt with
	for i := 0; i < len(line); i++ {
		switch line[i] {
		case '=', '%', ':':
			if start, end := secretAt(line, i); end > 0 {
				clean = append(append(clean, line[done:start]...), Placeholder...)
				done, i = end, end-1
			}
		}
	}
	if done == 0 {
		return line, false
	}
	return append(clean, line[done:]...), true
}

// secretAt returns the bounds of a secret that follows the equals sign, or the colon, at an index of a line. An equals sign may
// be percent-encoded. The bounds are 0 if there is no secret.
func secretAt(line []byte, i int) (start, end int) {
	switch line[i] {
	case '=', '%':
		if sign := equalsSign(line[i:]); sign > 0 && endsWithSecret(line[:i]) {
			start = i + sign
			end = start + textLength(line[start:], '&')
		}
	case ':':
		if i == 0 || line[i-1] != '"' || !endsWithSecret(line[:i-1]) {
			break
		}
		value := bytes.TrimPrefix(line[i+1:], []byte{' '}) // console has a space here
		if len(value) > 0 && value[0] == '"' {
			start = len(line) - len(value) + 1
			end = start + textLength(line[start:], '"')
		}
	}
	return start, end
}

// textLength returns the length of a text in a line. It ends at a given character, at a control character, or at the quotation
// mark that ends the string it is in.
func textLength(text []byte, terminator byte) int {
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == terminator, c == '"', c < ' ':
			return i
		case c == '\\' && i+1 < len(text) && text[i+1] >= ' ':
			i++ // an escaped character
		}
	}
	return len(text)
}

// endsWithSecret reports whether text ends with the name of a parameter that holds a secret.
func endsWithSecret(text []byte) bool {
	return endsWith(text, "secret") || endsWith(text, "serect")
}

// endsWith reports whether text ends with a name in lower case. In text, letters may be upper case or percent-encoded.
func endsWith(text []byte, name string) bool {
	for i := len(name) - 1; i >= 0; i-- {
		var c byte
		if c, text = cutLast(text); c|0x20 != name[i] {
			return false
		}
	}
	return true
}

// cutLast returns the last character of text, which may be percent-encoded, and what precedes it. A URL that is a part of
// another one is percent-encoded once more: t is %74, %2574, %252574 and so on. At the end, the character is 0.
func cutLast(text []byte) (c byte, rest []byte) {
	if len(text) == 0 {
		return 0, nil
	}
	n := len(text) - 1
	percent := n - 2
	for percent >= 2 && text[percent] == '5' && text[percent-1] == '2' {
		percent -= 2
	}
	if percent >= 0 && text[percent] == '%' {
		var decoded [1]byte
		if _, err := hex.Decode(decoded[:], text[n-1:]); err == nil {
			return decoded[0], text[:percent]
		}
	}
	return text[n], text[:n]
}

// equalsSign returns the length of the equals sign with which text begins. Like a name, it may be percent-encoded. The length is
// 0 if there is none.
func equalsSign(text []byte) int {
	if text[0] == '=' {
		return 1
	}
	rest := text[1:]
	for bytes.HasPrefix(rest, []byte("25")) {
		rest = rest[2:]
	}
	if len(rest) < 2 || rest[0] != '3' || rest[1]|0x20 != 'd' {
		return 0
	}
	return len(text) - len(rest) + 2
}
