package task

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext" // encoding/json/jsontext from Go 1.27 on
)

// Accepted is a file that a broker has accepted to be analysed.
type Accepted struct {
	SubmitID string
	SHA256   string // of the file, hexadecimal; empty if the broker does not say it
	Name     string // of the file, as it was submitted; empty if the broker does not say it, or it is very long
}

// ReadAccepted reads a broker's answer to /submit, and calls accept with each file that it has accepted, as soon as that is
// read. It holds nothing else of the answer. Members that are missing or have another type are left out, and so are files
// without an ID. An error says why the rest of the answer cannot be read.
func ReadAccepted(answer io.Reader, accept func(Accepted)) error {
	document := &shortener{src: answer}
	p := newParser(document)
	err := p.object("", func(name string) error {
		if !strings.EqualFold(name, "acceptedFiles") || p.PeekKind() != jsontext.KindBeginArray {
			return p.SkipValue()
		}
		return p.array(name, func() error {
			if p.PeekKind() != jsontext.KindBeginObject {
				return p.SkipValue()
			}
			a, err := readAccepted(p)
			if err == nil && ValidID(a.SubmitID) {
				accept(a)
			}
			return err
		})
	})
	switch syntax, malformed := errors.AsType[*jsontext.SyntacticError](err); {
	case malformed && document.dropped:
		return errors.New("it is not JSON, or it is incomplete")
	case malformed:
		return fmt.Errorf("it is not JSON, or it is incomplete (byte %d)", syntax.ByteOffset)
	case errors.Is(err, io.EOF):
		return errors.New("it is empty")
	}
	return err
}

// readAccepted reads an element of acceptedFiles.
func readAccepted(p parser) (a Accepted, err error) {
	err = p.object("acceptedFiles", func(name string) (err error) {
		switch strings.ToLower(name) {
		case "id":
			a.SubmitID, err = p.text()
		case "sha256":
			a.SHA256, err = p.text()
			if _, err := hex.DecodeString(a.SHA256); err != nil || len(a.SHA256) != 64 {
				a.SHA256 = ""
			}
			a.SHA256 = strings.ToLower(a.SHA256)
		case "submitname":
			a.Name, err = p.text()
			if len(a.Name) >= maxToken || !utf8.ValidString(a.Name) {
				a.Name = ""
			}
		default:
			err = p.SkipValue()
		}
		return err
	})
	return a, err
}

// text reads a value. It returns a string or a number as text, and nothing for another value.
func (p parser) text() (string, error) {
	switch p.PeekKind() {
	case jsontext.KindString, jsontext.KindNumber:
		token, err := p.ReadToken()
		if err != nil {
			return "", err
		}
		return token.String(), nil
	}
	return "", p.SkipValue()
}
