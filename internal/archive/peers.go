package archive

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// missedBeats is the number of renewals of its record that an instance may miss before it counts as ended.
const missedBeats = 4

// peers is what an instance knows of the others that use the same storage and namespace. Each keeps a record in the
// storage. The longest retention of all that live decides when values are deleted.
type peers struct {
	mu      sync.Mutex
	seen    map[string]*peer // by the name of the record
	longest time.Duration
	beat    int
}

// peer is another instance.
type peer struct {
	record  string
	changed time.Time // when its record was last seen to have changed, by the monotonic clock
	warned  bool
}

// record is what an instance says about itself.
type record struct {
	Retention time.Duration `json:"retention_ns"`
	Interval  time.Duration `json:"interval_ns"` // at which the record is renewed
	Beat      int           `json:"beat"`        // grows with each renewal
}

// retention returns how long values are kept: the longest retention of all instances.
func (a *Archive) retention(b *Backend) time.Duration {
	a.peers.mu.Lock()
	defer a.peers.mu.Unlock()
	return max(b.Retention, a.peers.longest)
}

// meetPeers renews the record of this instance, and reads those of the others. A record that has not changed for a while
// is that of an instance that has ended.
func (a *Archive) meetPeers(ctx context.Context, b *Backend) error {
	own := a.layout.recordName(a.writer)
	a.peers.beat++
	text, err := json.Marshal(record{Retention: b.Retention, Interval: sweepInterval(b.Retention), Beat: a.peers.beat})
	if err != nil {
		return err
	}
	if err := b.Storage.Store(ctx, own, text); err != nil {
		return fmt.Errorf("storing %s: %w", own, err)
	}
	folder := path.Dir(own)
	names, err := listBelow(ctx, b.Storage, folder, func(name string) bool {
		base := strings.TrimPrefix(name, folder+"/")
		return base != "" && !strings.Contains(base, "/")
	})
	if err != nil {
		return err
	}
	longest := time.Duration(0)
	seen := make(map[string]*peer)
	for _, name := range names {
		if name == own {
			continue
		}
		p, retention, err := a.meet(ctx, b, name)
		if err != nil {
			return err
		}
		if p != nil {
			seen[name] = p
			longest = max(longest, retention)
		}
	}
	a.peers.mu.Lock()
	defer a.peers.mu.Unlock()
	a.peers.seen, a.peers.longest = seen, longest
	return nil
}

// meet reads the record of another instance. It returns nil if the instance has ended.
func (a *Archive) meet(ctx context.Context, b *Backend, name string) (*peer, time.Duration, error) {
	text, err := b.Storage.Load(ctx, name)
	if err != nil {
		return nil, 0, ignoreNotExist(err)
	}
	now := time.Now()
	p := a.peers.seen[name]
	if p == nil || p.record != string(text) {
		warned := p != nil && p.warned
		p = &peer{record: string(text), changed: now, warned: warned}
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		r = record{} // of another version
	}
	if now.Sub(p.changed) > missedBeats*max(r.Interval, sweepInterval(b.Retention)) {
		return nil, 0, ignoreNotExist(b.Storage.Delete(ctx, name))
	}
	if r.Retention > 0 && r.Retention != b.Retention && !p.warned {
		p.warned = true
		b.Logger.Warn("another instance uses this namespace of the storage with another retention: the longer one counts while both run",
			zap.Duration("retention", b.Retention), zap.Duration("other", r.Retention), zap.String("instance", name))
	}
	return p, r.Retention, nil
}
