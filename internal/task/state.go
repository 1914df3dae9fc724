package task

import (
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

// judge reports whether a document is a finished report. Only the states of the task and its subtasks count: reports
// hold stale states of other tasks further down. The document is read once, to its end, and nothing of it is kept. The
// error says why it is not a report and shows nothing of it.
func judge(document io.Reader) (finished bool, err error) {
	var v verdict
	p := parser{jsontext.NewDecoder(document, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))}
	err = p.object("", func(name string) error {
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
		return false, errors.New("it is not JSON, or it is incomplete")
	case malformed:
		return false, fmt.Errorf("it is not JSON, or it is incomplete (byte %d)", syntax.ByteOffset)
	case errors.Is(err, io.EOF):
		return false, errors.New("it is empty")
	case err != nil:
		return false, err
	case !v.hasResult:
		return false, errors.New("it has no result")
	}
	return !v.hasTask || !v.unfinished, nil
}

// verdict is what a document says about its task. If it says so more than once, every state must be finished.
type verdict struct {
	hasResult, hasTask bool
	unfinished         bool // the task or one of its subtasks is unfinished
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
		return v.readTask(p, path)
	case "subtaskReferences":
		return p.array(path, func() error {
			if p.PeekKind() == jsontext.KindNull { // it says nothing
				return p.SkipValue()
			}
			return v.readTask(p, path)
		})
	}
	return p.SkipValue()
}

// readTask reads the reference of the task or of a subtask.
func (v *verdict) readTask(p parser, path string) error {
	var s state
	err := p.object(path, func(name string) error {
		if name != "state" || p.PeekKind() != jsontext.KindString {
			return p.SkipValue()
		}
		token, err := p.ReadToken()
		if err != nil {
			return err
		}
		s = state(token.String())
		return nil
	})
	v.unfinished = v.unfinished || !s.finished()
	return err
}

// parser reads the wanted parts of a JSON document and skips the rest.
type parser struct{ *jsontext.Decoder }

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
