package fsbroker_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"runtime/metrics"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/caddyserver/caddy/v2"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

var soakFor = flag.Duration("soak", 0, "how long TestSoak runs")

// TestSoak mixes callers of several namespaces with faults of the nodes, the broker and the storage, reloads and restarts.
// It asserts all the time that
//
//   - a finished report that a caller got is answered again, byte for byte, for as long as its namespace keeps it. The
//     excuses are a storage that fails at that moment, and memory that is used up. The response must say so.
//   - no caller gets a document of another namespace: every document names the namespace with whose secret a node was asked.
//   - the heap stays within its bound.
//   - no response and no log holds a secret, although one node sends back what it was asked.
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("to run it, set a time: -soak 10m")
	}
	s := newSoak(t)
	ctx, cancel := context.WithTimeout(t.Context(), *soakFor)
	defer cancel()
	var wg sync.WaitGroup
	repeatedly := func(callers int, call func(context.Context, *soakNamespace)) {
		for i := range callers {
			wg.Go(func() {
				for ; ctx.Err() == nil; i++ {
					call(ctx, s.namespaces[i%len(s.namespaces)])
				}
			})
		}
	}
	repeatedly(6, s.callRecent)
	repeatedly(4, s.callAgain)
	repeatedly(3, s.wait)
	repeatedly(3, s.callLiar)
	repeatedly(4, s.callStaller)
	repeatedly(3, s.upload)
	for _, ns := range s.namespaces {
		for range ns.slowReaders {
			wg.Go(func() {
				for ctx.Err() == nil {
					s.readSlowly(ctx, ns)
				}
			})
		}
	}
	wg.Go(func() { s.watch(ctx) })
	s.disturb(ctx)
	wg.Wait()
	s.callAll()
	s.wantIdle()
	s.summarize()
	s.restart() // which also closes idle connections to the upstreams
	eventually(t, "the goroutines of callers to end", func() bool { return runtime.NumGoroutine() <= s.goroutines+20 })
	s.callAll()
	s.wantNoSecretInLog()
}

// soakNamespace is a namespace, what it promises, and what callers got from it.
type soakNamespace struct {
	name        string
	secret      string // of its nodes and its broker
	options     string
	stored      bool
	keeps       time.Duration // how long a finished report is kept: the retention, or the TTL without a storage
	maxSize     int64
	slowReaders int // of the largest reports, which have room together

	mu        sync.Mutex
	seen      map[reportID]promise
	evictions atomic.Uint64 // when the watcher last looked
	most      atomic.Int64  // bytes in memory
}

// reportID names a report in a namespace: of the task t<n>, of the submission s<n>, or of a node's lie l<n>.
type reportID struct {
	kind byte
	n    int64
	all  bool
}

// promise is what memory alone can lose: a report is there as long as neither number has changed.
type promise struct {
	restarts  int64
	evictions uint64
}

const (
	maxSeen     = 1500                    // reports of a namespace that the model remembers
	taskEvery   = 25 * time.Millisecond   // there is a new task, and a new submission
	nodeForgets = 6 * time.Second         // after it was submitted
	largeEvery  = 128                     // of the tasks
	largeSize   = 4 * mib                 // of those; the kernel buffers up to 3 MiB for a slow reader
	largeSpread = 64 << 10                // they have different sizes
	soakLimit   = 5 * mib                 // max_report
	excusable   = 1500 * time.Millisecond // after a fault of the storage: it is not read for fail_duration
)

// newSoakNamespaces returns the namespaces. Two of them share a storage. They differ in everything else as well.
func newSoakNamespaces() []*soakNamespace {
	all := []*soakNamespace{
		{
			name: "brief", stored: true, keeps: 30 * 24 * time.Hour, maxSize: 48 * mib, slowReaders: 9,
			options: "timeout 1s\n poll_interval 20ms\n fail_duration 100ms",
		},
		{
			name: "lasting", stored: true, keeps: 20 * time.Second, maxSize: 24 * mib, slowReaders: 4,
			options: "timeout 2s\n poll_interval 50ms\n fail_duration 300ms\n harvest",
		},
		{
			name: "fleeting", keeps: 4 * time.Second, maxSize: 48 * mib, slowReaders: 9,
			options: "timeout 1500ms\n poll_interval 100ms\n fail_duration 200ms\n health_interval 500ms",
		},
	}
	cache := map[string]string{
		"brief":    "ttl 2s\n storage faulty",
		"lasting":  "ttl 1h\n storage faulty\n retention 20s",
		"fleeting": "ttl 4s",
	}
	for _, ns := range all {
		ns.secret = "the-secret-of-" + ns.name + "-nodes"
		ns.options += fmt.Sprintf("\n max_report %d\n", soakLimit) +
			inNamespace(ns.name, fmt.Sprintf("max_size %d\n %s", ns.maxSize, cache[ns.name]))
		ns.seen = make(map[reportID]promise)
	}
	return all
}

// soak is the model: what happened, and what must be true because of it.
type soak struct {
	*adminSite
	namespaces []*soakNamespace
	secrets    [][]byte
	directives string
	began      time.Time
	slowClient *http.Client
	bomb       []byte // a large document of blanks, compressed
	baseline   int64  // the heap without what the namespaces keep
	goroutines int

	running   sync.RWMutex // callers hold it for reading, a restart of Caddy for writing
	restarts  atomic.Int64
	lifetime  atomic.Pointer[context.Context] // ends when Caddy is restarted
	endLife   context.CancelFunc
	failing   atomic.Bool  // the storage
	failed    atomic.Int64 // when the storage last failed, since the beginning
	peak      atomic.Int64 // of the heap
	uncounted atomic.Int64 // the largest part of the heap that no namespace counts
	arrived   sync.Map     // the uploads that the broker has got

	requests, finished, repeats, excused, expired, lost, unchanged, slow, waits, lies, stalls, faults, reloads, uploads, refusedUploads atomic.Int64
}

// newSoak starts the upstreams, and a site for each namespace, and a second one for the first.
func newSoak(t *testing.T) *soak {
	fault.dir = storageDir(t)
	s := &soak{namespaces: newSoakNamespaces(), began: time.Now(), bomb: bomb()}
	for _, secret := range allSecrets {
		s.secrets = append(s.secrets, []byte(secret))
	}
	start := func(handler http.HandlerFunc) string {
		server := httptest.NewServer(handler)
		t.Cleanup(server.Close)
		return server.URL
	}
	node, broker, liar, staller := start(s.asUpstream(s.node)), start(s.asUpstream(s.broker)), start(s.asUpstream(s.lie)), start(s.asUpstream(s.stall))
	for _, ns := range s.namespaces {
		variable := strings.ToUpper(ns.name) + "_SECRET"
		t.Setenv(variable, ns.secret)
		s.secrets = append(s.secrets, []byte(ns.secret))
		ns.options += "\n"
		for name, address := range map[string]string{"node node-1": node, "broker": broker, "node liar": liar, "node staller": staller} {
			ns.options += fmt.Sprintf("%s %s {env.%s}", name, address, variable)
			if name == "broker" {
				ns.options += " {\n proxy /submit\n }"
			}
			ns.options += "\n"
		}
		directive := fmt.Sprintf("{\n secret tester {env.CALLER_SECRET}\n %s }\n", ns.options)
		s.directives += fmt.Sprintf("fsbroker_task /%[1]s %[2]s handle_path /upload/%[1]s/* {\n fsbroker_task %[2]s }\n", ns.name, directive)
	}
	s.directives += fmt.Sprintf("fsbroker_task /again/%s {\n secret another {env.CALLER_SECRET}\n max_wait 1s\n %s }\n", s.namespaces[0].name, s.namespaces[0].options)
	s.adminSite = newAdminSite(t, "")
	s.servePlainly() // Caddy has a data race between a TLS handshake and a reload
	s.load(s.directives)
	s.trust()
	s.client.Timeout = 0
	s.slowClient = &http.Client{Transport: s.client.Transport.(*http.Transport).Clone()}
	s.slowClient.Transport.(*http.Transport).DialContext = s.dialSlow
	t.Cleanup(s.slowClient.CloseIdleConnections)
	s.newLifetime()
	for _, ns := range s.namespaces { // a warm-up, before memory is measured
		for range 20 {
			s.callRecent(t.Context(), ns)
		}
	}
	s.baseline, s.goroutines = liveHeap(), runtime.NumGoroutine()
	for _, stats := range s.stats() {
		s.baseline -= stats.Bytes
	}
	return s
}

// newLifetime begins the time until the next restart.
func (s *soak) newLifetime() {
	ctx, cancel := context.WithCancel(s.t.Context())
	s.endLife = cancel
	s.lifetime.Store(&ctx)
}

// Documents.

// noise is text that gzip makes a quarter smaller. It repeats only beyond the reach of gzip.
var noise = sync.OnceValue(func() []byte {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"
	text := make([]byte, mib+1)
	_, _ = rand.NewChaCha8([32]byte{}).Read(text)
	for i, c := range text {
		text[i] = alphabet[c%64]
	}
	return text
})

// soakDocument is a document that is made while it is read, so that neither nodes nor callers hold it. All but its
// beginning is one JSON string.
type soakDocument struct {
	head, tail string
	size       int
	offset     int // of the string in the noise, or -1 for a string that gzip makes tiny
	read       int
}

// Read implements io.Reader.
func (d *soakDocument) Read(p []byte) (n int, err error) {
	for n < len(p) {
		var copied int
		body := d.read - len(d.head)
		switch left := d.size - len(d.tail) - d.read; {
		case d.read == d.size:
			return n, io.EOF
		case body < 0:
			copied = copy(p[n:], d.head[d.read:])
		case left <= 0:
			copied = copy(p[n:], d.tail[-left:])
		case d.offset < 0:
			p[n], copied = 'a', 1
			for copied < min(left, len(p)-n) {
				copied += copy(p[n+copied:n+min(left, len(p)-n)], p[n:n+copied])
			}
		default:
			copied = copy(p[n:min(len(p), n+left)], noise()[(d.offset+body)%len(noise()):])
		}
		n, d.read = n+copied, d.read+copied
	}
	return n, nil
}

// bomb returns a document of blanks that is longer than max_report when it is inflated.
func bomb() []byte {
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	_, _ = io.CopyN(zw, blanks{}, 4*soakLimit)
	_ = zw.Close()
	return buf.Bytes()
}

// document returns the finished report. It is always the same, and has up to 4 MiB.
func (ns *soakNamespace) document(id reportID) *soakDocument {
	if id.kind == 's' && id.n%3 == 1 {
		id.kind = 't' // the submission became that task
	}
	h := fnv.New64a()
	fmt.Fprint(h, ns.name, id)
	random := int(h.Sum64() >> 2)
	d := &soakDocument{
		head: fmt.Sprintf(`{"processTime":7,"result":{"taskReference":{"ID":"%c%d","state":"SUCCESS"},"namespace":"%s","all":%t,"text":"`, id.kind, id.n, ns.name, id.all),
		tail: `"}}`, offset: random % len(noise()),
	}
	switch {
	case id.kind == 'l' && id.n%2 == 0: // what the lying node compresses well
		d.size, d.offset = 2*mib, -1
	case id.isLarge():
		d.size = largeSize + random%largeSpread
	case random%20 < 15:
		d.size = 500 + random%30_000
	case random%20 < 19:
		d.size = 64<<10 + random%(192<<10)
	default:
		d.size = mib/2 + random%(mib/2)
	}
	return d
}

// isLarge reports whether the report is one of the largest.
func (id reportID) isLarge() bool { return id.kind == 't' && id.n%largeEvery == largeEvery/2 }

// mayBeFresh reports whether callers ask for the report with nocache. Others who come at the same time share that call, and
// its problem, if memory does not have the report, although the storage may. So these reports are not promised then.
func (id reportID) mayBeFresh(ns *soakNamespace) bool { return !ns.stored || id.n%8 == 0 }

// progress returns the unfinished report.
func (ns *soakNamespace) progress(id reportID) string {
	return fmt.Sprintf(`{"result":{"taskReference":{"ID":"%c%d","state":"SUCCESS"},"subtaskReferences":[{"state":"IN_PROGRESS"}],"namespace":"%s","all":%t}}`,
		id.kind, id.n, ns.name, id.all)
}

// etag returns the entity tag of the finished report, inflated.
func (ns *soakNamespace) etag(id reportID) string {
	sum := sha256.New()
	_, _ = io.Copy(sum, ns.document(id))
	return `"` + hex.EncodeToString(sum.Sum(nil)[:16]) + `"`
}

// submitted returns when a task was submitted, since the beginning.
func (id reportID) submitted() time.Duration { return time.Duration(id.n) * taskEvery }

// finishedAt returns when it is finished.
func (id reportID) finishedAt() time.Duration {
	return id.submitted() + time.Duration(id.n%40)*40*time.Millisecond
}

// now returns the time since the beginning.
func (s *soak) now() time.Duration { return time.Since(s.began) }

// The upstreams, which all namespaces share.

// asUpstream returns a handler that knows the namespace by the secret that it was asked with.
func (s *soak) asUpstream(respond func(http.ResponseWriter, *http.Request, *soakNamespace, reportID)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/system-info":
			systemInfo(w, r)
			return
		case "/submit":
			s.accept(w, r)
			return
		}
		query := r.URL.Query()
		name := query.Get("submitID") + query.Get("taskID")
		id := reportID{all: query.Get("all") == "true"}
		_, _ = fmt.Sscanf(name, "%c%d", &id.kind, &id.n)
		for _, ns := range s.namespaces {
			if r.Header.Get("secret") == ns.secret {
				respond(w, r, ns, id)
				return
			}
		}
		s.t.Errorf("an upstream was asked with another secret: %v", r.Header)
	}
}

// node responds like a node, sometimes with a fault. It knows the newest tasks only.
func (s *soak) node(w http.ResponseWriter, r *http.Request, ns *soakNamespace, id reportID) {
	if rand.IntN(8) == 0 {
		s.fault(w, r)
		return
	}
	s.respond(w, ns, id)
}

// respond responds with what is known of a task or a submission at that time.
func (s *soak) respond(w http.ResponseWriter, ns *soakNamespace, id reportID) {
	switch now := s.now(); {
	case now < id.submitted() || now > id.submitted()+nodeForgets:
		w.WriteHeader([]int{http.StatusNotFound, http.StatusGone}[id.n%2])
	case now >= id.finishedAt():
		_, _ = io.Copy(w, ns.document(id))
	case id.n%3 == 0:
		w.WriteHeader(http.StatusNoContent)
	default:
		_, _ = io.WriteString(w, ns.progress(id))
	}
}

// fault responds with one of the faults of a node that means well.
func (s *soak) fault(w http.ResponseWriter, r *http.Request) {
	s.faults.Add(1)
	switch rand.IntN(6) {
	case 0:
		w.WriteHeader(http.StatusInternalServerError)
	case 1:
		_, _ = io.WriteString(w, `{"result":{"taskRef`)
	case 2:
		_, _ = io.CopyN(w, blanks{}, 256<<10)
	case 3:
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	case 4:
		if rand.IntN(10) == 0 {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	case 5:
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

// blanks is an endless document of blanks.
type blanks struct{}

// Read implements io.Reader.
func (blanks) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// broker responds like a broker, sometimes with a fault. A third of the submissions become tasks of node-1. It keeps the
// reports of a few tasks.
func (s *soak) broker(w http.ResponseWriter, r *http.Request, ns *soakNamespace, id reportID) {
	explains := r.URL.Path == "/submit-result"
	switch {
	case rand.IntN(10) == 0:
		s.fault(w, r)
	case id.kind == 's' && id.n%3 == 1 && !explains, id.kind == 't' && id.n%5 > 0, id.kind != 's' && id.kind != 't':
		w.WriteHeader(http.StatusNotFound)
	case !explains:
		s.respond(w, ns, id)
	case s.now() < id.submitted()+200*time.Millisecond:
		_, _ = io.WriteString(w, `{"state":"QUEUED"}`)
	case s.now() > id.submitted()+nodeForgets:
		w.WriteHeader(http.StatusNotFound)
	default:
		_, _ = fmt.Fprintf(w, `{"state":"SUCCESS","appServerID":"node-1","taskID":"t%d"}`, id.n)
	}
}

// lies are the responses of the lying node that are sent as they are. SECRET stands for that which it was asked with.
var lies = []string{
	"SECRET\r\n\r\n",
	"HTTP/1.1 SECRET\r\n\r\n",
	"HTTP/1.1 500 SECRET\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nS\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: SECRET\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: SECRET\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Encoding: SECRET\r\nContent-Length: 2\r\n\r\n{}",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nS\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{\"result\":{\"SECRET\":\"",
	"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{\"result\":{\"",
	"HTTP/1.1 200 OK\r\nContent-Length: 8000000\r\n\r\n{\"result\":{\"",
	"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{\"result\":{\"taskReference\":{\"state\":\"SUCCESS\"}}}",
	"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
	"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
	"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n{",
	"HTTP/1.1 204 No Content\r\nContent-Length: 500\r\n\r\n{\"result\":",
	"HTTP/1.1 302 Found\r\nLocation: /task?secret=SECRET\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 503 Unavailable\r\nRetry-After: SECRET\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
	"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\xef\xbb\xbf",
	strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: SECRET\r\n\r\n", 20) + "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
	"HTTP/1.1 200 OK\r\n" + strings.Repeat("X-Long: "+strings.Repeat("x", 1000)+"\r\n", 200) + "Content-Length: 2\r\n\r\n[]",
}

// lie responds in a way that no node should. The one honest response is a document that is compressed.
func (s *soak) lie(w http.ResponseWriter, _ *http.Request, ns *soakNamespace, id reportID) {
	s.lies.Add(1)
	choice := rand.IntN(len(lies) + 6)
	if choice >= len(lies)+3 && rand.IntN(4) > 0 {
		choice = 0 // to read a large document takes time
	}
	switch choice {
	default:
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			s.t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, strings.ReplaceAll(lies[choice], "SECRET", ns.secret))
	case len(lies) + 3: // an endless document
		_, _ = io.WriteString(w, `{"result":{"taskReference":{"state":"SUCCESS"},"text":"`)
		_, _ = io.Copy(w, &soakDocument{size: 1 << 40})
	case len(lies) + 4: // one that is endless when it is inflated
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(s.bomb)
	case len(lies) + 5: // a part of that
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(s.bomb[:len(s.bomb)/2])
	case len(lies): // a deep document
		_, _ = io.WriteString(w, strings.Repeat(`{"result":[`, 100_000))
	case len(lies) + 1: // a document that breaks off
		_, _ = io.CopyN(w, ns.document(id), 300)
		panic(http.ErrAbortHandler)
	case len(lies) + 2:
		w.Header().Set("Content-Encoding", "gzip")
		zw := gzip.NewWriter(w)
		_, _ = io.Copy(zw, ns.document(id))
		_ = zw.Close()
	}
}

// stall sends a part of a document, at most, and stalls.
func (s *soak) stall(w http.ResponseWriter, r *http.Request, ns *soakNamespace, id reportID) {
	s.stalls.Add(1)
	large := reportID{kind: 't', n: largeEvery / 2}
	switch id.n % 4 {
	case 1:
		w.Header().Set("Content-Length", fmt.Sprint(soakLimit))
		_, _ = io.CopyN(w, ns.document(large), mib)
	case 2:
		_, _ = io.CopyN(w, ns.document(large), 200<<10)
	case 3: // never quite silent
		for document := ns.document(large); r.Context().Err() == nil; time.Sleep(20 * time.Millisecond) {
			_, _ = io.CopyN(w, document, 1000)
			_ = http.NewResponseController(w).Flush()
		}
	}
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
}

// The callers.

// call is a request and what is special about it.
type call struct {
	id     reportID
	path   string // of another site
	node   string // of the task, by default node-1
	method string
	accept string
	query  string
	etag   string        // for If-None-Match
	slow   time.Duration // reads slowly for that time
	leaves bool          // then leaves
}

// recent returns the report of a task or a submission that may not be finished yet.
func (s *soak) recent(kind byte) reportID {
	last := int64(s.now() / taskEvery)
	return reportID{kind: kind, n: max(0, last-rand.Int64N(int64(nodeForgets/taskEvery))), all: rand.IntN(2) == 0}
}

// anyEncoding returns a value for Accept-Encoding.
func anyEncoding() string { return []string{"", "gzip"}[rand.IntN(2)] }

// callRecent calls for a recent task or submission. Some callers leave before they get the response.
func (s *soak) callRecent(ctx context.Context, ns *soakNamespace) {
	time.Sleep(rand.N(3 * time.Millisecond))
	c := call{id: s.recent("ttts"[rand.IntN(4)]), accept: anyEncoding()}
	if ns == s.namespaces[0] && rand.IntN(2) == 0 {
		c.path = "/again"
	}
	switch rand.IntN(20) {
	case 0:
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, rand.N(2*time.Millisecond))
		defer cancel()
	case 1:
		c.method = http.MethodHead
	}
	if c.id.mayBeFresh(ns) && rand.IntN(4) == 0 {
		c.query = "&nocache"
	}
	s.call(ctx, ns, c)
}

// callAgain calls for a report that a caller got before.
func (s *soak) callAgain(ctx context.Context, ns *soakNamespace) {
	time.Sleep(rand.N(3 * time.Millisecond))
	id, ok := ns.anySeen()
	if !ok {
		return
	}
	c := call{id: id, accept: anyEncoding()}
	switch rand.IntN(10) {
	case 0, 1, 2:
		c.method = http.MethodHead
	case 3:
		c.etag, c.accept = ns.etag(id), ""
	}
	if id.mayBeFresh(ns) && rand.IntN(4) == 0 {
		c.query = "&nocache"
	}
	s.call(ctx, ns, c)
}

// wait waits for a task that is not finished, or leaves.
func (s *soak) wait(ctx context.Context, ns *soakNamespace) {
	s.waits.Add(1)
	id := s.recent("ts"[rand.IntN(2)])
	id.n = int64(s.now() / taskEvery)
	if rand.IntN(4) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, rand.N(time.Second))
		defer cancel()
	}
	s.call(ctx, ns, call{id: id, accept: anyEncoding(), query: "&wait=2"})
}

// callLiar calls for a task of the lying node.
func (s *soak) callLiar(ctx context.Context, ns *soakNamespace) {
	time.Sleep(rand.N(20 * time.Millisecond))
	s.call(ctx, ns, call{id: reportID{kind: 'l', n: rand.Int64N(1000)}, node: "liar", accept: anyEncoding(), query: []string{"", "&nocache"}[rand.IntN(2)]})
}

// callStaller calls for a task of the stalling node, and may leave before the timeout.
func (s *soak) callStaller(ctx context.Context, ns *soakNamespace) {
	if rand.IntN(2) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, rand.N(time.Second))
		defer cancel()
	}
	s.call(ctx, ns, call{id: reportID{kind: 'x', n: rand.Int64N(1 << 40)}, node: "staller"})
}

// readSlowly calls for a large report and reads a few KiB of it in a second. Most callers leave in the end.
func (s *soak) readSlowly(ctx context.Context, ns *soakNamespace) {
	life := *s.lifetime.Load()
	id := s.recent('t')
	if ns.stored && rand.IntN(2) == 0 {
		id.n = rand.Int64N(id.n + 1)
	}
	id.n += largeEvery/2 - id.n%largeEvery
	slowly, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(life, cancel)()
	accept := "gzip"
	if rand.IntN(4) == 0 { // a smaller one: what is inflated piece by piece for a slow reader is not counted
		accept = ""
		id.n++
	}
	if !s.call(slowly, ns, call{id: id, accept: accept, slow: time.Second + rand.N(15*time.Second), leaves: rand.IntN(4) > 0}) {
		time.Sleep(100 * time.Millisecond)
	}
}

// anySeen returns a report that a caller got.
func (ns *soakNamespace) anySeen() (reportID, bool) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for id := range ns.seen { // in no order
		return id, true
	}
	return reportID{}, false
}

// remember records that a caller got a finished report. The model forgets others when it has too many.
func (ns *soakNamespace) remember(id reportID, p promise) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.seen[id] = p
	for other := range ns.seen {
		if len(ns.seen) <= maxSeen {
			return
		}
		delete(ns.seen, other)
	}
}

// forget ends a promise.
func (ns *soakNamespace) forget(id reportID) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	delete(ns.seen, id)
}

// promised returns the promise that a report will be there, if a caller got it.
func (ns *soakNamespace) promised(id reportID) (promise, bool) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	p, ok := ns.seen[id]
	return p, ok
}

// mustHave reports whether a report that a caller got must still be there.
func (s *soak) mustHave(ns *soakNamespace, id reportID, p promise) bool {
	if s.now() > id.finishedAt()+ns.keeps-time.Second {
		return false // it was answered at this time or later
	}
	if ns.stored {
		return true
	}
	return p.restarts == s.restarts.Load() && p.evictions == s.stats()[ns.name].Evictions
}

// call sends a request and checks the response. If the storage is to blame, or there is no memory to read the report, it
// tries again until that is over. It reports whether the response was a finished report.
func (s *soak) call(ctx context.Context, ns *soakNamespace, c call) bool {
	if c.slow == 0 {
		s.running.RLock()
		defer s.running.RUnlock()
	}
	for {
		before := promise{s.restarts.Load(), ns.evictions.Load()}
		promised, isPromised := ns.promised(c.id)
		start := s.now()
		got, problem, err := s.exchange(ctx, ns, c)
		if err != nil {
			if c.slow == 0 && ctx.Err() == nil {
				s.t.Errorf("%s %+v: %v", ns.name, c, err)
			}
			return false
		}
		inTime := before.restarts == s.restarts.Load()
		switch {
		case got && inTime:
			s.finished.Add(1)
			if isPromised {
				s.repeats.Add(1)
			}
			if c.id.kind != 'l' && (!ns.stored || !c.id.mayBeFresh(ns)) && c.method == "" && c.etag == "" && problem == "" {
				ns.remember(c.id, before)
			}
			return true
		case got || !inTime || !isPromised || strings.Contains(c.query, "nocache"):
			return got
		case !s.mustHave(ns, c.id, promised):
			s.expired.Add(1)
			ns.forget(c.id)
			return false
		case ns.stored && s.storageFailed(start) && (c.method == http.MethodHead || strings.Contains(problem, "the storage that may have it cannot be read")),
			strings.Contains(problem, `"code":"busy"`): // what is read for others uses up the memory
			s.excused.Add(1)
			select {
			case <-ctx.Done():
				return false
			case <-time.After(50 * time.Millisecond):
				continue
			}
		}
		s.lost.Add(1)
		s.t.Errorf("%s %+v is lost, %s after it was finished, %s after the storage failed: %s",
			ns.name, c, s.now()-c.id.finishedAt(), s.now()-time.Duration(s.failed.Load()), problem)
		return false
	}
}

// storageFailed reports whether the storage has failed since a time, or so shortly before that it is not read again yet.
func (s *soak) storageFailed(since time.Duration) bool {
	return s.failing.Load() || time.Duration(s.failed.Load()) > since-excusable
}

// exchange sends a request and checks the response against the model of the upstreams. got means that it was the whole
// finished report, or stands for it; problem says then if it is not kept. Otherwise problem is what came instead. An error
// means that there was no whole response.
func (s *soak) exchange(ctx context.Context, ns *soakNamespace, c call) (got bool, problem string, err error) {
	s.requests.Add(1)
	path := fmt.Sprintf("%s/%s?submitID=s%d", c.path, ns.name, c.id.n)
	if c.id.kind != 's' {
		node := "node-1"
		if c.node != "" {
			node = c.node
		}
		path = fmt.Sprintf("%s/%s?appServerID=%s&taskID=%c%d", c.path, ns.name, node, c.id.kind, c.id.n)
	}
	if c.id.all {
		path += "&all"
	}
	req, err := http.NewRequestWithContext(ctx, c.method, s.base+path+c.query, nil)
	if err != nil {
		return false, "", err
	}
	req.Header.Set("Authorization", "Bearer "+callerSecret)
	req.Header.Set("Accept-Encoding", c.accept)
	if c.etag != "" {
		req.Header.Set("If-None-Match", c.etag)
	}
	client := s.client
	if c.slow > 0 {
		client = s.slowClient
	}
	resp, err := send(client, req)
	if err != nil {
		return false, "", err
	}
	defer resp.Body.Close()
	s.wantNoSecret(fmt.Appendf(nil, "%v", resp.Header))
	switch {
	case resp.StatusCode == http.StatusNotModified && c.etag != "":
		s.unchanged.Add(1)
		return true, "", nil
	case resp.StatusCode != http.StatusOK:
		text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		s.wantNoSecret(text)
		return false, fmt.Sprintf("status %d: %s", resp.StatusCode, text), err
	case resp.Header.Get("Cache-Control") == "no-store":
		text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		whole := c.method == "" && resp.Header.Get("Content-Encoding") == "" && err == nil
		if whole && string(text) != ns.progress(c.id) && string(text) != ns.progress(reportID{'t', c.id.n, c.id.all}) {
			s.t.Errorf("%s %+v: the unfinished report is another: %s", ns.name, c, text)
		}
		return false, "an unfinished report", err
	case s.now() < c.id.finishedAt() && c.id.kind != 'l':
		s.t.Errorf("%s %+v is finished too early", ns.name, c)
	}
	want := ns.document(c.id)
	encoding := resp.Header.Get("Content-Encoding")
	if encoding == "" && resp.ContentLength != int64(want.size) || encoding != "" && c.accept == "" {
		s.t.Errorf("%s %+v: %v, want a length of %d", ns.name, c, resp.Header, want.size)
	}
	if status := resp.Header.Get("Cache-Status"); !strings.Contains(status, "stored") && !strings.Contains(status, "hit") && !ns.stored {
		problem = "it is not kept"
	}
	if c.method == http.MethodHead {
		return true, problem, nil
	}
	var body io.Reader = resp.Body
	if c.slow > 0 {
		s.slow.Add(1)
		body = &slowReader{src: body, until: time.Now().Add(c.slow), leaves: c.leaves}
	}
	if encoding == "gzip" {
		if body, err = gzip.NewReader(body); err != nil {
			return false, "", err
		}
	}
	if err = sameText(body, want); errors.Is(err, errOther) {
		s.t.Errorf("%s %+v: %v", ns.name, c, err)
	}
	return err == nil, problem, err
}

// wantNoSecret checks a part of a response.
func (s *soak) wantNoSecret(text []byte) {
	for _, secret := range s.secrets {
		if bytes.Contains(text, secret) {
			s.t.Errorf("a response holds a secret: %s", text)
		}
	}
}

// slowReader reads 4 KiB in half a second, until a time. Then it leaves, or reads the rest.
type slowReader struct {
	src    io.Reader
	until  time.Time
	leaves bool
}

var errLeft = errors.New("the reader has left")

// Read implements io.Reader.
func (r *slowReader) Read(p []byte) (int, error) {
	if time.Now().Before(r.until) {
		time.Sleep(time.Second / 2)
	} else if r.leaves {
		return 0, errLeft
	}
	return r.src.Read(p[:min(len(p), 4<<10)])
}

var errOther = errors.New("the document is another")

// sameText compares two documents, without holding them.
func sameText(got, want io.Reader) error {
	var g, w [8 << 10]byte
	for at := 0; ; {
		n, err := got.Read(g[:])
		m, _ := io.ReadFull(want, w[:n])
		if !bytes.Equal(g[:n], w[:m]) {
			return fmt.Errorf("%w: at %d, got %.200q, want %.200q", errOther, at, g[:n], w[:m])
		}
		at += n
		if errors.Is(err, io.EOF) {
			if n, _ = want.Read(w[:1]); n > 0 {
				return fmt.Errorf("%w: it ends at %d", errOther, at)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// disturb makes the storage fail, reloads and restarts Caddy, at random times, until ctx ends.
func (s *soak) disturb(ctx context.Context) {
	untilRestart := min(20*time.Second, *soakFor/3)
	restart := s.now() + untilRestart
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(rand.N(min(2*time.Second, *soakFor/5))):
		}
		switch choice := rand.IntN(4); {
		case s.now() > restart:
			s.restart()
			restart = s.now() + untilRestart
		case choice == 0:
			s.storageFault(nil, errors.New("storage is away"))
		case choice == 1:
			s.storageFault(make(chan struct{}), nil)
		default:
			s.load(s.directives + fmt.Sprintf("\n# %d", s.reloads.Add(1)))
		}
	}
}

// restart stops Caddy and starts it again. Slow readers leave before.
func (s *soak) restart() {
	s.running.Lock()
	defer s.running.Unlock()
	s.restarts.Add(1)
	s.endLife()
	eventually(s.t, "the slow readers to leave", func() bool { return running(s.t, ".(*Handler).ServeHTTP(") == 0 })
	if err := caddy.Stop(); err != nil {
		s.t.Error(err)
	}
	s.client.CloseIdleConnections()
	s.slowClient.CloseIdleConnections()
	s.load(s.directives)
	for _, ns := range s.namespaces {
		ns.evictions.Store(0)
	}
	s.newLifetime()
}

// running returns the number of goroutines that have one of the functions on their stack.
func running(t testing.TB, functions ...string) (n int) {
	var stacks strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 2); err != nil {
		t.Fatal(err)
	}
	for stack := range strings.SplitSeq(stacks.String(), "\n\n") {
		if slices.ContainsFunc(functions, func(function string) bool { return strings.Contains(stack, function) }) {
			n++
		}
	}
	return n
}

// storageFault makes the storage fail or hang for a moment.
func (s *soak) storageFault(hang chan struct{}, err error) {
	s.faults.Add(1)
	s.failing.Store(true)
	setFault(err, hang, false)
	time.Sleep(rand.N(500 * time.Millisecond)) // how long the fault lasts
	setFault(nil, nil, false)
	if hang != nil {
		close(hang)
	}
	s.failed.Store(int64(s.now()))
	s.failing.Store(false)
}

// The bounds.

// soakStats is what the admin API says about a namespace.
type soakStats struct {
	Bytes, Sending, Reading, Limit int64
	Entries                        int
	Evictions                      uint64
	Waiters                        int64
	Storage                        struct {
		Queued      int
		QueuedBytes int64 `json:"queued_bytes"`
	}
}

// stats returns what the admin API says. During a reload, it may take a moment.
func (s *soak) stats() map[string]soakStats {
	for ctx := patience(s.t); ; time.Sleep(10 * time.Millisecond) {
		status, body, err := s.tryAdmin(http.MethodGet, "/fsbroker/cache")
		var stats map[string]soakStats
		if err == nil && status == http.StatusOK {
			err = json.Unmarshal([]byte(body), &stats)
		}
		if err == nil && len(stats) == len(s.namespaces) {
			return stats
		}
		if ctx.Err() != nil {
			s.t.Errorf("the admin API: status %d, %v, %s", status, err, body)
			return nil
		}
	}
}

// liveHeap returns the size of what is reachable, without what the pools of idle buffers hold.
func liveHeap() int64 {
	runtime.GC()
	runtime.GC()
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64())
}

// allowance is what the heap may have beyond what the namespaces count: some 60 callers and their connections, to Caddy and
// from there to the upstreams, with the buffers of TLS, HTTP and gzip on both sides, and the values that are read from the storage.
const allowance = 40 * mib

// watch asserts the bounds until ctx ends.
func (s *soak) watch(ctx context.Context) {
	for range time.Tick(400 * time.Millisecond) {
		if ctx.Err() != nil {
			return
		}
		s.checkBounds()
	}
}

// checkBounds asserts two bounds of the heap. What is documented is the sum of max_size, and the queues to the storage.
// What is in memory is also to be counted, within this sum: this finds what is not, although there is room.
func (s *soak) checkBounds() {
	s.running.RLock()
	defer s.running.RUnlock()
	before := s.stats()
	heap := liveHeap()
	after := s.stats()
	limit, counted := s.baseline, s.baseline
	for _, ns := range s.namespaces {
		queued := max(before[ns.name].Storage.QueuedBytes, after[ns.name].Storage.QueuedBytes)
		bytes := max(before[ns.name].Bytes, after[ns.name].Bytes)
		limit += ns.maxSize + queued
		counted += bytes + queued
		ns.most.Store(max(ns.most.Load(), bytes))
		ns.evictions.Store(before[ns.name].Evictions)
		// An answer up to 64 KiB always has room, and so has the only one that is being read.
		if bytes > ns.maxSize+soakLimit {
			s.t.Errorf("%s has %d MiB in memory, although max_size is %d MiB: %+v", ns.name, bytes/mib, ns.maxSize/mib, after[ns.name])
		}
	}
	s.peak.Store(max(s.peak.Load(), heap))
	s.uncounted.Store(max(s.uncounted.Load(), heap-counted))
	if heap > limit+allowance {
		s.t.Errorf("the heap has %d MiB, beyond %d MiB and the allowance: %+v", heap/mib, limit/mib, after)
	}
	if heap > counted+allowance {
		s.t.Errorf("the heap has %d MiB, but only %d MiB are counted: %+v", heap/mib, counted/mib, after)
	}
}

// callAll calls for all reports that callers got, at the end.
func (s *soak) callAll() {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	ids := make(chan func())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for call := range ids {
				call()
			}
		})
	}
	for _, ns := range s.namespaces {
		ns.mu.Lock()
		var all []reportID
		for id := range ns.seen {
			all = append(all, id)
		}
		ns.mu.Unlock()
		for _, id := range all {
			ids <- func() { s.call(ctx, ns, call{id: id, accept: anyEncoding()}) }
		}
	}
	close(ids)
	wg.Wait()
	if ctx.Err() != nil {
		s.t.Error("the last calls take too long")
	}
}

// wantIdle waits until nothing is under way any more.
func (s *soak) wantIdle() {
	s.client.CloseIdleConnections()
	s.slowClient.CloseIdleConnections()
	eventually(s.t, "the end of all waits", func() bool { return fsbroker.Waiters() == 0 })
	eventually(s.t, "the end of all calls", func() bool {
		return running(s.t, "fsbroker.(*Handler).ServeHTTP(", "fsbroker.(*pollers).poll(", "internal/coalesce.") == 0
	})
	for _, ns := range s.namespaces {
		eventually(s.t, ns.name+" to be idle", func() bool {
			stats := s.stats()[ns.name]
			return stats.Sending == 0 && stats.Reading == 0 && stats.Waiters == 0 && stats.Storage.Queued == 0 && stats.Bytes <= ns.maxSize
		})
	}
	s.checkBounds()
}

// wantNoSecretInLog checks the log, which is too long to be held.
func (s *soak) wantNoSecretInLog() {
	log, err := os.Open(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	const overlap = 200
	buf := make([]byte, 1<<20)
	for kept := 0; ; {
		n, err := log.Read(buf[kept:])
		text := buf[:kept+n]
		for _, secret := range s.secrets {
			if i := bytes.Index(text, secret); i >= 0 {
				s.t.Fatalf("the log holds a secret: …%s…", text[max(0, i-300):min(len(text), i+100)])
			}
		}
		if err != nil {
			return
		}
		kept = copy(buf, text[max(0, len(text)-overlap):])
	}
}

// summarize logs what happened, and fails if something never did although there was time for it.
func (s *soak) summarize() {
	happened := map[string]int64{
		"requests": s.requests.Load(), "finished": s.finished.Load(), "repeats": s.repeats.Load(), "unchanged": s.unchanged.Load(),
		"slow readers": s.slow.Load(), "waits": s.waits.Load(), "lies": s.lies.Load(), "stalls": s.stalls.Load(),
		"uploads": s.uploads.Load(), "refused uploads": s.refusedUploads.Load(),
		"faults": s.faults.Load(), "restarts": s.restarts.Load(),
	}
	s.t.Logf("%s: %v, %d reloads, %d excused, %d expired, %d lost", *soakFor, happened, s.reloads.Load(), s.excused.Load(), s.expired.Load(), s.lost.Load())
	for what, n := range happened {
		if n == 0 && (what != "slow readers" && what != "unchanged" || *soakFor >= 10*time.Second) {
			s.t.Errorf("there were no %s", what)
		}
	}
	for _, ns := range s.namespaces {
		stats := s.stats()[ns.name]
		s.t.Logf("%s: up to %d of %d MiB, %d seen, %+v", ns.name, ns.most.Load()/mib, ns.maxSize/mib, len(ns.seen), stats)
	}
	s.t.Logf("the heap had %d MiB at the start, and up to %d MiB. Up to %d MiB were not counted, the allowance is %d MiB",
		s.baseline/mib, s.peak.Load()/mib, s.uncounted.Load()/mib, allowance/mib)
	s.t.Logf("%d goroutines at the start, %d at the end", s.goroutines, runtime.NumGoroutine())
}
