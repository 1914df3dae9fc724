package fsbroker

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json/jsontext" // encoding/json/jsontext, from Go 1.27 on
)

// state is the name of a task's state, or empty where the document has none.
type state string

// finished tells whether a task in this state is over. Only the names of states in which work goes on are known for
// sure, so every other word ends a task; none at all does not.
func (s state) finished() bool {
	switch strings.ToUpper(string(s)) {
	case "", "QUEUED", "PENDING", "WAITING", "SCHEDULED", "STARTED", "RUNNING", "PROCESSING", "IN_QUEUE", "IN_PROGRESS":
		return false
	}
	return true
}

// judge tells whether a document is a finished report. The states of the task and its subtasks decide, and nothing else
// in the document: reports hold stale states of other tasks further down, which say nothing about this one. The
// document is read to its end, once, and nothing of it is kept. The error says what is wrong with it, and shows none of
// it.
func judge(document io.Reader) (finished bool, err error) {
	var v verdict
	w := walk{jsontext.NewDecoder(document, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))}
	err = w.object("", func(name string) error {
		if name != "result" || w.PeekKind() == jsontext.KindNull {
			return w.SkipValue()
		}
		v.hasResult = true
		return w.object(name, func(name string) error { return v.readMember(w, name) })
	})
	if err == nil {
		err = w.end()
	}
	syntax, malformed := errors.AsType[*jsontext.SyntacticError](err)
	switch {
	case malformed:
		return false, fmt.Errorf("it is not JSON, or not all of it came (byte %d)", syntax.ByteOffset)
	case errors.Is(err, io.EOF):
		return false, errors.New("it is empty")
	case err != nil:
		return false, err
	case !v.hasResult:
		return false, errors.New("it has no result")
	}
	return !v.hasTask || !v.working, nil
}

// verdict is what a document says about its task. Where it says it more than once, all has to be finished.
type verdict struct {
	hasResult, hasTask bool
	working            bool // the task or a subtask is not finished
}

// readMember reads a member of the result.
func (v *verdict) readMember(w walk, name string) error {
	if w.PeekKind() == jsontext.KindNull {
		return w.SkipValue()
	}
	path := "result." + name
	switch name {
	case "taskReference":
		v.hasTask = true
		return v.readTask(w, path)
	case "subtaskReferences":
		return w.array(path, func() error { return v.readTask(w, path) })
	}
	return w.SkipValue()
}

// readTask reads the reference of a task, or of a subtask.
func (v *verdict) readTask(w walk, path string) error {
	var s state
	err := w.object(path, func(name string) error {
		if name != "state" || w.PeekKind() != jsontext.KindString {
			return w.SkipValue()
		}
		token, err := w.ReadToken()
		if err != nil {
			return err
		}
		s = state(token.String())
		return nil
	})
	v.working = v.working || !s.finished()
	return err
}

// walk is a way through a JSON document, which goes into what is wanted and passes by the rest.
type walk struct{ *jsontext.Decoder }

// object reads an object. Of each member it reads the name, and has member read the value.
func (w walk) object(path string, member func(name string) error) error {
	return w.children(path, jsontext.KindBeginObject, func() error {
		name, err := w.ReadToken()
		if err != nil {
			return err
		}
		return member(name.String())
	})
}

// array reads an array, and has element read each of its elements.
func (w walk) array(path string, element func() error) error {
	return w.children(path, jsontext.KindBeginArray, element)
}

func (w walk) children(path string, kind jsontext.Kind, child func() error) error {
	token, err := w.ReadToken()
	switch {
	case err != nil:
		return err
	case token.Kind() != kind && path == "":
		return errors.New("it is not a JSON object")
	case token.Kind() != kind:
		return fmt.Errorf("its %s has another JSON type than expected", path)
	}
	for {
		switch w.PeekKind() {
		case jsontext.KindEndObject, jsontext.KindEndArray:
			_, err := w.ReadToken()
			return err
		}
		if err := child(); err != nil {
			return err
		}
	}
}

// end makes sure that nothing but white space follows.
func (w walk) end() error {
	_, err := w.ReadToken()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err == nil:
		return fmt.Errorf("more than one JSON value came (byte %d)", w.InputOffset())
	}
	return err
}
