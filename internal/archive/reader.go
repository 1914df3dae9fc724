package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	// maxReads is the number of reads at once. Further reads wait.
	maxReads = 128

	// slowRead is how long a read may take before it counts as a failure. It is still waited for if the storage works, since
	// a single slow value says nothing about the others.
	slowRead = 2 * time.Second

	// probeTimeout is how long the storage may take to show that it works.
	probeTimeout = time.Second

	readTimeout = 10 * time.Second
)

// Found is what Load finds. The zero value means that there is nothing.
type Found struct {
	Report *task.Report
	Target *task.Key     // the key under which the report is stored, if it was found through a reference
	TTL    time.Duration // how long the report may still be kept
	Queued bool          // it is not stored yet
}

// Load returns the report that is stored or queued under k. It calls grow with the memory that it needs, in bytes, and an
// error of grow ends it. While the storage fails, Load returns ErrUnreadable at once, so that callers do not wait for it.
func (a *Archive) Load(ctx context.Context, k task.Key, grow func(held int64) error) (Found, error) {
	b := a.backend()
	if b == nil {
		return Found{}, ErrUnreadable
	}
	if i := a.queued(k); i != nil {
		return Found{Report: i.Report, Target: i.Target, TTL: a.retention(b), Queued: true}, nil
	}
	return a.loadFrom(ctx, b, place{kind: inPartition, key: k}, grow)
}

// loadFrom returns the report that is stored at a place, or to which the value there refers.
func (a *Archive) loadFrom(ctx context.Context, b *Backend, p place, grow func(held int64) error) (Found, error) {
	v, err := a.read(ctx, b, p, func(stored int) error { return grow(int64(stored)) })
	var target *task.Key
	// A reference to a report that has grown since refers to the reference to the large document.
	for hops := 0; v != nil && v.kind == kindReference && hops < 2; hops++ {
		if k := v.target.key; k != p.key {
			target = &k
		}
		v, err = a.follow(ctx, b, v, grow)
	}
	if v == nil || v.report == nil {
		return Found{}, err
	}
	retention := a.retention(b)
	ttl := retention - a.Now().Sub(v.report.At())
	if ttl <= 0 {
		return Found{}, nil
	}
	return Found{Report: v.report, Target: target, TTL: min(ttl, retention)}, nil
}

// follow returns the value that a reference refers to. See read.
func (a *Archive) follow(ctx context.Context, b *Backend, ref *value, grow func(held int64) error) (*value, error) {
	if i := a.queued(ref.target.key); i != nil {
		return &value{kind: kindDocument, report: i.Report}, nil
	}
	if err := grow(ref.size); err != nil {
		return nil, err
	}
	return a.read(ctx, b, ref.target, func(stored int) error { return grow(max(ref.size, int64(stored))) })
}

// Newest returns the newest report of a file that is stored or queued, high-level or complete, given the SHA-256 sum of the
// file. A report that is not newer than after is not read. If the storage cannot be read, what is queued counts. Target is
// set in any case. See Load for the rest.
func (a *Archive) Newest(ctx context.Context, sum [32]byte, kind task.Kind, after time.Time, grow func(held int64) error) (Found, error) {
	b := a.backend()
	if b == nil {
		return Found{}, ErrUnreadable
	}
	var queued Found
	if i := a.queuedOf(sum, kind); i != nil && i.Report.At().After(after) {
		queued = Found{Report: i.Report, Target: i.Target, TTL: a.retention(b), Queued: true}
		if queued.Target == nil {
			queued.Target = &i.Key
		}
		after = i.Report.At()
	}
	stored, err := a.newestStored(ctx, b, sum, kind, after, grow)
	if stored.Report == nil && queued.Report != nil {
		return queued, nil
	}
	return stored, err
}

// newestStored returns the newest report of a file that is stored. See Newest.
func (a *Archive) newestStored(ctx context.Context, b *Backend, sum [32]byte, kind task.Kind, after time.Time, grow func(held int64) error) (Found, error) {
	source := task.FileSource(a.Namespace, sum, kind)
	refs, err := readThrough(ctx, a, b, a.lists, task.FileKey(source, task.Key{}), func(ctx context.Context) ([]place, error) {
		return a.listFile(ctx, b, source)
	})
	if err != nil {
		return Found{}, err
	}
	for _, p := range refs {
		if !time.Unix(0, p.at).After(after) {
			break
		}
		found, err := a.loadFrom(ctx, b, p, grow)
		// Files may be made whose sources are the same.
		if err != nil || found.Report != nil && found.Report.File() == sum {
			return found, err
		}
	}
	return Found{}, nil
}

// read returns the value at a place. It returns nil if there is none that can be used.
func (a *Archive) read(ctx context.Context, b *Backend, p place, grow func(stored int) error) (*value, error) {
	name := a.layout.name(p)
	stored, err := a.load(ctx, b, p.key, name)
	if stored == nil || err != nil {
		return nil, err
	}
	if err := grow(len(stored)); err != nil {
		return nil, err
	}
	v, err := decode(stored, name, p.key, b.Keyring)
	if err != nil {
		a.reject(b, p, stored, err)
	}
	return v, nil
}

// reject handles a stored value that cannot be used.
func (a *Archive) reject(b *Backend, p place, stored []byte, err error) {
	key := zap.String("key", a.layout.name(p))
	if isForeign(err) {
		if a.leaveAlone(p.key) {
			b.Logger.Warn("a stored value cannot be read and is left alone", key, errorField(err))
		}
		return
	}
	b.Logger.Warn("a stored value is damaged and is set aside", key, errorField(err))
	if err := a.setAside(b, p, stored); err != nil {
		b.Logger.Warn("a damaged value could not be set aside", key, errorField(err))
	}
}

// load loads a stored value. It returns nil if there is none.
func (a *Archive) load(ctx context.Context, b *Backend, k task.Key, name string) ([]byte, error) {
	return readThrough(ctx, a, b, a.reads, k, func(ctx context.Context) ([]byte, error) {
		stored, err := b.Storage.Load(ctx, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, a.proveStorage(ctx, b)
		case err != nil:
			return nil, err
		}
		a.proof.note(time.Now())
		if stored == nil {
			stored = []byte{}
		}
		return stored, nil
	})
}

// proveStorage returns an error if the storage has not shown lately that it works, and does not do so now.
func (a *Archive) proveStorage(ctx context.Context, b *Backend) error {
	now := time.Now()
	if a.proof.holds(now) {
		return nil
	}
	err := a.checkRecord(ctx, b)
	if errors.Is(err, fs.ErrNotExist) {
		if err = a.renewRecord(ctx, b); err == nil {
			err = a.checkRecord(ctx, b)
		}
	}
	if err == nil {
		a.proof.note(now)
	}
	return err
}

// readThrough reads about a key from the storage, unless the breaker says that the storage fails. It returns when op has
// returned or ctx has ended, even if the storage ignores ctx.
func readThrough[T any](ctx context.Context, a *Archive, b *Backend, through *breaker, k task.Key, op func(context.Context) (T, error)) (got T, err error) {
	if !through.allow(time.Now()) {
		return got, through.unreadable()
	}
	if err := a.takeSlot(ctx, through); err != nil {
		through.abandon()
		return got, err
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	watched, dials := watchDials(ctx)
	done := make(chan struct{})
	var read T
	var failed error
	go func() {
		read, failed = op(watched)
		<-a.slots // a read that hangs holds its slot
		close(done)
	}()
	slow := make(chan struct{}) // in a synctest bubble, the channel of a timer would crash the race detector
	defer time.AfterFunc(slowRead, func() { close(slow) }).Stop()
	select {
	case <-done:
		return read, a.noteRead(ctx, b, through, k, failed)
	case refusal := <-dials.refused:
		return got, a.noteRead(ctx, b, through, k, refusal)
	case <-ctx.Done():
		return got, a.noteRead(ctx, b, through, k, ctx.Err())
	case <-slow:
	}
	a.noteFailedRead(b, through, k, errTimeout)
	select {
	case <-done:
		return read, a.noteRead(ctx, b, through, k, failed)
	case <-ctx.Done():
	case <-through.done():
	case <-a.suspect(b):
		if !through.open() { // otherwise it is known already
			a.noteFailedRead(b, through, task.NewKey(a.writer), errTimeout)
		}
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return got, ctx.Err()
	}
	return got, fmt.Errorf("%w: %w", ErrUnreadable, through.explain(errTimeout))
}

// suspect returns a channel that is closed if the storage does not show in time that it works. It is asked by one operation
// at a time.
func (a *Archive) suspect(b *Backend) <-chan struct{} {
	p := &a.proof
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.suspicion != nil {
		return p.suspicion
	}
	hangs := make(chan struct{})
	p.suspicion = hangs
	ctx, cancel := context.WithTimeout(a.ctx, probeTimeout)
	acquit := context.AfterFunc(ctx, func() { close(hangs) })
	go func() {
		defer cancel()
		if a.proveStorage(ctx, b) == nil {
			acquit()
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.suspicion = nil
	}()
	return hangs
}

// takeSlot waits for a slot for a read, unless the storage begins to fail.
func (a *Archive) takeSlot(ctx context.Context, through *breaker) error {
	select {
	case a.slots <- struct{}{}:
		return nil
	default:
	}
	select {
	case a.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-through.done():
		return through.unreadable()
	}
}

// noteRead tells the breaker how a read has ended, and returns the error for the caller.
func (a *Archive) noteRead(ctx context.Context, b *Backend, through *breaker, k task.Key, err error) error {
	switch {
	case err == nil:
		if through.succeed() {
			a.tellClosed(b, through.operation)
		}
		return nil
	case errors.Is(ctx.Err(), context.Canceled): // all callers have left
		through.abandon()
		return ctx.Err()
	case ctx.Err() != nil:
		err = timedOut(err)
	}
	a.noteFailedRead(b, through, k, err)
	return fmt.Errorf("%w: %w", ErrUnreadable, err)
}

// noteFailedRead tells the breaker that a read has failed or is slow.
func (a *Archive) noteFailedRead(b *Backend, through *breaker, k task.Key, err error) {
	now := time.Now()
	err = through.explain(err)
	if through.fail(k, now, err) {
		a.tellOpened(b, through.operation, err)
		return
	}
	a.mu.Lock()
	complain := now.After(a.complain) && !through.open()
	if complain {
		a.complain = now.Add(complainEvery)
	}
	a.mu.Unlock()
	if complain {
		b.Logger.Warn("a stored value could not be read", zap.String("key", a.layout.name(place{kind: inPartition, key: k})), errorField(err))
	}
}

// setAside moves a damaged value to a place where it can be examined until its retention is over. It leaves a value alone
// that has been stored meanwhile.
func (a *Archive) setAside(b *Backend, p place, stored []byte) error {
	ctx, cancel := context.WithTimeout(a.ctx, readTimeout)
	defer cancel()
	aside := place{kind: damaged, key: p.key}
	if err := a.storeValue(ctx, b, aside, value{kind: kindDamaged, at: a.Now(), key: p.key, raw: stored}); err != nil {
		return err
	}
	name := a.layout.name(p)
	again, err := b.Storage.Load(ctx, name)
	if err != nil || !bytes.Equal(again, stored) || a.queued(p.key) != nil {
		return ignoreNotExist(err)
	}
	return ignoreNotExist(b.Storage.Delete(ctx, name))
}
