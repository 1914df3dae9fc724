package task

import "io"

// maxToken is how many bytes of a string, digits in a row, or white space in a row the parser gets to see.
const maxToken = 512

// shortener reads JSON and leaves out the middle of long strings, long runs of digits and long white space: a parser would
// hold such a token in memory as a whole. Nothing that the judge looks at is that long. What is left out is checked, so
// that what was malformed stays malformed.
type shortener struct {
	src   io.Reader
	state lexical
	run   int  // bytes of the current string, digits in a row, or white space in a row
	space bool // outside of strings, whether the run is of white space
	hex   int  // hexadecimal digits of an escape that are still to come

	dropped bool // whether anything was left out
}

// lexical is where in the document a shortener is.
type lexical uint8

const (
	outside lexical = iota // of strings
	inString
	inEscape // after a backslash
	inHex    // after a backslash and u
)

// malformed replaces what is malformed in what is left out. No string may hold it.
const malformed = 0

// isShortened reports whether a shortener has left out anything, so that places in the document are unknown.
func isShortened(document io.Reader) bool {
	s, ok := document.(*shortener)
	return ok && s.dropped
}

// Read implements io.Reader.
func (s *shortener) Read(p []byte) (int, error) {
	for {
		n, err := s.src.Read(p)
		kept := s.shorten(p[:n])
		if kept > 0 || err != nil || n == 0 {
			return kept, err
		}
	}
}

// shorten moves what is kept of text to its front, and returns how much that is.
func (s *shortener) shorten(text []byte) (kept int) {
	for i := 0; i < len(text); {
		if s.state == inString {
			// Most bytes of a document are plain bytes of a string.
			plain := i
			for i < len(text) && text[i] >= ' ' && text[i] != '"' && text[i] != '\\' {
				i++
			}
			if n := min(i-plain, max(0, maxToken-s.run)); n > 0 {
				if kept != plain {
					copy(text[kept:], text[plain:plain+n])
				}
				kept += n
			}
			s.run += i - plain
			s.dropped = s.dropped || s.run > maxToken
			if i == len(text) {
				break
			}
		}
		c := text[i]
		i++
		out, keep := s.next(c)
		if keep {
			text[kept] = out
			kept++
		} else {
			s.dropped = true
		}
	}
	return kept
}

// next takes the next byte, and returns the byte to keep in its place, if any.
func (s *shortener) next(c byte) (out byte, keep bool) {
	switch s.state {
	case inString:
		switch c {
		case '"':
			s.state, s.run = outside, 0
			return c, true
		case '\\':
			s.state = inEscape
			return c, s.run < maxToken
		}
		return malformed, true // a control character
	case inEscape:
		s.state = inString
		keep = s.run < maxToken
		switch c {
		case 'u':
			s.state, s.hex = inHex, 4
			return c, keep
		case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		default:
			return malformed, true
		}
		s.run += 2
		return c, keep
	case inHex:
		keep = s.run < maxToken
		if !isHex(c) {
			s.state = inString
			return malformed, true
		}
		if s.hex--; s.hex == 0 {
			s.state = inString
			s.run += 6
		}
		return c, keep
	}
	return s.nextOutside(c)
}

// nextOutside takes a byte outside of strings.
func (s *shortener) nextOutside(c byte) (out byte, keep bool) {
	space := c == ' ' || c == '\t' || c == '\n' || c == '\r'
	if digit := c >= '0' && c <= '9'; !space && !digit {
		s.run = 0
		if c == '"' {
			s.state = inString
		}
		return c, true
	}
	if space != s.space {
		s.space, s.run = space, 0
	}
	s.run++
	return c, s.run <= maxToken
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
