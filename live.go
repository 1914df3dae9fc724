package fsbroker

import (
	"slices"
	"sync"
)

// live are the handlers that are provisioned: for metrics, and the admin API.
var live = liveHandlers{}

type liveHandlers struct {
	mu       sync.Mutex
	handlers []*Handler
}

func (l *liveHandlers) add(h *Handler) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.handlers = append(l.handlers, h)
}

func (l *liveHandlers) remove(h *Handler) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.handlers = slices.DeleteFunc(l.handlers, func(other *Handler) bool { return other == h })
}

// all are the handlers at this moment.
func (l *liveHandlers) all() []*Handler {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.handlers)
}

// peerID is what an operator knows a node or the broker by.
type peerID struct{ role, name, host string }

// livePeer is a peer of a handler.
type livePeer struct {
	*peer
	handler *Handler
}

// peers are the nodes and brokers of all handlers. Several handlers may have the same one.
func (l *liveHandlers) peers() map[peerID][]livePeer {
	all := make(map[peerID][]livePeer)
	for _, h := range l.all() {
		for p := range h.peers() {
			id := peerID{p.role, p.name, p.base.Host}
			all[id] = append(all[id], livePeer{p, h})
		}
	}
	return all
}

// archives are the archives of all handlers.
func (l *liveHandlers) archives() []*archive {
	var all []*archive
	for _, h := range l.all() {
		if h.archive != nil && !slices.Contains(all, h.archive) {
			all = append(all, h.archive)
		}
	}
	return all
}

// cacheFigures say how full the cache is, and the queues to all storages together.
func (l *liveHandlers) cacheFigures() (memory memoryFigures, storage storageFigures) {
	if all := l.all(); len(all) > 0 {
		memory = all[0].store.figures() // that all share
	}
	for _, a := range l.archives() {
		storage.add(a.figures())
	}
	return memory, storage
}
