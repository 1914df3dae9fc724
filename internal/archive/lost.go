package archive

import (
	"encoding/hex"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// losses are the reports that were lost and are not logged yet.
type losses struct {
	reports int
	ids     []string    // of the first of them
	tell    *time.Timer // logs them
	next    time.Time   // when that may be
}

// maxLostIDs is the most that a line of the log names of the reports that are lost.
const maxLostIDs = 10

// Lose counts a report that is lost: Save had no room for it, and memory has it no longer. The log has a line about all that
// are lost, once a minute at most. id is what operators know the report by. If it is empty, the sum of the file is.
func (a *Archive) Lose(id string, r *task.Report) {
	a.Metrics.lost.Inc()
	if file := r.File(); id == "" && file != [32]byte{} {
		id = "sha256:" + hex.EncodeToString(file[:])
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	l := &a.lost
	if l.reports++; l.reports == 1 {
		l.tell.Reset(time.Until(l.next))
	}
	if id != "" && len(l.ids) < maxLostIDs {
		l.ids = append(l.ids, id)
	}
}

// tellLost logs what was lost since it last did. It runs apart from Lose, whose callers hold locks.
func (a *Archive) tellLost() {
	a.mu.Lock()
	reports, ids, b := a.lost.reports, a.lost.ids, a.current()
	if reports > 0 {
		a.lost.reports, a.lost.ids, a.lost.next = 0, nil, time.Now().Add(complainEvery)
	}
	a.mu.Unlock()
	if reports == 0 || b == nil {
		return
	}
	b.Logger.Warn("reports left memory while the queue to the storage was full, and are lost: "+
		"find out why the storage is slow or away, or raise max_size; request them again while an upstream has them",
		zap.Int("lost", reports), zap.Strings("ids", ids))
}
