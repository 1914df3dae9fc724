package archive

import (
	"container/heap"
	"context"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

const (
	instances    = 3
	simNamespace = "simulated"

	// maxSkew bounds how far the clock of an instance is off.
	maxSkew = time.Hour
)

// simulation is one run: several instances that use one storage, for a day or so.
type simulation struct {
	seed   uint64
	memory *storagetest.Memory
	model  *model
	plan   *plan
	random *rand.Rand
	begin  time.Time
	end    time.Time // of all trouble
	agenda agenda
	rings  []*Keyring
	trace  *trace

	instances [instances]*instance
	lives     int // so far
	reports   int
	keys      []known
	files     [][32]byte
	views     []*storagetest.Faulty
	small     bool // so are all reports from now on
}

// known is a report that was saved.
type known struct {
	key   task.Key
	kind  task.Kind
	names []task.Key // references to it
	file  [32]byte
	hash  string
	body  []byte
}

// agenda is what the driver will do.
type agenda []event

type event struct {
	at time.Time
	do func()
}

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].at.Before(a[j].at) }
func (a agenda) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *agenda) Push(e any)        { *a = append(*a, e.(event)) }
func (a *agenda) Pop() any {
	last := len(*a) - 1
	e := (*a)[last]
	*a = (*a)[:last]
	return e
}

// in lets the driver do something after a delay.
func (s *simulation) in(delay time.Duration, do func()) {
	heap.Push(&s.agenda, event{time.Now().Add(delay), do})
}

// every lets the driver do something again and again, at random times.
func (s *simulation) every(mean time.Duration, do func()) {
	var again func()
	again = func() {
		do()
		s.in(between(s.random, mean/10, 2*mean), again)
	}
	s.in(between(s.random, mean/10, 2*mean), again)
}

// run runs until a time, or until something is wrong.
func (s *simulation) run(until time.Time) {
	for len(s.agenda) > 0 && s.agenda[0].at.Before(until) && !s.failed() {
		e := heap.Pop(&s.agenda).(event)
		time.Sleep(time.Until(e.at))
		e.do()
		synctest.Wait()
		s.check()
	}
	if !s.failed() {
		time.Sleep(time.Until(until))
		synctest.Wait()
		s.check()
	}
}

func (s *simulation) failed() bool {
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	return len(s.model.violations) > 0
}

// wrong notes that something is not as it must be.
func (s *simulation) wrong(format string, args ...any) {
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	s.model.wrong(format, args...)
}

// newSimulation must be called in a bubble.
func newSimulation(seed uint64, span time.Duration, tr *trace) *simulation {
	s := &simulation{
		seed: seed, random: rand.New(rand.NewPCG(seed, 2)), trace: tr,
		begin: time.Now(), end: time.Now().Add(span),
	}
	s.memory = storagetest.New(storagetest.KindOf(seed))
	s.plan = newPlan(seed, s.begin, span)
	s.rings = newRings(seed)
	s.model = newModel(newLayout(simNamespace), s.memory.Kind(), s.rings[0], tr)
	for range 40 {
		s.files = append(s.files, task.NewKey("file", fmt.Sprint(len(s.files))))
	}
	for i := range s.instances {
		s.instances[i] = &instance{number: i, offsets: []offset{{at: s.begin}}}
	}
	return s
}

// newRings returns the keyrings that instances may have. Each opens what the others seal.
func newRings(seed uint64) []*Keyring {
	if seed%2 == 1 {
		return []*Keyring{nil}
	}
	var rings []*Keyring
	keys := []string{strings.Repeat("01", 32), strings.Repeat("02", 32), strings.Repeat("03", 32)}
	for range keys {
		ring, err := NewKeyring(keys...)
		if err != nil {
			panic(err)
		}
		rings = append(rings, ring)
		keys = append(keys[1:], keys[0])
	}
	return rings
}

// retentions are what operators may choose.
var retentions = []time.Duration{3 * time.Hour, 3 * time.Hour, 3 * time.Hour, 7 * time.Hour}

func (s *simulation) retention() time.Duration { return retentions[s.random.IntN(len(retentions))] }

// start starts an instance.
func (s *simulation) start(i *instance) {
	s.lives++
	inc := &incarnation{
		sim: s, inst: i, number: i.number, id: s.lives,
		gather: prometheus.NewRegistry(),
		queue:  make(map[task.Key]*copyOf), copies: make(map[task.Key][]*copyOf),
		lastFailure: make(map[storagetest.Op]time.Time), failing: make(map[storagetest.Op]int),
		pending: make(map[storagetest.Op]int), trouble: make(map[callID]time.Time), loads: make(map[storagetest.Op]int), lastGood: make(map[storagetest.Op]time.Time),
	}
	s.trace.note("%s starts", inc)
	metrics := NewMetrics()
	inc.gather.MustRegister(metrics.Collectors()...)
	inc.archive = New(Config{
		Namespace: simNamespace, Metrics: metrics, Seed: s.seed<<20 + uint64(s.lives), Now: i.now,
		Stored: func(i Item) { s.model.confirmed(inc, i.Key, i.Report) },
		Room: func() {
			s.model.mu.Lock()
			defer s.model.mu.Unlock()
			inc.rooms++
		},
	})
	i.live = inc
	s.model.mu.Lock()
	s.model.lives = append(s.model.lives, inc)
	s.model.mu.Unlock()
	s.attach(inc, s.retention(), false)
}

// attach lets an instance use a new configuration, with a storage that is wrong if asked to.
func (s *simulation) attach(inc *incarnation, retention time.Duration, wrong bool) {
	view := storagetest.NewFaulty(s.memory)
	n := len(s.views)
	s.views = append(s.views, view)
	inc.views = append(inc.views, view)
	type call struct {
		op   storagetest.Op
		name string
	}
	counts := make(map[call]int)
	view.Set(func(c storagetest.Call) storagetest.Fault {
		counts[call{c.Op, c.Name}]++
		d := newDice(s.seed, c.Op.String(), c.Name, n, counts[call{c.Op, c.Name}])
		if wrong {
			return storagetest.Fault{Before: d.between(time.Millisecond, 25*time.Millisecond), Effect: storagetest.None, Err: storagetest.ErrInjected}
		}
		return s.plan.fault(d, inc.number, c)
	})
	lock := s.model.layout.sweepLock()
	view.Observe(func(e storagetest.Event) {
		s.model.observe(inc, view, func() bool { return s.memory.Holder(lock) == view }, e)
	})
	s.model.mu.Lock()
	inc.keeps = append(inc.keeps, keeping{time.Now(), retention})
	s.model.longest = max(s.model.longest, retention)
	if inc.isBroken && !wrong {
		inc.brokenOff = time.Now()
	}
	inc.isBroken = wrong
	s.model.mu.Unlock()
	inc.backend = &Backend{Storage: view.Storage(), Logger: newLogger(inc), Retention: retention, Keyring: s.rings[n%len(s.rings)]}
	inc.archive.Attach(inc.backend)
}

// reload lets an instance use another configuration.
func (s *simulation) reload(inc *incarnation, retention time.Duration, wrong bool) {
	s.trace.note("%s reloads: retention %s, wrong %v", inc, retention, wrong)
	old := inc.backend
	s.attach(inc, retention, wrong)
	go func() {
		if err := inc.archive.Drain(old); err != nil && s.goesOn(inc) {
			s.wrong("%s: a reload drains: %v", inc, err)
		}
		inc.archive.Detach(old)
	}()
}

func (s *simulation) isDead(inc *incarnation) bool {
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	return inc.dead
}

// goesOn reports whether an instance has neither ended nor begun to.
func (s *simulation) goesOn(inc *incarnation) bool {
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	return !inc.dead && !inc.draining
}

// crash lets an instance crash.
func (s *simulation) crash(inc *incarnation) {
	s.trace.note("%s crashes", inc)
	inc.inst.live = nil
	s.bury(inc)
	for n, view := range inc.views {
		view.Crash(func(c storagetest.Call) storagetest.Effect {
			d := newDice(s.seed, c.Op.String(), c.Name, inc.id, n, int(c.ID))
			return storagetest.Effect(d.below(2)) // whole or none
		})
	}
	synctest.Wait()
	inc.archive.Close()
}

// bury notes that an instance has ended. What was queued is lost.
func (s *simulation) bury(inc *incarnation) {
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	s.model.counted(inc)
	inc.dead, inc.endedAt = true, time.Now()
	for _, c := range inc.queue {
		c.ended = time.Now()
	}
	clear(inc.queue)
}

// shutDown lets an instance stop as an operator does, and calls then when it has.
func (s *simulation) shutDown(inc *incarnation, then func()) {
	s.trace.note("%s stops", inc)
	inc.inst.live = nil
	s.model.mu.Lock()
	inc.draining = true
	s.model.mu.Unlock()
	b := inc.backend
	go func() {
		begun := time.Now()
		inc.archive.Flush(b)
		time.Sleep(137 * time.Millisecond)
		err := inc.archive.Drain(b)
		s.drained(inc, begun, err)
		inc.archive.Detach(b)
		s.bury(inc)
		inc.archive.Close()
		then()
	}()
}

// drained checks that a drain has stored all that it could.
func (s *simulation) drained(inc *incarnation, begun time.Time, err error) {
	m := s.model
	m.mu.Lock()
	defer m.mu.Unlock()
	took := time.Since(begun)
	m.note("%s drained after %s: %v", inc, took, err == nil)
	if took > drainTimeout+2*time.Second {
		m.wrong("%s took %s to drain", inc, took)
	}
	left := m.mustBeStored(inc)
	if err == nil && left != nil {
		m.wrong("%s has drained, but %x was not stored", inc, left.item.Key[8:12])
	}
	if left != nil && !inc.troubled(begun, 0) {
		m.wrong("%s could not store %x within %s, although nothing troubles the storage: %v", inc, left.item.Key[8:12], took, err)
	}
	if left == nil && took > 30*time.Second && !inc.troubled(begun, 0) && len(inc.queue) == 0 {
		m.wrong("%s took %s to drain, although nothing troubles the storage", inc, took)
	}
}

// counted checks that what an instance has refused and given up is counted.
func (m *model) counted(inc *incarnation) {
	if n := inc.metric("refused_total"); n != inc.refused {
		m.wrong("%s has refused %d reports and counts %d", inc, inc.refused, n)
	}
	if n := inc.metric("given_up_total"); n != inc.gaveUp {
		m.wrong("%s gave up %d reports and counts %d", inc, inc.gaveUp, n)
	}
}

// mustBeStored returns a copy that should have been stored by now, if nothing troubled the storage.
func (m *model) mustBeStored(inc *incarnation) *copyOf {
	for _, c := range inc.queue {
		if !c.maybe && !m.refuses(inc, c) {
			return c
		}
	}
	return nil
}

// refuses reports whether the storage never takes a copy.
func (m *model) refuses(inc *incarnation, c *copyOf) bool {
	limit := m.kind.MaxSize()
	if limit > 0 && c.item.Target == nil && c.item.Report.Size()+valueOverhead > limit {
		return true
	}
	for _, kind := range []placeKind{inPartition, large} {
		if m.wasBad(inc, m.layout.name(place{kind: kind, key: c.item.Key})) {
			return true
		}
	}
	return false
}

// check checks what must be so at all times.
func (s *simulation) check() {
	for _, i := range s.instances {
		if i.live == nil {
			continue
		}
		stats := i.live.archive.Stats()
		s.model.mu.Lock()
		if stats.Queued > maxQueue || stats.QueuedBytes > maxQueueBytes {
			s.model.wrong("%s has %d reports of %d bytes in its queue", i.live, stats.Queued, stats.QueuedBytes)
		}
		locks := i.live.pending[storagetest.Lock] + i.live.pending[storagetest.TryLock] + i.live.pending[storagetest.Unlock]
		if locks > 1+len(i.live.views)/4 {
			s.model.wrong("%s has %d calls for locks under way", i.live, locks)
		}
		if n := i.live.pending[storagetest.Store]; n > maxWrites+4 {
			s.model.wrong("%s has %d writes under way", i.live, n)
		}
		if n := i.live.pending[storagetest.Load]; n > maxReads+2*maxSweeps+2*maxPurges {
			s.model.wrong("%s has %d reads under way", i.live, n)
		}
		s.model.mu.Unlock()
	}
}

// any returns an instance that runs, or nil.
func (s *simulation) any() *incarnation { return s.instances[s.random.IntN(instances)].live }

// newReport returns a report that is like no other.
func (s *simulation) newReport(now time.Time, size int, file [32]byte) *task.Report {
	s.reports++
	id := task.NewKey("report", fmt.Sprint(s.seed, s.reports))
	body := make([]byte, size)
	for i := 0; i < size; i += 512 {
		copy(body[i:], id[:])
	}
	return task.NewReport(task.Document{At: now, Hash: hex.EncodeToString(id[:16]), File: file, Length: size, Body: body})
}

// size returns the size of a report: most are small.
func (s *simulation) size() int {
	switch n := s.random.IntN(1000); {
	case s.small:
	case n < 1:
		return 500<<10 + s.random.IntN(600<<10)
	case n < 20:
		return 100<<10 + s.random.IntN(200<<10)
	case n < 100:
		return 8<<10 + s.random.IntN(50<<10)
	}
	return 100 + s.random.IntN(2000)
}

// save saves a report as the resolver does: the report itself, and often a reference to it.
func (s *simulation) save(inc *incarnation) {
	now := inc.inst.now()
	if len(s.keys) > 20 && s.random.IntN(4) == 0 { // a report that was saved before, again or in another version
		k := &s.keys[s.recent(s.random)]
		if s.random.IntN(2) == 0 || s.small {
			s.renew(inc, k)
			return
		}
		r := task.NewReport(task.Document{At: now, Hash: k.hash, File: k.file, Length: len(k.body), Body: k.body})
		s.put(inc, Item{Key: k.key, Kind: k.kind, Report: r})
		return
	}
	node := task.NodeSource(simNamespace, fmt.Sprint("node", s.random.IntN(4)))
	k := known{kind: task.Kind(s.random.IntN(2))}
	k.key = task.ReportKey(node, fmt.Sprint(s.seed, len(s.keys)), k.kind)
	if s.random.IntN(3) > 0 {
		k.file = s.files[s.random.IntN(len(s.files))]
	}
	r := s.newReport(now, s.size(), k.file)
	k.hash, k.body = r.Document().Hash, r.Document().Body
	s.put(inc, Item{Key: k.key, Kind: k.kind, Report: r})
	if s.random.IntN(2) == 0 {
		name := task.SubmissionKey(task.SubmissionSource(simNamespace), fmt.Sprint(s.seed, len(s.keys)), k.kind)
		k.names = append(k.names, name)
		s.put(inc, Item{Key: name, Kind: k.kind, Report: r, Target: &k.key})
	}
	s.keys = append(s.keys, k)
	if s.random.IntN(8) == 0 { // it is asked for anew, and there is more in it
		n := len(s.keys) - 1
		s.in(between(s.random, time.Second, 2*time.Minute), func() {
			if s.goesOn(inc) {
				s.renew(inc, &s.keys[n])
			}
		})
	}
}

// renew saves another version of a report.
func (s *simulation) renew(inc *incarnation, k *known) {
	r := s.newReport(inc.inst.now(), s.size(), k.file)
	k.hash, k.body = r.Document().Hash, r.Document().Body
	s.put(inc, Item{Key: k.key, Kind: k.kind, Report: r})
}

// recent returns the number of a known report, more often a recent one.
func (s *simulation) recent(r *rand.Rand) int {
	if n := len(s.keys); r.IntN(3) > 0 {
		return n - 1 - r.IntN(min(n, 200))
	}
	return r.IntN(len(s.keys))
}

// put saves an item.
func (s *simulation) put(inc *incarnation, i Item) bool {
	if inc.archive.Save(i) {
		s.model.saved(inc, i)
		return true
	}
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	s.model.note("%s refuses %x", inc, i.Key[8:12])
	inc.refused++
	return false
}

// load loads a report, most often one that was saved.
func (s *simulation) load(inc *incarnation, after time.Duration, quick bool) {
	l := load{quick: quick}
	if len(s.keys) == 0 || s.random.IntN(20) == 0 {
		l.key = task.NewKey("unknown", fmt.Sprint(s.random.Uint64()))
	} else {
		k := s.keys[s.recent(s.random)]
		if l.key = k.key; len(k.names) > 0 && s.random.IntN(2) == 0 {
			l.key = k.names[s.random.IntN(len(k.names))]
		} else if k.file != [32]byte{} && s.random.IntN(8) == 0 {
			l.file, l.kind = &k.file, k.kind
			l.key = task.FileKey(task.FileSource(simNamespace, k.file, k.kind), task.Key{})
		}
	}
	var leaves time.Duration
	if !quick && s.random.IntN(10) == 0 {
		leaves = between(s.random, time.Microsecond, time.Second)
	}
	l.refusing = !quick && s.random.IntN(20) == 0
	go func() {
		if after > 0 {
			time.Sleep(after)
		}
		s.loadNow(inc, l, leaves)
	}()
}

func (s *simulation) loadNow(inc *incarnation, l load, leaves time.Duration) {
	if s.isDead(inc) {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if leaves > 0 {
		l.left = true
		defer time.AfterFunc(leaves, cancel).Stop()
	}
	s.model.beginLoad(inc, &l)
	grow := func(int64) error {
		if l.refusing {
			return errNoRoom
		}
		return nil
	}
	if l.file != nil {
		l.found, l.err = inc.archive.Newest(ctx, *l.file, l.kind, time.Time{}, grow)
	} else {
		l.found, l.err = inc.archive.Load(ctx, l.key, grow)
	}
	s.model.loaded(inc, l)
}

// purge purges something.
func (s *simulation) purge(inc *incarnation) {
	var sel Selection
	switch n := s.random.IntN(40); {
	case n < 12 && len(s.keys) > 0:
		for range 1 + s.random.IntN(3) {
			k := s.keys[s.recent(s.random)]
			sel.Keys = append(append(sel.Keys, k.key), k.names...)
		}
	case n < 20:
		source := task.NodeSource(simNamespace, fmt.Sprint("node", s.random.IntN(4)))
		sel.Source = &source
	case n < 30:
		sel.File = &s.files[s.random.IntN(len(s.files))]
	case n < 39:
		sel.Before = inc.inst.now().Add(-between(s.random, 10*time.Minute, 5*time.Hour))
	}
	s.purgeNow(inc, sel)
}

// purgeNow purges in steps.
func (s *simulation) purgeNow(inc *incarnation, sel Selection) {
	go func() {
		p := s.model.beginPurge(inc, sel)
		var err error
		for from, tries := 0, 0; from < Partitions && tries < 8 && !s.isDead(inc); {
			var done Purged
			done, err = inc.archive.Purge(context.Background(), sel, from)
			if done.Next < from || done.Next > Partitions || err == nil && done.Next == from {
				s.wrong("%s: a purge from %d goes on with %d", inc, from, done.Next)
				break
			}
			if from = done.Next; err != nil {
				tries++
				time.Sleep(time.Duration(tries)*3*time.Second + 7919)
			}
		}
		s.model.endPurge(p, err)
	}()
}

// burst saves many reports at once. If nothing troubles the storage, they are stored as they come.
func (s *simulation) burst(inc *incarnation, n int) {
	var keys []task.Key
	for range n {
		before := len(s.keys)
		s.save(inc)
		if len(s.keys) > before {
			keys = append(keys, s.keys[before].key)
		}
	}
	begun := time.Now()
	patience := 4*time.Second + time.Duration(n)*5*time.Millisecond
	s.in(patience, func() {
		s.model.mu.Lock()
		defer s.model.mu.Unlock()
		if inc.dead || inc.draining || inc.troubled(begun, 15*time.Second) && !inc.hangs(begun, 15*time.Second) {
			return
		}
		for _, k := range keys {
			if c := inc.queue[k]; c != nil && !c.saved.After(begun) && !c.maybe && !s.model.refuses(inc, c) {
				s.model.wrong("%s has not stored a report after %s, although nothing troubles the storage", inc, patience)
				return
			}
		}
	})
}

// damage damages a stored value.
func (s *simulation) damage() {
	if len(s.keys) == 0 {
		return
	}
	p := place{kind: inPartition, key: s.keys[s.recent(s.random)].key}
	stored := slices.Clone(s.memory.Get(s.model.layout.name(p)))
	if len(stored) == 0 {
		return
	}
	stored[s.random.IntN(len(stored))] ^= 1 << s.random.IntN(8)
	s.plant(p, stored)
}

// later stores a value of a later version, which instances come across.
func (s *simulation) later() {
	p := place{kind: inPartition, key: task.ReportKey(task.NodeSource(simNamespace, "node0"), fmt.Sprint("later", s.random.Uint64()), task.Summary)}
	s.plant(p, append([]byte(magic), version+1, 1, 2, 3))
	for _, i := range s.instances {
		if inc := i.live; inc != nil {
			s.in(between(s.random, time.Second, time.Hour), func() { go s.loadNow(inc, load{key: p.key}, 0) })
		}
	}
}

// plant puts a value into the storage.
func (s *simulation) plant(p place, stored []byte) {
	name := s.model.layout.name(p)
	s.memory.Put(name, stored)
	s.model.mu.Lock()
	defer s.model.mu.Unlock()
	is := s.model.read(name, p, stored)
	s.trace.note("%s is damaged (%d)", s.model.short(name), is.what)
	s.model.set(name, is)
}

// step lets the clock of an instance step.
func (s *simulation) step(i *instance) {
	by := between(s.random, -maxSkew, maxSkew)
	if s.random.IntN(2) == 0 {
		by = 0
	}
	s.trace.note("the clock of instance %d is off by %s", i.number, by)
	i.step(by)
}

// schedule fills the agenda.
func (s *simulation) schedule() {
	live := func(f func(*incarnation)) func() {
		return func() {
			if inc := s.any(); inc != nil {
				f(inc)
			}
		}
	}
	for _, i := range s.instances {
		s.in(between(s.random, 0, time.Minute), func() { s.start(i) })
	}
	s.every(12*time.Second, live(s.save))
	s.every(15*time.Second, live(func(inc *incarnation) { s.load(inc, 0, false) }))
	s.every(2*time.Hour, live(func(inc *incarnation) { // many at once
		for range 400 {
			s.load(inc, between(s.random, 0, 5*time.Millisecond), true)
		}
	}))
	s.every(2*time.Hour, live(func(inc *incarnation) { s.burst(inc, 600) }))
	s.every(4*time.Hour, live(func(inc *incarnation) { // what is being written is purged
		n := len(s.keys)
		s.burst(inc, 50)
		sel := Selection{}
		for _, k := range s.keys[n:] {
			sel.Keys = append(sel.Keys, k.key)
		}
		s.in(between(s.random, time.Millisecond, 30*time.Millisecond), func() { s.purgeNow(inc, sel) })
	}))
	s.every(3*time.Hour, live(s.purge))
	s.every(5*time.Hour, live(func(inc *incarnation) {
		i := inc.inst
		s.crash(inc)
		s.in(between(s.random, time.Second, 20*time.Minute), func() { s.start(i) })
	}))
	s.every(4*time.Hour, live(func(inc *incarnation) {
		i := inc.inst
		for range s.random.IntN(300) {
			s.save(inc)
		}
		again := between(s.random, 2*time.Minute, 20*time.Minute)
		s.shutDown(inc, func() {})
		s.in(again, func() { s.start(i) })
	}))
	s.every(4*time.Hour, live(func(inc *incarnation) { s.reload(inc, s.retention(), false) }))
	s.every(8*time.Hour, live(func(inc *incarnation) {
		s.reload(inc, inc.backend.Retention, true)
		s.in(between(s.random, time.Second, 10*time.Minute), func() {
			if s.goesOn(inc) {
				s.reload(inc, inc.backend.Retention, false)
			}
		})
	}))
	s.every(3*time.Hour, func() { s.step(s.instances[s.random.IntN(instances)]) })
	s.every(4*time.Hour, s.damage)
	s.every(6*time.Hour, s.later)
	for _, w := range s.plan.windows {
		s.window(w)
	}
	s.overflow()
}

// window prepares for a time of trouble.
func (s *simulation) window(w *window) {
	s.in(w.from.Sub(s.begin), func() {
		s.trace.note("%s until %s, instance %d", w.kind, w.to.Sub(s.begin), w.instance)
		switch w.kind {
		case badList:
			s.in(between(s.random, 0, w.to.Sub(w.from)), s.askForFiles)
		case badDel:
			s.in(between(s.random, 0, w.to.Sub(w.from)), func() {
				if inc := s.any(); inc != nil {
					s.purge(inc)
				}
			})
		}
		if w.kind != badKeys || len(s.keys) == 0 {
			return
		}
		for range 1 + s.random.IntN(2) {
			n := s.recent(s.random)
			k := s.keys[n]
			if w.stuck {
				s.purgeWhatIsWritten(n)
			}
			for _, kind := range []placeKind{inPartition, large} {
				w.bad.Store(s.model.layout.name(place{kind: kind, key: k.key}), true)
			}
			for range 30 { // callers want just that one
				l := load{key: k.key}
				inc := s.any()
				s.in(between(s.random, time.Second, w.to.Sub(w.from)), func() {
					if inc != nil {
						go s.loadNow(inc, l, 0)
					}
				})
			}
		}
		for range 3 { // and others want others
			s.in(between(s.random, time.Second, w.to.Sub(w.from)), func() {
				if inc := s.any(); inc != nil {
					for range 100 {
						s.load(inc, between(s.random, 0, 5*time.Second), true)
					}
				}
			})
		}
	})
	if w.kind == hang || w.kind == noise { // what still hangs holds up nothing else
		s.in(w.to.Sub(s.begin)+2*writeTimeout+between(s.random, time.Second, time.Minute), func() {
			if inc := s.instances[max(0, w.instance)].live; inc != nil && s.goesOn(inc) {
				s.burst(inc, 100)
			}
		})
	}
	s.in(w.to.Sub(s.begin)+1009, func() { s.trace.note("%s ends", w.kind) })
	if w.kind == refuse || w.kind == hang { // a clock steps back shortly before the trouble is over
		i := s.instances[max(0, w.instance)]
		s.in(w.to.Sub(s.begin)-between(s.random, time.Second, 40*time.Second), func() {
			s.trace.note("the clock of instance %d steps back", i.number)
			i.step(max(i.offset()-between(s.random, maxSkew/2, maxSkew), -maxSkew))
		})
	}
	if s.random.IntN(2) == 0 { // stop when the trouble is just over
		s.in(w.to.Sub(s.begin)+between(s.random, time.Second, 20*time.Second), func() {
			if inc := s.any(); inc != nil {
				i := inc.inst
				s.shutDown(inc, func() {})
				s.in(between(s.random, 2*time.Minute, 5*time.Minute), func() { s.start(i) })
			}
		})
	}
}

// purgeWhatIsWritten purges a report while a newer version of it is being written.
func (s *simulation) purgeWhatIsWritten(n int) {
	inc := s.any()
	s.in(time.Second+7, func() {
		if inc != nil && s.goesOn(inc) {
			s.renew(inc, &s.keys[n])
			s.in(between(s.random, time.Second, 20*time.Second), func() {
				s.purgeNow(inc, Selection{Keys: []task.Key{s.keys[n].key}})
			})
		}
	})
}

// askForFiles asks for the newest reports of several files, which needs lists, and for others.
func (s *simulation) askForFiles() {
	inc := s.any()
	if inc == nil {
		return
	}
	for i := range 8 {
		l := load{key: task.FileKey(task.FileSource(simNamespace, s.files[i], task.Complete), task.Key{}), file: &s.files[i], kind: task.Complete}
		s.in(between(s.random, 0, time.Second), func() { go s.loadNow(inc, l, 0) })
	}
	for range 20 {
		s.load(inc, between(s.random, time.Second, 30*time.Second), false)
	}
}

// overflow saves more than fits into the queue during an outage.
func (s *simulation) overflow() {
	if s.seed%3 == 1 {
		return // it takes a while
	}
	for _, w := range s.plan.windows {
		if w.kind != refuse && w.kind != hang || w.to.Sub(w.from) < 3*time.Minute {
			continue
		}
		s.in(w.from.Sub(s.begin)+between(s.random, time.Minute, 2*time.Minute), func() {
			inc := s.instances[max(0, w.instance)].live
			if inc == nil {
				return
			}
			n, size := maxQueue+500, 0
			if s.seed%2 == 1 {
				n, size = 80, 1<<20
				if limit := s.memory.Kind().MaxSize(); limit > 0 { // what it refuses would only be tried again and again
					n, size = n*size/(limit/2), limit/2
				}
			}
			for range n {
				key := task.ReportKey(task.NodeSource(simNamespace, "node3"), fmt.Sprint("overflow", s.reports), task.Complete)
				r := s.newReport(inc.inst.now(), max(size, 100+s.random.IntN(100)), [32]byte{})
				if s.put(inc, Item{Key: key, Kind: task.Complete, Report: r}) {
					s.keys = append(s.keys, known{key: key, kind: task.Complete, hash: r.Document().Hash, body: r.Document().Body})
				}
			}
		})
		s.in(w.to.Sub(s.begin)+15*time.Minute, func() {
			for _, i := range s.instances {
				inc := i.live
				if inc == nil {
					continue
				}
				if stats := inc.archive.Stats(); stats.Queued < maxQueue/2 && stats.QueuedBytes < maxQueueBytes/2 {
					s.model.mu.Lock()
					if inc.refused > 0 && inc.rooms == 0 {
						s.model.wrong("%s has refused %d reports and does not say that there is room again", inc, inc.refused)
					}
					s.model.mu.Unlock()
				}
			}
		})
		return
	}
}

// finish lets all come to rest after the end of all trouble, and checks that it does.
func (s *simulation) finish() {
	s.agenda = nil
	s.small = true
	for _, i := range s.instances {
		i.step(0)
	}
	time.Sleep(5*time.Minute + 31) // those that stop have stopped
	for _, i := range s.instances {
		if i.live == nil {
			s.start(i)
		} else if i.live.isBroken {
			s.reload(i.live, i.live.backend.Retention, false)
		}
	}
	s.every(40*time.Second, func() {
		for _, i := range s.instances {
			s.save(i.live)
			s.load(i.live, 0, false)
		}
	})
	s.run(time.Now().Add(80 * time.Minute)) // what the storage refuses is given up after an hour
	s.agenda = nil
	s.run(time.Now().Add(10 * time.Minute))
	s.atRest()
	s.expired()
}

// atRest checks that every instance has come to rest, and reads what it must.
func (s *simulation) atRest() {
	for _, i := range s.instances {
		inc := i.live
		if stats := inc.archive.Stats(); stats.Queued != 0 || stats.QueuedBytes != 0 || stats.Failing {
			s.wrong("%s does not come to rest: %+v", inc, stats)
		}
		s.model.mu.Lock()
		s.model.counted(inc)
		if inc.refused > 0 && inc.rooms == 0 {
			s.model.wrong("%s has refused %d reports and never says that there is room again", inc, inc.refused)
		}
		for _, c := range inc.queue {
			if !c.maybe {
				s.model.wrong("%s has lost %x", inc, c.item.Key[8:12])
			}
			inc.leave(c, time.Now())
		}
		s.model.mu.Unlock()
	}
	for range 300 {
		if len(s.keys) > 0 {
			s.load(s.any(), between(s.random, 0, 10*time.Second), true)
		}
	}
	time.Sleep(time.Minute)
	synctest.Wait()
}

// expired checks that all goes away in the end: first what is in the index, and then what the index has lost.
func (s *simulation) expired() {
	if s.failed() {
		return
	}
	s.run(time.Now().Add(s.model.longest + maxSkew + 2*time.Hour))
	s.model.mu.Lock()
	left := 0
	for _, places := range s.model.indexed {
		for p := range places {
			v := s.model.latest(s.model.layout.name(p))
			if v.what == sound && time.Since(v.val.at) > s.model.longest+maxSkew+time.Hour {
				left++
			}
		}
	}
	if left > 0 {
		s.model.wrong("%d values of the index are there although they have expired", left)
	}
	s.model.mu.Unlock()
	for _, i := range s.instances[1:] {
		s.shutDown(i.live, func() {})
	}
	s.run(time.Now().Add(32 * 24 * time.Hour))
	s.model.mu.Lock()
	names := slices.Sorted(maps.Keys(s.model.states))
	s.model.mu.Unlock()
	for _, name := range names {
		if p, ok := s.model.layout.parse(name); ok && s.model.latest(name).what == sound && s.model.hidden[name] == nil {
			s.wrong("%s (%v) is there although it has expired long ago", s.model.short(name), p.kind)
			break
		}
	}
	s.shutDown(s.instances[0].live, func() {})
	time.Sleep(2 * time.Minute)
}

// end lets all end that is under way.
func (s *simulation) close() {
	for _, i := range s.instances {
		if i.live != nil {
			s.crash(i.live)
		}
	}
	for _, view := range s.views {
		view.Release()
	}
	time.Sleep(2 * time.Hour) // what hangs for a time
	for _, view := range s.views {
		view.Release()
	}
}

// simulate runs a simulation and returns what was wrong.
func simulate(t *testing.T, seed uint64, span time.Duration, tr *trace) (violations []string) {
	t.Helper()
	synctest.Test(t, func(*testing.T) {
		tr.begin = time.Now()
		s := newSimulation(seed, span, tr)
		s.schedule()
		s.run(s.end)
		if !s.failed() {
			s.finish()
		}
		failedAt := time.Since(s.begin)
		s.close()
		c := s.model.count
		tr.summary = fmt.Sprintf("%s: %d stored, %d loaded (%d absent, %d unreadable), %d deleted (%d purged, %d raced)",
			s.memory.Kind(), c.stored, c.loaded, c.absent, c.unreadable, c.deleted, c.purged, c.raced)
		if violations = s.model.violations; len(violations) > 0 {
			tr.summary += fmt.Sprintf("; wrong after %s", failedAt)
		}
	})
	return violations
}
