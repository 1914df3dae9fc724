package harvest

import "github.com/caddy-fsbroker/caddy-fsbroker/internal/guard"

// maxTelling is the number of calls of Source.Finished at once.
const maxTelling = 16

// startTelling starts a goroutine that tells what is to be told, unless there are enough. Those of another source do not
// count: its handler may hang. The caller holds the mutex.
func (f *Follower) startTelling() {
	if s := f.source(); len(f.untold) > 0 && s != nil && s.tellers < maxTelling {
		s.tellers++
		go f.tellAll(s) // nobody waits for it: the handler of an event may wait for another configuration
	}
}

// tellAll tells what is to be told, until another source is used.
func (f *Follower) tellAll(s *Source) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { s.tellers-- }()
	for len(f.untold) > 0 && f.source() == s && !s.paused && !f.closed {
		it := f.untold[0]
		f.untold = f.untold[1:]
		if s.Finished != nil {
			target := it.Target
			f.mu.Unlock()
			_ = guard.Do(s.Logger, func() error { s.Finished(target); return nil }) // it has returned in either case
			f.mu.Lock()
		}
		it.telling, it.Told = false, true
		for _, n := range it.notes {
			f.notebook.touch(n)
		}
		if it.over && f.items[it.ID] == it {
			f.end(s, it, ending{how: endedFinished})
		}
	}
}
