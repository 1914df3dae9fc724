package archive

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

// missedBeats is the number of renewals of its record that an instance may miss before it counts as ended.
const missedBeats = 4

// retention returns how long values are kept: the longest retention of all instances.
func (a *Archive) retention(b *Backend) time.Duration {
	a.peers.mu.Lock()
	defer a.peers.mu.Unlock()
	return max(b.Retention, a.peers.longest)
}

// meetPeers renews the record of this instance, and reads those of the others. An instance whose record has not changed for
// a while has ended, and its record is deleted. One that was seen lately counts even if its record is missing, since a
// storage that cannot be reached may say that there is nothing.
func (a *Archive) meetPeers(ctx context.Context, b *Backend) error {
	if err := a.renewRecord(ctx, b); err != nil {
		return err
	}
	if err := a.readRecords(ctx, b); err != nil {
		return err
	}
	longest := time.Duration(0)
	for _, name := range slices.Sorted(maps.Keys(a.peers.seen)) {
		p := a.peers.seen[name]
		if time.Since(p.changed) > missedBeats*max(p.record.Interval, sweepInterval(b.Retention)) {
			if err := ignoreNotExist(b.Storage.Delete(ctx, name)); err != nil {
				return err
			}
			_ = b.Storage.Delete(ctx, a.layout.trialName(path.Base(name))) // it is seldom there
			delete(a.peers.seen, name)
			continue
		}
		longest = max(longest, p.record.Retention)
		if p.record.Retention != b.Retention && p.record.Retention > 0 && !p.warned {
			p.warned = true
			b.Logger.Warn("another instance uses this namespace of the storage with another retention: the longer one counts while both run",
				zap.Duration("retention", b.Retention), zap.Duration("other", p.record.Retention), zap.String("instance", name))
		}
	}
	a.peers.mu.Lock()
	defer a.peers.mu.Unlock()
	a.peers.longest = longest
	return nil
}

// renewAll renews the record of this instance until the archive is closed if no pass of the sweep does: while one hangs,
// the others must not take the instance for one that has ended.
func (a *Archive) renewAll() {
	jitter := a.random("records")
	for {
		interval := sweepInterval(time.Hour)
		if b := a.backend(); b != nil {
			interval = sweepInterval(b.Retention)
		}
		if !a.sleep(interval + time.Duration(jitter.Int64N(int64(interval/10)))) {
			return
		}
		b := a.backend()
		if b == nil || a.peers.renewedWithin(interval+interval/5) {
			continue
		}
		ctx, cancel := context.WithTimeout(a.ctx, writeTimeout)
		if err := a.renewRecord(ctx, b); err != nil && a.ctx.Err() == nil {
			b.Logger.Debug("renewing the record of this instance in the storage", errorField(err))
		}
		cancel()
	}
}

// renewRecord stores the record of this instance.
func (a *Archive) renewRecord(ctx context.Context, b *Backend) error {
	a.peers.mu.Lock()
	a.peers.beat++
	r := record{Retention: b.Retention, Interval: sweepInterval(b.Retention), Beat: a.peers.beat}
	a.peers.mu.Unlock()
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := b.Storage.Store(ctx, a.layout.recordName(a.writer), text); err != nil {
		return fmt.Errorf("it does not work: %w", err)
	}
	a.peers.mu.Lock()
	defer a.peers.mu.Unlock()
	a.peers.renewed = time.Now()
	return nil
}

// checkRecord returns an error if the record of this instance, which was stored before, is not there. Some storages, such as
// that of Redis, say that there is nothing if they cannot be reached.
func (a *Archive) checkRecord(ctx context.Context, b *Backend) error {
	if _, err := b.Storage.Load(ctx, a.layout.recordName(a.writer)); err != nil {
		return fmt.Errorf("it does not work: %w", err)
	}
	return nil
}

// readRecords reads the records of the other instances. They are complete only if that of this instance is among them.
func (a *Archive) readRecords(ctx context.Context, b *Backend) error {
	own := a.layout.recordName(a.writer)
	folder := path.Dir(own)
	names, err := b.lister.below(ctx, folder, func(name string) bool {
		base := strings.TrimPrefix(name, folder+"/")
		return base != "" && !strings.Contains(base, "/")
	})
	if err != nil {
		return err
	}
	if !slices.Contains(names, own) {
		return fmt.Errorf("%s was stored and is not listed", own)
	}
	if a.peers.seen == nil {
		a.peers.seen = make(map[string]*peer)
	}
	for _, name := range names {
		if name == own {
			continue
		}
		text, err := b.Storage.Load(ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("loading %s: %w", name, err)
		}
		a.peers.meet(name, string(text))
	}
	return nil
}
