package fsbroker

import (
	"context"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
	"testing/iotest"
)

// A body is late whoever has run out of patience: the server, another handler, or the system.
func TestLateBody(t *testing.T) {
	for err, late := range map[error]bool{
		os.ErrDeadlineExceeded:                        true,
		fmt.Errorf("%w", os.ErrDeadlineExceeded):      true, // by HTTP/2
		fmt.Errorf("%w", context.DeadlineExceeded):    true,
		os.NewSyscallError("read", syscall.ETIMEDOUT): true,
		syscall.ECONNRESET:                            false,
		io.ErrUnexpectedEOF:                           false,
		io.EOF:                                        false,
	} {
		b := newCallerBody(iotest.ErrReader(err))
		if _, got := io.ReadAll(b); got == nil && err != io.EOF { //nolint:errorlint // it is this one
			t.Errorf("%v: it is read to its end", err)
		}
		if p := b.Late(); (p != nil) != late {
			t.Errorf("%v: got %v", err, p)
		}
	}
}
