package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"

	"go.uber.org/zap"
)

// ErrUnreadable means that the storage cannot be read at the moment.
var ErrUnreadable = errors.New("the storage cannot be read")

var errTimeout = errors.New("the storage takes too long")

// shownError is an error of a storage as operators see it: without the queries of URLs, which may hold secrets of the storage.
type shownError struct{ error }

var urlQuery = regexp.MustCompile(`(://[^\s"?]*)\?[^\s"]*`)

func (e shownError) Error() string { return urlQuery.ReplaceAllString(e.error.Error(), "$1?REDACTED") }

func (e shownError) Unwrap() error { return e.error }

func errorField(err error) zap.Field { return zap.Error(shownError{err}) }

// timedOut returns the error of an operation whose time is over. It has the error of the operation, if that says more.
func timedOut(err error) error {
	if err == nil || err.Error() == context.DeadlineExceeded.Error() {
		return errTimeout
	}
	return fmt.Errorf("%w: %w", errTimeout, err)
}

// ignoreNotExist returns err unless it means that there is no such value.
func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
