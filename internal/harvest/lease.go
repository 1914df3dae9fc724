package harvest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"go.uber.org/zap"
)

const (
	renewEvery   = 10 * time.Second
	renewTimeout = 5 * time.Second

	// renewAgain is the pause after a lease could not be renewed.
	renewAgain = time.Second

	// freshFor is how long after its renewal a lease covers new notes.
	freshFor = 2 * renewEvery

	// leases is the folder of the leases. A holder has another name.
	leases = "leases"

	// maxSlots is the number of processes with the same instance and the same directory for locks.
	maxSlots = 64
)

// lease says that the process is alive which follows what is noted in a folder. It is a note that changes.
type lease struct {
	holder string // the name of the lease, and of the folder
	run    uint64 // of the process, at random
	unlock func() // the slot

	mu      sync.Mutex
	renewed time.Time
}

// leaseRecord is the content of a lease.
type leaseRecord struct {
	Run  uint64 `json:"run"`
	Beat int    `json:"beat"` // grows with each renewal
}

// newLease returns a lease that no other process has.
func newLease(c Config, random *rand.Rand, logger *zap.Logger) *lease {
	l := &lease{run: random.Uint64()}
	slot, unlock, err := takeSlot(c.LockDir, c.Namespace)
	if err != nil {
		logger.Warn("this process cannot be told from others with the same data directory: after a restart, "+
			"it takes a while until what was pending is resumed", zap.Error(err))
		slot, unlock = fmt.Sprintf("%016x", l.run), func() {}
	}
	l.holder, l.unlock = c.Instance+"-"+slot, unlock
	return l
}

// takeSlot takes the first slot that no other process has. The end of the process frees it.
func takeSlot(dir, namespace string) (slot string, unlock func(), err error) {
	if dir == "" {
		return "0", func() {}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, err
	}
	for i := range maxSlots {
		slot := strconv.Itoa(i)
		file := flock.New(filepath.Join(dir, "harvest-"+namespace+"-"+slot+".lock"))
		locked, err := file.TryLock()
		if err != nil {
			return "", nil, fmt.Errorf("locking %s: %w", file.Path(), err)
		}
		if locked {
			return slot, func() { _ = file.Close() }, nil
		}
	}
	return "", nil, errors.New("too many processes use " + dir)
}

// unrenewed returns the same lease for another storage, where it is not renewed yet.
func (l *lease) unrenewed() *lease { return &lease{holder: l.holder, run: l.run, unlock: l.unlock} }

// fresh reports whether others see that the process is alive.
func (l *lease) fresh() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.renewed.IsZero() && time.Since(l.renewed) < freshFor
}

// release frees the slot.
func (l *lease) release() { l.unlock() }

// sleep sleeps unless ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}
