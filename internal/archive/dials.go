package archive

import (
	"context"
	"net/http/httptrace"
	"sync"
	"time"
)

// refusalPatience is how long the storage may take to connect elsewhere after a connection was refused: a name may have
// several addresses, and a storage several servers.
const refusalPatience = 250 * time.Millisecond

// dials watches the connections that an operation of the storage makes. Clients of many storages retry a refused connection
// for seconds, and may say in the end only that their time is over.
type dials struct {
	refused chan error // gets the error once if a connection was refused and none was made since

	mu      sync.Mutex
	err     error       // of the last connection, if it was refused
	verdict *time.Timer // calls judge; nil until a connection is refused
}

// watchDials returns a context for an operation, and what watches its connections: those that the standard library makes with
// that context.
func watchDials(ctx context.Context) (context.Context, *dials) {
	d := &dials{refused: make(chan error, 1)}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		ConnectDone: func(_, _ string, err error) { d.note(err) },
	}), d
}

// note notes how an attempt to connect has ended.
func (d *dials) note(err error) {
	if err != nil && !isRefusal(err) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
	if err != nil && d.verdict == nil {
		d.verdict = time.AfterFunc(refusalPatience, d.judge)
	}
}

// judge says that the storage refuses connections, unless one was made.
func (d *dials) judge() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.verdict = nil // the next refusal begins again
		return
	}
	d.refused <- d.err
}
