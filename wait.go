package fsbroker

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// watches are the reports that callers of one handler wait for. However many wait for a report, one poller asks for it.
type watches struct {
	ctx  context.Context // all pollers'
	stop context.CancelFunc

	mu sync.Mutex // guards the map, and all watches in it
	of map[question]*watch
}

// watch is a report that is not finished, with those who wait until it is.
type watch struct {
	waiting int
	found   finding // the newest there is
	err     error   // the problem there was instead
	cancel  context.CancelFunc
	done    chan struct{} // closed when there is nothing more to wait for
}

func newWatches() *watches {
	ws := &watches{of: make(map[question]*watch)}
	ws.ctx, ws.stop = context.WithCancel(context.Background())
	return ws
}

// join makes a caller one of those who wait for what q asks, of which he has found something himself. For the first of
// them, poll is started.
func (ws *watches) join(q question, found finding, poll func(context.Context, question, *watch, finding)) *watch {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.of[q]
	if w == nil {
		ctx, cancel := context.WithCancel(ws.ctx)
		w = &watch{found: found, cancel: cancel, done: make(chan struct{})}
		ws.of[q] = w
		go poll(ctx, q, w, found)
	} else if found.at().After(w.found.at()) {
		w.found = found
	}
	w.waiting++
	return w
}

// leave is for a caller that waits no longer, and gives him the newest there is. When the last one leaves, the poller
// ends.
func (ws *watches) leave(q question, w *watch) (finding, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if w.waiting--; w.waiting == 0 {
		w.cancel()
		ws.forget(q, w)
	}
	return w.found, w.err
}

// note takes in what a poller has found, and tells whether there is nothing more to wait for.
func (ws *watches) note(q question, w *watch, found finding, err error) (over bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w.found, w.err = found, err
	if over = err != nil || found.entry.report().finished; over {
		ws.forget(q, w)
	}
	return over
}

// forget keeps others from joining w.
func (ws *watches) forget(q question, w *watch) {
	if ws.of[q] == w {
		delete(ws.of, q)
	}
}

// at is when a node or the broker said what was found.
func (f *finding) at() time.Time { return f.entry.value.since() }

// wait holds the answer to a caller who has found a report that is not finished, and would rather wait, until it is. A
// problem ends the wait as well, and so do the end of the caller's patience and of the server: then he gets the newest
// there is.
func (h *Handler) wait(w http.ResponseWriter, r *http.Request, q question, found finding) (finding, error) {
	patience := h.patience(r.Header, q)
	if patience == 0 {
		return found, nil
	}
	w.Header().Set("Preference-Applied", "wait="+wholeSeconds(patience))
	h.store.waiters.Add(1)
	defer h.store.waiters.Add(-1)
	timer := time.NewTimer(patience)
	defer timer.Stop()

	q = q.subject()
	joined := h.watches.join(q, found, h.poll)
	select {
	case <-joined.done:
	case <-timer.C:
	case <-r.Context().Done():
	}
	found, err := h.watches.leave(q, joined)
	if r.Context().Err() != nil {
		err = context.Cause(r.Context())
	}
	return found, err
}

// poll asks for a report, after it has been found unfinished, until it is finished, there is a problem, or ctx ends.
func (h *Handler) poll(ctx context.Context, q question, w *watch, found finding) {
	defer close(w.done)
	for over := false; !over; {
		select {
		case <-time.After(h.pause(found)):
		case <-ctx.Done():
			return
		}
		var err error
		found, err = h.find(ctx, q)
		if ctx.Err() != nil {
			return
		}
		over = h.watches.note(q, w, found, err)
	}
}

// pause is how long a poller waits before it asks again: until what was found is no longer kept. Where it came from the
// cache, that can be a little later than its age says, but never by much.
func (h *Handler) pause(found finding) time.Duration {
	interval := time.Duration(h.PollInterval)
	if !found.hit {
		return interval
	}
	return max(interval-time.Since(found.at()), interval/10)
}

// patience is how long a caller would wait, as far as that is allowed. What the query says comes before the header.
func (h *Handler) patience(header http.Header, q question) time.Duration {
	seconds := q.wait
	if !q.waitGiven {
		seconds = preferredWait(header)
	}
	return min(time.Duration(seconds)*time.Second, time.Duration(h.MaxWait))
}
