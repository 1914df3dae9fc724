// Package guard keeps a panic in one call from ending the process. A goroutine that panics ends the process, unless it
// recovers. So what a goroutine does for callers, or with the code of other modules, is called through here.
package guard

import (
	"errors"
	"fmt"
	"runtime"

	"go.uber.org/zap"
)

// ErrPanic is the error of a call that has panicked.
var ErrPanic = errors.New("it has panicked: the log says where")

// Call returns what f returns. If f panics, that is logged, and the error is ErrPanic.
//
// The value of a panic may hold a secret, such as the URL of a request to an upstream. So the log has its type, and the
// functions that were called, without their arguments. Only errors of Go's runtime are logged as they are: they say what is
// wrong with an index, a pointer or a type.
func Call[T any](logger *zap.Logger, f func() (T, error)) (got T, err error) {
	defer func() {
		if value := recover(); value != nil {
			cause := fmt.Sprintf("%T", value)
			if e, ok := value.(runtime.Error); ok {
				cause = e.Error()
			}
			logger.Error("a call has panicked", zap.String("cause", cause), zap.Stack("stack"))
			err = ErrPanic
		}
	}()
	return f()
}

// Do is like Call, for what returns nothing but an error.
func Do(logger *zap.Logger, f func() error) error {
	_, err := Call(logger, func() (struct{}, error) { return struct{}{}, f() })
	return err
}
