package fsbroker

import (
	"sync"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// recentKeys is a set of keys of a bounded size: it forgets those that were added long ago. The zero value is empty.
type recentKeys struct {
	mu         sync.Mutex
	young, old map[task.Key]struct{}
}

// maxRecent is the number of keys of a generation. The older of two generations is forgotten when the younger is full.
const maxRecent = 8192

func (r *recentKeys) has(k task.Key) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, young := r.young[k]
	_, old := r.old[k]
	return young || old
}

func (r *recentKeys) add(k task.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.young == nil || len(r.young) >= maxRecent {
		r.young, r.old = make(map[task.Key]struct{}), r.young
	}
	r.young[k] = struct{}{}
}

func (r *recentKeys) remove(k task.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.young, k)
	delete(r.old, k)
}
