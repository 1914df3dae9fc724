package fsbroker

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

// archive keeps finished reports, and what submissions became, in a storage, where they outlive the process and other
// instances find them. It is written to behind the answers, and never stands in their way: a storage that fails costs
// nothing but what it would have kept.
//
// An archive lives on when the configuration is reloaded. It holds nothing of a configuration but what its users have
// attached, and uses what the newest of them has.
type archive struct {
	slots   chan struct{} // bounds the operations that are under way, and those that hang
	wake    chan struct{} // tells the writer that there is something to write
	hurry   chan struct{} // tells it not to wait for the next try
	writing chan struct{} // full while something is written, or must not be
	ctx     context.Context
	stop    context.CancelFunc
	tasks   sync.WaitGroup // the writer and the sweeper

	rests atomic.Int64 // until when nothing is read after a failure, in Unix nanoseconds

	mu      sync.Mutex // guards all below
	users   []*archiveUser
	queue   *list.List // of *write, the next one in front
	queued  map[key]*list.Element
	bytes   int
	refused int           // writes that found the queue full, since it was last empty
	written chan struct{} // closed and renewed whenever something has left the queue
	failing bool          // as was last logged
}

// archiveUser is what a handler lets its archive work with.
type archiveUser struct {
	storage   certmagic.Storage
	logger    *zap.Logger
	retention time.Duration
	leaving   bool
}

// write is something that waits to be stored.
type write struct {
	key   key
	value keepable
}

const (
	// The queue is for bursts, and for a storage that is away for a while. What does not fit stays in memory, and
	// waits there for somebody to ask for it.
	maxQueue      = 10_000
	maxQueueBytes = 64 << 20

	// storageSlots is how many operations may be under way. A storage that ignores deadlines cannot hold more than
	// this many goroutines.
	storageSlots = 32

	readTimeout  = 2 * time.Second // a caller waits for it
	writeTimeout = 30 * time.Second
	drainTimeout = 10 * time.Second // where the server has no grace period

	storagePrefix = "fsbroker_task/"
)

// How long a write that failed waits for its next try: twice as long each time, up to the last.
var firstRetry, lastRetry = 250 * time.Millisecond, 30 * time.Second

// archives pools the archives of a process, by what is configured as storage.
var archives = caddy.NewUsagePool()

var errStorageBusy = errors.New("too many operations are waiting for the storage")

// openArchive joins the archive that goes by id, and makes it for the first.
func openArchive(id string, user *archiveUser) (*archive, error) {
	v, _, err := archives.LoadOrNew(id, func() (caddy.Destructor, error) {
		a := &archive{
			slots:   make(chan struct{}, storageSlots),
			wake:    make(chan struct{}, 1),
			hurry:   make(chan struct{}, 1),
			writing: make(chan struct{}, 1),
			queue:   list.New(),
			queued:  make(map[key]*list.Element),
			written: make(chan struct{}),
		}
		a.ctx, a.stop = context.WithCancel(context.Background())
		a.tasks.Go(a.writeAll)
		a.tasks.Go(a.sweepAll)
		return a, nil
	})
	if err != nil {
		return nil, err
	}
	a := v.(*archive)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.users = append(a.users, user)
	return a, nil
}

// leave ends what openArchive began.
func (a *archive) leave(id string, user *archiveUser) error {
	a.mu.Lock()
	a.users = slices.DeleteFunc(a.users, func(u *archiveUser) bool { return u == user })
	a.mu.Unlock()
	_, err := archives.Delete(id)
	return err
}

// Destruct implements caddy.Destructor.
func (a *archive) Destruct() error {
	a.stop()
	a.tasks.Wait()
	return nil
}

// user is whose storage is used: the newest, and one that stays rather than one that leaves. It is nil when all have
// left.
func (a *archive) user() *archiveUser {
	a.mu.Lock()
	defer a.mu.Unlock()
	var newest *archiveUser
	for _, u := range a.users {
		if newest == nil || newest.leaving || !u.leaving {
			newest = u
		}
	}
	return newest
}

// try has op done with the storage, and comes back when it is done or ctx has ended, whatever the storage does then.
func (a *archive) try(ctx context.Context, op func(context.Context, certmagic.Storage) error) error {
	user := a.user()
	if user == nil {
		return context.Canceled
	}
	select {
	case a.slots <- struct{}{}:
	default:
		return errStorageBusy
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-a.slots }()
		done <- op(ctx, user.storage)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errUnreadable says that what is stored cannot be told at the moment.
var errUnreadable = errors.New("the storage cannot be read")

// load gives what is stored under k, or waits to be, and for how long it is good: nil where there is nothing. After a
// failure nothing is read for a while, so that callers do not queue up behind a storage that is away.
func (a *archive) load(ctx context.Context, k key, rest time.Duration) (value keepable, left time.Duration, err error) {
	user := a.user()
	if user == nil {
		return nil, 0, errUnreadable
	}
	if value = a.waiting(k); value != nil {
		return value, user.retention, nil
	}
	if time.Now().UnixNano() < a.rests.Load() {
		return nil, 0, errUnreadable
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var stored []byte
	err = a.try(ctx, func(ctx context.Context, storage certmagic.Storage) (err error) {
		stored, err = storage.Load(ctx, storageKey(k))
		return err
	})
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, nil
	case errors.Is(err, context.Canceled): // nobody waits any more
		return nil, 0, err
	default:
		a.rests.Store(time.Now().Add(rest).UnixNano())
		a.note(user, err)
		return nil, 0, errUnreadable
	}
	value, err = decodeStored(k, stored)
	if err != nil {
		user.logger.Warn("a stored value is damaged and is set aside", zap.String("key", storageKey(k)), zap.Error(err))
		a.setAside(k, stored)
		return nil, 0, nil
	}
	if left = user.retention - time.Since(value.since()); left <= 0 {
		return nil, 0, nil
	}
	return value, left, nil
}

// setAside moves a damaged value to where it is in nobody's way and can be looked at, until the sweep takes it.
func (a *archive) setAside(k key, value []byte) {
	ctx, cancel := context.WithTimeout(a.ctx, readTimeout)
	defer cancel()
	err := a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
		if err := storage.Store(ctx, damagedKey(k), value); err != nil {
			return err
		}
		return storage.Delete(ctx, storageKey(k))
	})
	if user := a.user(); err != nil && user != nil {
		a.note(user, err)
	}
}

// save queues a value to be stored, in place of an older one that waits. It tells whether there was room.
func (a *archive) save(k key, value keepable) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.users) == 0 {
		return false
	}
	if element, ok := a.queued[k]; ok {
		w := element.Value.(*write)
		a.bytes += value.size() - w.value.size()
		element.Value = &write{key: k, value: value}
		return true
	}
	if a.queue.Len() >= maxQueue || a.bytes+value.size() > maxQueueBytes {
		storageRefusedTotal.Inc()
		if a.refused++; a.refused == 1 {
			a.users[len(a.users)-1].logger.Warn("the queue to the storage is full: reports stay in memory alone until they are asked for again",
				zap.Int("queued", a.queue.Len()))
		}
		return false
	}
	a.queued[k] = a.queue.PushBack(&write{key: k, value: value})
	a.bytes += value.size()
	signal(a.wake)
	return true
}

// signal leaves word in a channel that has room for one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// waiting gives what is queued under k, which memory may have let go of since.
func (a *archive) waiting(k key) keepable {
	a.mu.Lock()
	defer a.mu.Unlock()
	if element, ok := a.queued[k]; ok {
		return element.Value.(*write).value
	}
	return nil
}

// writeAll stores what is queued, one after the other, until the archive ends.
func (a *archive) writeAll() {
	retry := firstRetry
	for {
		if a.holdWrites(a.ctx) != nil {
			return
		}
		w := a.next()
		stored := w != nil && a.store(w)
		a.releaseWrites()
		if w == nil {
			select {
			case <-a.wake:
				continue
			case <-a.ctx.Done():
				return
			}
		}
		if stored {
			retry = firstRetry
			continue
		}
		select {
		case <-time.After(retry/2 + rand.N(retry/2)): //nolint:gosec // nobody gains by guessing it
			retry = min(2*retry, lastRetry)
		case <-a.hurry:
			retry = firstRetry
		case <-a.ctx.Done():
			return
		}
	}
}

// holdWrites waits for the write under way to end, and keeps the next one from beginning.
func (a *archive) holdWrites(ctx context.Context) error {
	select {
	case a.writing <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *archive) releaseWrites() { <-a.writing }

func (a *archive) next() *write {
	a.mu.Lock()
	defer a.mu.Unlock()
	if front := a.queue.Front(); front != nil {
		return front.Value.(*write)
	}
	return nil
}

// store stores one value, and takes it out of the queue unless a newer one has taken its place. One that fails goes to
// the end of the queue, so that a value that the storage does not take holds up no other.
func (a *archive) store(w *write) bool {
	user := a.user()
	if user == nil {
		return false
	}
	value, err := encodeStored(w.key, w.value)
	if err == nil {
		ctx, cancel := context.WithTimeout(a.ctx, writeTimeout)
		defer cancel()
		err = a.try(ctx, func(ctx context.Context, storage certmagic.Storage) error {
			return storage.Store(ctx, storageKey(w.key), value)
		})
	}
	if err != nil {
		storageFailuresTotal.Inc()
		a.note(user, fmt.Errorf("storing %s: %w", storageKey(w.key), err))
		a.postpone(w.key)
		return false
	}
	storageWritesTotal.Inc()
	if a.finish(user, w) {
		a.note(user, nil)
	}
	return true
}

// postpone puts what waits under k at the end of the queue.
func (a *archive) postpone(k key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.queue.MoveToBack(a.queued[k])
}

// finish takes what has been stored out of the queue, and tells whether nothing is left there.
func (a *archive) finish(user *archiveUser, w *write) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if element := a.queued[w.key]; element.Value == any(w) {
		a.dequeue(element)
	}
	if a.queue.Len() > 0 {
		return false
	}
	if a.refused > 0 {
		user.logger.Warn("the queue to the storage is empty again", zap.Int("refused", a.refused))
		a.refused = 0
	}
	return true
}

// dequeue takes a write out of the queue, and lets those know who wait for that.
func (a *archive) dequeue(element *list.Element) {
	w := element.Value.(*write)
	a.queue.Remove(element)
	delete(a.queued, w.key)
	a.bytes -= w.value.size()
	close(a.written)
	a.written = make(chan struct{})
}

// note logs that the storage fails, and that it no longer does, once each.
func (a *archive) note(user *archiveUser, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	a.mu.Lock()
	changed := a.failing != (err != nil)
	a.failing = err != nil
	queued := a.queue.Len()
	a.mu.Unlock()
	switch {
	case changed && err != nil:
		user.logger.Warn("the storage fails: answers go on without it", zap.Int("queued", queued), zap.Error(err))
	case changed:
		user.logger.Info("the storage works again", zap.Int("queued", queued))
	}
}

// storageFigures say how much waits for a storage.
type storageFigures struct {
	Queued      int  `json:"queued"`
	QueuedBytes int  `json:"queued_bytes"`
	Failing     bool `json:"failing"`
}

func (f *storageFigures) add(other storageFigures) {
	f.Queued += other.Queued
	f.QueuedBytes += other.QueuedBytes
	f.Failing = f.Failing || other.Failing
}

func (a *archive) figures() storageFigures {
	a.mu.Lock()
	defer a.mu.Unlock()
	return storageFigures{Queued: a.queue.Len(), QueuedBytes: a.bytes, Failing: a.failing}
}

// drain waits until all that is queued is stored, when user is the last one: where another stays, the queue just goes
// on. It says how much is left when ctx ends before that.
func (a *archive) drain(ctx context.Context, user *archiveUser) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, drainTimeout)
		defer cancel()
	}
	signal(a.hurry)
	for {
		a.mu.Lock()
		user.leaving = true
		others := slices.ContainsFunc(a.users, func(u *archiveUser) bool { return !u.leaving })
		queued, written := a.queue.Len(), a.written
		a.mu.Unlock()
		if others || queued == 0 {
			return nil
		}
		select {
		case <-written:
		case <-ctx.Done():
			return fmt.Errorf("%d reports could not be stored in time", queued)
		}
	}
}

// storageKey is where k is stored: hashed anyway, it is spread over partitions, so that no folder grows without end.
func storageKey(k key) string {
	return fmt.Sprintf("%s/%x", partition(int(k[0])<<4|int(k[1])>>4), k)
}

// damagedKey is where what was damaged is set aside.
func damagedKey(k key) string { return fmt.Sprintf("%s/%x", partition(damagedPartition), k) }

// The partitions of the storage: as many as three hexadecimal digits count, and one for what is damaged.
const (
	partitions       = 1 << 12
	damagedPartition = partitions
)

func partition(n int) string {
	if n == damagedPartition {
		return storagePrefix + "damaged"
	}
	return fmt.Sprintf("%s%03x", storagePrefix, n)
}
