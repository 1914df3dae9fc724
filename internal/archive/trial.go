package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// A storage is tried when it is attached: some modules store less of a value than they are given, or nothing of a large one,
// and an operator should know before a report is concerned.

const (
	// trialDelay is the time until a storage is tried, at most twice that.
	trialDelay = time.Second

	// trialPause is the pause after a trial that has failed, and trialAgain after one in which the storage did not work at all.
	trialPause = 5 * time.Second
	trialAgain = time.Minute

	// maxTrials is the number of trials of a size that must fail in a row, where those of a small one succeed, until that counts.
	maxTrials = 3

	smallTrial = 16

	// surelyWhole is the size of the values that any storage is taken to keep whole, in bytes.
	surelyWhole = 32 << 10
)

// trialSizes are the sizes of the values that are tried: above what a BLOB of MySQL holds, and the size of a large report.
var trialSizes = [...]int{70 << 10, 1 << 20}

// errTooLarge means that the storage stores only a part of such a large value, and says nothing.
var errTooLarge = errors.New("the storage would store only a part of it")

// cutError is the error of a value that has come back different.
type cutError struct{ size, got, whole int }

func (e *cutError) Error() string {
	if e.whole < e.got || e.got == e.size {
		return fmt.Sprintf("a value of %d bytes came back changed", e.size)
	}
	return fmt.Sprintf("a value of %d bytes came back with %d", e.size, e.got)
}

// try finds out in the background whether a storage keeps large values, unless it has been detached.
func (a *Archive) try(b *Backend) {
	defer b.tried.Store(true)
	jitter := a.random("trials")
	pause := func(d time.Duration) bool {
		return a.sleep(d+time.Duration(jitter.Int64N(int64(d)))) && a.isAttached(b)
	}
	wait, whole := trialDelay, 0
	for _, size := range trialSizes {
		for failed := 0; ; {
			if !pause(wait) {
				return
			}
			err := a.tryValue(b, size)
			if err == nil {
				break
			}
			cut, isCut := errors.AsType[*cutError](err)
			switch {
			case isCut:
				b.whole.Store(int64(max(whole, cut.whole)))
				a.warn(b, err)
				return
			case a.tryValue(b, smallTrial) != nil:
				failed, wait = 0, trialAgain
				continue
			}
			if failed, wait = failed+1, trialPause; failed == maxTrials {
				a.warn(b, err)
				return
			}
		}
		whole, wait = size, trialDelay
	}
}

// tryValue stores a value that cannot be compressed, loads it, and deletes it.
func (a *Archive) tryValue(b *Backend, size int) error {
	ctx, cancel := context.WithTimeout(a.ctx, writeTimeout)
	defer cancel()
	name, value := a.layout.trialName(a.writer), make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(value) // it always succeeds
	if err := b.Storage.Store(ctx, name, value); err != nil {
		return fmt.Errorf("a value of %d bytes was refused: %w", size, err)
	}
	got, err := b.Storage.Load(ctx, name)
	_ = b.Storage.Delete(ctx, name) // what is left is overwritten by the next trial, or deleted with the record of this instance
	if err != nil {
		return fmt.Errorf("a value of %d bytes was stored and cannot be read: %w", size, err)
	}
	if !bytes.Equal(got, value) {
		return &cutError{size: size, got: len(got), whole: commonPrefix(got, value)}
	}
	return nil
}

// warn tells that a storage does not keep large values: in the log, and as long as it is attached.
func (a *Archive) warn(b *Backend, err error) {
	const consequence = "larger reports are not stored: raise the limit of the storage, such as the type of a column (see docs/STORAGE.md)"
	b.Logger.Warn("the storage does not keep large values: "+consequence, errorField(err))
	a.mu.Lock()
	defer a.mu.Unlock()
	b.warnings = append(b.warnings, shownError{err}.Error()+": "+consequence)
}

// store stores a value. As long as it is not known whether the storage keeps large values, such a value is read again.
func (b *Backend) store(ctx context.Context, name string, value []byte) error {
	err := b.Storage.Store(ctx, name, value)
	if err != nil || len(value) <= surelyWhole || b.tried.Load() {
		return err
	}
	got, err := b.Storage.Load(ctx, name)
	if err != nil {
		return fmt.Errorf("reading it again: %w", err)
	}
	if !bytes.Equal(got, value) {
		return fmt.Errorf("%w: it has %d bytes and came back with %d", errTooLarge, len(value), len(got))
	}
	return nil
}

// commonPrefix returns the number of bytes with which both begin.
func commonPrefix(a, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

func (a *Archive) isAttached(b *Backend) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Contains(a.backends, b)
}
