package task

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json/jsontext" // encoding/json/jsontext from Go 1.27 on
)

// state is the name of a task's state. It is empty if the document has none.
type state string

// finished reports whether a task in this state is over. Only the names of the states of unfinished work are known for
// sure, so every other word is a finished state. A missing state is unfinished.
func (s state) finished() bool {
	switch s.normal() {
	case "", "QUEUED", "PENDING", "WAITING", "SCHEDULED", "STARTED", "RUNNING", "PROCESSING", "IN_QUEUE", "IN_PROGRESS":
		return false
	}
	return true
}

// normal returns the state in the spelling of the documentation: in upper case, without surrounding space, and with
// underscores instead of spaces and dashes.
func (s state) normal() string {
	return strings.ToUpper(separators.Replace(strings.TrimSpace(string(s))))
}

var separators = strings.NewReplacer(" ", "_", "-", "_")

// judgement is what a document says about its task.
type judgement struct {
	finished bool
	file     [sha256.Size]byte // the SHA-256 sum of the analysed file; zero if it is not known
}

// judge reads a document once, to its end, and keeps nothing else of it. Only the states of the task and its subtasks
// count: reports hold stale states of other tasks further down. The error says why the document is not a report and shows
// nothing of it.
func judge(document io.Reader) (judgement, error) {
	var v verdict
	p := newParser(document)
	err := p.object("", func(name string) error {
		if name != "result" || p.PeekKind() == jsontext.KindNull {
			return p.SkipValue()
		}
		v.hasResult = true
		return p.object(name, func(name string) error { return v.readMember(p, name) })
	})
	if err == nil {
		err = p.end()
	}
	syntax, malformed := errors.AsType[*jsontext.SyntacticError](err)
	switch {
	case malformed && isShortened(document):
		return judgement{}, errors.New("it is not JSON, or it is incomplete")
	case malformed:
		return judgement{}, fmt.Errorf("it is not JSON, or it is incomplete (byte %d)", syntax.ByteOffset)
	case errors.Is(err, io.EOF):
		return judgement{}, errors.New("it is empty")
	case err != nil:
		return judgement{}, err
	case !v.hasResult:
		return judgement{}, errors.New("it has no result")
	}
	return judgement{finished: !v.hasTask || !v.unfinished, file: v.file}, nil
}

// verdict is what has been read of a document. If it names a state more than once, every one must be finished. If it names
// the file more than once, all names must be the same.
type verdict struct {
	hasResult, hasTask bool
	unfinished         bool // the task or one of its subtasks is unfinished
	hasFile            bool
	file               [sha256.Size]byte // zero if it is not known
}

// readMember reads a member of the result.
func (v *verdict) readMember(p parser, name string) error {
	if p.PeekKind() == jsontext.KindNull {
		return p.SkipValue()
	}
	path := "result." + name
	switch name {
	case "taskReference":
		v.hasTask = true
		return v.readTask(p, path, v.readInfo)
	case "subtaskReferences":
		return p.array(path, func() error {
			if p.PeekKind() == jsontext.KindNull { // it says nothing
				return p.SkipValue()
			}
			return v.readTask(p, path, parser.SkipValue)
		})
	}
	return p.SkipValue()
}

// readTask reads the reference of the task or of a subtask. It calls info to read the additional information.
func (v *verdict) readTask(p parser, path string, info func(parser) error) error {
	var s state
	err := p.object(path, func(name string) error {
		switch name {
		case "state":
			if p.PeekKind() == jsontext.KindString {
				token, err := p.ReadToken()
				if err != nil {
					return err
				}
				s = state(token.String())
				return nil
			}
		case "additionalInfo":
			return info(p)
		}
		return p.SkipValue()
	})
	v.unfinished = v.unfinished || !s.finished()
	return err
}

// readInfo reads the additional information about the task, which may be anything.
func (v *verdict) readInfo(p parser) error {
	return p.member("digests", func() error { return p.member("SHA-256", func() error { return v.readSum(p) }) })
}

// readSum reads the SHA-256 sum of the file. What is no sum is a name of the file that is not known.
func (v *verdict) readSum(p parser) error {
	var sum [sha256.Size]byte
	if p.PeekKind() == jsontext.KindString {
		token, err := p.ReadToken()
		if err != nil {
			return err
		}
		if text := token.String(); len(text) == hex.EncodedLen(len(sum)) {
			if decoded, err := hex.DecodeString(text); err == nil {
				copy(sum[:], decoded)
			}
		}
	} else if err := p.SkipValue(); err != nil {
		return err
	}
	if v.hasFile && sum != v.file {
		sum = [sha256.Size]byte{}
	}
	v.hasFile, v.file = true, sum
	return nil
}

// parser reads the wanted parts of a JSON document and skips the rest.
type parser struct {
	*jsontext.Decoder
	inPlace bool // the document is parsed where it is
}

// newParser returns a parser of a document. A buffer is parsed in place.
func newParser(document io.Reader) parser {
	_, inPlace := document.(*bytes.Buffer)
	return parser{jsontext.NewDecoder(document, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)), inPlace}
}

// SkipValue skips a value. In place, it is faster to read the value as a whole, and allocates nothing (BenchmarkMiss).
func (p parser) SkipValue() error {
	if !p.inPlace {
		return p.Decoder.SkipValue()
	}
	_, err := p.ReadValue()
	return err
}

// object reads an object. It reads each member's name and calls member to read the value.
func (p parser) object(path string, member func(name string) error) error {
	return p.children(path, jsontext.KindBeginObject, func() error {
		name, err := p.ReadToken()
		if err != nil {
			return err
		}
		return member(name.String())
	})
}

// member reads a value that may be an object. It calls read to read the members of that name and skips the rest.
func (p parser) member(name string, read func() error) error {
	if p.PeekKind() != jsontext.KindBeginObject {
		return p.SkipValue()
	}
	return p.object(name, func(other string) error {
		if other != name {
			return p.SkipValue()
		}
		return read()
	})
}

// array reads an array. It calls element to read each element.
func (p parser) array(path string, element func() error) error {
	return p.children(path, jsontext.KindBeginArray, element)
}

func (p parser) children(path string, kind jsontext.Kind, child func() error) error {
	token, err := p.ReadToken()
	switch {
	case err != nil:
		return err
	case token.Kind() != kind && path == "":
		return errors.New("it is not a JSON object")
	case token.Kind() != kind:
		return fmt.Errorf("its %s has an unexpected JSON type", path)
	}
	for {
		switch p.PeekKind() {
		case jsontext.KindEndObject, jsontext.KindEndArray:
			_, err := p.ReadToken()
			return err
		}
		if err := child(); err != nil {
			return err
		}
	}
}

// end reads the rest of the document, which must be white space.
func (p parser) end() error {
	_, err := p.ReadToken()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err == nil:
		return fmt.Errorf("it is more than one JSON value (byte %d)", p.InputOffset())
	}
	return err
}
