package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// model knows what the storage should have and what instances should answer. It sees every call of the storage, and says
// what is wrong at once.
type model struct {
	mu      sync.Mutex
	layout  layout
	kind    storagetest.Kind
	ring    *Keyring                      // has all keys
	bodies  map[string][]byte             // of all reports, by their hash
	states  map[string][]state            // of each name, in the order of their times
	calls   map[callID]*callNote          // deletions and writes under way
	purges  map[*purge]struct{}           // under way, or ended with success
	hidden  map[string]*incarnation       // names whose deletion broke off, so that they may not be listed any more
	purged  []*purge                      // with success
	indexed map[string]map[place]struct{} // what each object of the index says
	files   map[task.Source][]string      // the names of references from a file
	lives   []*incarnation

	violations []string
	longest    time.Duration // retention
	now        func() time.Time
	note       func(format string, args ...any)
	tracing    bool
	count      struct{ stored, loaded, absent, unreadable, deleted, raced, purged int }
}

type callID struct {
	view *storagetest.Faulty
	id   uint64
}

// callNote is what was so when a call began.
type callNote struct {
	locked bool // the instance held the lock of the sweep
	bad    bool // the value has trouble of its own
	purges []*purge
}

// state is what a name has from a time on.
type state struct {
	at   time.Time
	what what
	id   reportID
	val  value
	by   *incarnation
}

type what uint8

const (
	nothing what = iota
	sound        // it is what was stored
	broken       // it was damaged by the test
	lost         // it was damaged so that its key is not known
	foreign      // it is of a later version
)

// reportID tells reports apart.
type reportID struct {
	hash string
	at   int64
}

func idOf(r *task.Report) reportID {
	return reportID{r.Document().Hash, r.At().UnixNano()}
}

// copyOf is a report that was saved.
type copyOf struct {
	item   Item
	id     reportID
	saved  time.Time
	since  time.Time // when something under the key was queued that has not left the queue
	ended  time.Time // when it left the queue; zero if it has not
	stored bool
	maybe  bool // a purge may have taken it out of the queue
}

// purge is a purge that was begun.
type purge struct {
	inc       *incarnation
	selection Selection
	begun     time.Time
	ended     time.Time
	ok        bool
	files     map[task.Key]bool // the reports of the file, as far as they can be found
}

func newModel(l layout, kind storagetest.Kind, ring *Keyring, tr *trace) *model {
	return &model{
		layout: l, kind: kind, ring: ring, now: time.Now, note: tr.note, tracing: tr.keep || tr.out != nil,
		bodies: make(map[string][]byte), states: make(map[string][]state), calls: make(map[callID]*callNote),
		hidden: make(map[string]*incarnation), files: make(map[task.Source][]string), purges: make(map[*purge]struct{}), indexed: make(map[string]map[place]struct{}),
	}
}

// wrong notes that something is not as it must be. The caller holds the mutex.
func (m *model) wrong(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if len(m.violations) < 20 {
		m.violations = append(m.violations, text)
	}
	m.note("WRONG: %s", text)
}

// latest returns what a name has.
func (m *model) latest(name string) state {
	if all := m.states[name]; len(all) > 0 {
		return all[len(all)-1]
	}
	return state{}
}

// during returns all that a name had from one time to another.
func (m *model) during(name string, from, to time.Time) []state {
	all := m.states[name]
	i := sort.Search(len(all), func(i int) bool { return all[i].at.After(from) })
	j := sort.Search(len(all), func(i int) bool { return all[i].at.After(to) })
	if i == 0 {
		return append([]state{{}}, all[:j]...)
	}
	return all[i-1 : j]
}

func (m *model) set(name string, s state) {
	s.at = m.now()
	s.val.report, s.val.raw = nil, nil // m.bodies has them
	m.states[name] = append(m.states[name], s)
}

// read returns what stored bytes are.
func (m *model) read(name string, p place, stored []byte) state {
	v, err := decode(stored, name, p.key, m.ring)
	switch {
	case errors.Is(err, errUnknownVersion):
		return state{what: foreign}
	case isLocked(err):
		at, _ := timeOf(stored, name, p.key, m.ring)
		return state{what: lost, val: value{at: at}}
	case err != nil:
		return state{what: broken}
	}
	s := state{what: sound, val: *v}
	if v.report != nil {
		s.id = idOf(v.report)
	}
	return s
}

// observe is told of all calls of an instance.
func (m *model) observe(inc *incarnation, view *storagetest.Faulty, holdsLock func() bool, e storagetest.Event) {
	locked := e.Phase == storagetest.Began && e.Call.Op == storagetest.Delete && holdsLock()
	m.mu.Lock()
	defer m.mu.Unlock()
	id := callID{view, e.Call.ID}
	switch e.Phase {
	case storagetest.Began:
		n := &callNote{locked: locked, bad: m.isBad(inc, e.Call.Name)}
		if e.Call.Op == storagetest.Delete {
			for p := range m.purges {
				if p.inc == inc && !p.ok && p.ended.IsZero() {
					n.purges = append(n.purges, p)
				}
			}
		}
		m.calls[id] = n
		inc.began(id, e, n.bad)
	case storagetest.TookEffect:
		if m.tracing {
			m.note("%s %s %s", inc, e.Call.Op, m.short(e.Call.Name))
		}
		m.effect(inc, m.calls[id], e)
	case storagetest.Ended:
		if e.Call.Op == storagetest.Delete && e.Fault.Effect == storagetest.Half && m.kind == storagetest.Redis {
			m.hidden[e.Call.Name] = inc
		}
		if o := e.Call.Op; e.Err == nil && (o == storagetest.Lock || o == storagetest.TryLock) {
			inc.lockedAt = m.now()
		}
		inc.finished(id, e, m.calls[id].bad)
		delete(m.calls, id)
		if m.tracing && (e.Err != nil || isTrouble(e.Fault)) {
			m.note("%s %s %s: after %s, %s", inc, e.Call.Op, m.short(e.Call.Name), e.Took, m.shortError(e.Err))
		}
	}
}

func (m *model) short(name string) string {
	name = strings.TrimPrefix(name, string(m.layout))
	if i := strings.LastIndexByte(name, '/'); i > 0 && len(name) >= i+65 {
		folder := name[:strings.IndexByte(name, '/')]
		return folder + "/…" + name[i+17:i+25] + name[i+65:]
	}
	return name
}

func (m *model) shortError(err error) string {
	if err == nil {
		return "done"
	}
	text := err.Error()
	return text[strings.LastIndex(text, ": ")+1:]
}

// isBad reports whether a name has trouble of its own.
func (m *model) isBad(inc *incarnation, name string) (bad bool) {
	inc.sim.plan.active(inc.number, m.now(), func(w *window) { bad = bad || w.isBad(name) })
	return bad
}

// wasBad reports whether a name has, or had a short time ago, trouble of its own.
func (m *model) wasBad(inc *incarnation, name string) bool {
	now := m.now()
	return slices.ContainsFunc(inc.sim.plan.windows, func(w *window) bool {
		return w.isBad(name) && now.After(w.from) && now.Before(w.to.Add(5*time.Minute))
	})
}

// effect is told that a value was stored or deleted. The caller holds the mutex.
func (m *model) effect(inc *incarnation, c *callNote, e storagetest.Event) {
	name := e.Call.Name
	if p, ok := m.layout.parse(name); ok {
		if e.Call.Op == storagetest.Store {
			m.storedValue(inc, p, name, e)
		} else {
			m.deletedValue(inc, c, p, name, e)
		}
		return
	}
	if _, ok := m.layout.parseIndexName(name); ok {
		if e.Call.Op == storagetest.Store {
			m.storedIndex(name, e.Value)
		} else {
			m.deletedIndex(inc, name)
		}
		return
	}
	if strings.HasPrefix(name, string(m.layout)+"instances/") && e.Call.Op == storagetest.Store {
		inc.recorded(m.now())
	}
}

func (m *model) storedValue(inc *incarnation, p place, name string, e storagetest.Event) {
	delete(m.hidden, name)
	s, old := m.read(name, p, e.Value), m.latest(name)
	s.by = inc
	switch {
	case s.what != sound:
		m.wrong("%s stored what cannot be read under %s", inc, m.short(name))
	case s.val.kind == kindDocument && !bytes.Equal(s.val.report.Document().Body, m.bodies[s.id.hash]):
		m.wrong("%s stored a report under %s that was never saved", inc, m.short(name))
	case s.val.kind == kindReference && p.kind == inPartition && s.val.target.key == p.key && len(m.states[m.layout.name(s.val.target)]) == 0:
		m.wrong("%s stored the reference under %s before the document", inc, m.short(name))
	case m.broughtBack(inc, p, s):
		m.wrong("%s stored %s after it has purged it", inc, m.short(name))
	case old.what == foreign && p.kind != damaged:
		m.wrong("%s overwrote a value of a later version under %s", inc, m.short(name))
	case old.what == sound && old.by == inc && s.val.kind == kindDocument && old.val.kind == kindDocument:
		if before, now := inc.savedAt(p.key, old.id), inc.savedAt(p.key, s.id); now.Before(before) {
			m.wrong("%s overwrote a newer report under %s with an older one", inc, m.short(name))
		}
	}
	if p.kind == ofFile && len(m.states[name]) == 0 {
		m.files[p.key.Source()] = append(m.files[p.key.Source()], name)
	}
	m.set(name, s)
}

// broughtBack reports whether a report is stored that was purged before.
func (m *model) broughtBack(inc *incarnation, p place, s state) bool {
	if s.val.kind != kindDocument {
		return false
	}
	saved := inc.savedAt(p.key, s.id)
	return slices.ContainsFunc(m.purged, func(by *purge) bool {
		return by.inc == inc && saved.Before(by.begun) && by.selection.Matches(p.key, nil, s.val.report)
	})
}

func (m *model) deletedValue(inc *incarnation, c *callNote, p place, name string, e storagetest.Event) {
	old := m.latest(name)
	m.set(name, state{by: inc})
	if old.what == nothing {
		return
	}
	m.count.deleted++
	if m.purgedBy(c, p, old) {
		m.count.purged++
		return
	}
	switch {
	case old.what == foreign && p.kind != damaged:
		m.wrong("%s deleted a value of a later version, %s", inc, m.short(name))
	case old.what == broken:
	case old.at.After(e.Call.Begun.Add(-2 * time.Second)):
		m.count.raced++ // it was stored while the deletion was under way
	case !c.locked && m.kind.Exclusive():
		m.wrong("%s deleted %s without the lock of the sweep", inc, m.short(name))
	default:
		age := e.Call.Begun.Add(inc.inst.maxOffset(e.Call.Begun)).Sub(old.val.at)
		if keep := m.retention(inc, e.Call.Begun); age < keep {
			m.wrong("%s deleted %s (%v) at an age of %s, although it is to be kept for %s", inc, m.short(name), old.val.kind, age, keep)
		}
	}
}

// retention returns how long values must be kept at a time: the longest retention that an instance could know of.
func (m *model) retention(inc *incarnation, now time.Time) (longest time.Duration) {
	for _, other := range m.lives {
		if r := other.demands(now); other != inc {
			longest = max(longest, r)
		}
	}
	return max(longest, inc.shortest(now))
}

// purgedBy reports whether a deletion is that of a purge under way.
func (m *model) purgedBy(c *callNote, p place, old state) bool {
	return slices.ContainsFunc(c.purges, func(by *purge) bool { return by.covers(p, old) })
}

// covers reports whether a purge may delete a value.
func (p *purge) covers(at place, old state) bool {
	s := p.selection
	switch {
	case s.Keys != nil:
		if slices.Contains(s.Keys, at.key) || at.kind == ofFile {
			return true
		}
		return old.val.kind == kindReference && slices.Contains(s.Keys, old.val.target.key)
	case s.Source != nil:
		return at.key.Source() == *s.Source || at.kind == ofFile
	case s.File != nil:
		return true
	case !s.Before.IsZero():
		return (old.what == sound || old.what == lost) && old.val.at.Before(s.Before)
	}
	return true
}

// must reports whether a purge must delete a value.
func (p *purge) must(at place, old state) bool {
	s := p.selection
	if at.kind == ofFile || at.kind == damaged || old.what != sound || !old.at.Before(p.begun) {
		return false
	}
	switch {
	case s.Keys != nil:
		return slices.Contains(s.Keys, at.key)
	case s.Source != nil:
		return at.key.Source() == *s.Source
	case s.File != nil:
		return p.files[at.key]
	case !s.Before.IsZero():
		return old.val.at.Before(s.Before)
	}
	return true
}

// beginPurge notes a purge.
func (m *model) beginPurge(inc *incarnation, s Selection) *purge {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &purge{inc: inc, selection: s, begun: m.now()}
	if s.File != nil {
		p.files = make(map[task.Key]bool)
		for name := range m.states {
			if at, ok := m.layout.parse(name); ok && m.isOf(at, *s.File) {
				if ref := m.latest(name); ref.what == sound {
					p.files[ref.val.target.key] = true
				}
			}
		}
	}
	m.purges[p] = struct{}{}
	for k, c := range inc.queue {
		c.maybe = c.maybe || s.Matches(k, c.item.Target, c.item.Report)
	}
	return p
}

// isOf reports whether a place is that of a reference from a file.
func (m *model) isOf(p place, sum [32]byte) bool {
	return p.kind == ofFile && (p.key.Source() == task.FileSource(simNamespace, sum, task.Summary) || p.key.Source() == task.FileSource(simNamespace, sum, task.Complete))
}

// endPurge checks that what was purged is gone.
func (m *model) endPurge(p *purge, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.ended, p.ok = m.now(), err == nil
	delete(m.purges, p)
	m.note("%s purge %s: %v", p.inc, p.selection.text(), err == nil)
	if p.inc.dead || err != nil {
		return
	}
	m.purged = append(m.purged, p)
	names := make([]string, 0)
	for name := range m.states {
		if at, ok := m.layout.parse(name); ok && p.must(at, m.latest(name)) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if by := m.hidden[name]; !m.kind.Lies() && (by == nil || by == p.inc) {
			m.wrong("%s purged %s with success, but %s is there", p.inc, p.selection.text(), m.short(name))
		}
	}
	for k, c := range p.inc.queue {
		if p.selection.Matches(k, c.item.Target, c.item.Report) && c.saved.Before(p.begun) {
			p.inc.leave(c, m.now())
		}
	}
}

// text describes a selection.
func (s Selection) text() string {
	switch {
	case s.Keys != nil:
		return fmt.Sprintf("of %d keys", len(s.Keys))
	case s.Source != nil:
		return "of a node"
	case s.File != nil:
		return "of a file"
	case !s.Before.IsZero():
		return "by age"
	}
	return "of everything"
}

func (m *model) storedIndex(name string, stored []byte) {
	places, _, err := decodeIndex(stored)
	if err != nil {
		m.wrong("an object of the index that cannot be read was stored: %v", err)
	}
	m.indexed[name] = make(map[place]struct{})
	for _, p := range places {
		m.indexed[name][p] = struct{}{}
	}
}

// deletedIndex checks that an object of the index goes after its values.
func (m *model) deletedIndex(inc *incarnation, name string) {
	now := m.now()
	begun, keep := inc.lockedAt.Add(inc.inst.minOffset(now)), m.longestLately(now)
	for p := range m.indexed[name] {
		value := m.layout.name(p)
		s := m.latest(value)
		if s.what != sound || m.kind.Lies() || s.at.After(now.Add(-20*time.Minute)) {
			continue
		}
		queued := slices.ContainsFunc(inc.copies[p.key], func(c *copyOf) bool { // it is about to be stored anew
			return c.ended.IsZero() || c.ended.After(inc.lockedAt)
		})
		if age := begun.Sub(s.val.at); age > keep+time.Second && !queued {
			m.wrong("%s deleted an object of the index before %s, which was %s old when the sweep began", inc, m.short(value), age)
			break
		}
	}
	delete(m.indexed, name)
}

// longestLately returns the longest retention of all instances that lived in the last hours:
// in an outage, others do not see that one has ended.
func (m *model) longestLately(now time.Time) (longest time.Duration) {
	for _, inc := range m.lives {
		if inc.dead && inc.endedAt.Before(now.Add(-4*time.Hour)) {
			continue
		}
		for _, k := range inc.keeps {
			longest = max(longest, k.retention)
		}
	}
	return longest
}

// saved notes that an item was queued.
func (m *model) saved(inc *incarnation, i Item) {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := idOf(i.Report)
	m.bodies[id.hash] = i.Report.Document().Body
	c := &copyOf{item: i, id: id, saved: m.now(), since: m.now()}
	if old := inc.queue[i.Key]; old != nil {
		c.since = old.since
		inc.leave(old, m.now())
	}
	for p := range m.purges {
		c.maybe = c.maybe || p.inc == inc && p.selection.Matches(i.Key, i.Target, i.Report)
	}
	inc.queue[i.Key] = c
	inc.copies[i.Key] = append(inc.copies[i.Key], c)
}

// confirmed checks that an item is stored that is said to be.
func (m *model) confirmed(inc *incarnation, k task.Key, r *task.Report) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if inc.dead {
		return
	}
	m.count.stored++
	id, now := idOf(r), m.now()
	m.note("%s stored %x", inc, k[8:12])
	var c *copyOf
	for _, saved := range inc.copies[k] {
		if saved.id == id && (c == nil || !saved.stored) {
			c = saved
		}
	}
	if c == nil {
		m.wrong("%s says that it has stored a report under %x that was not saved there", inc, k[8:12])
		return
	}
	c.stored = true
	inc.lastStored = now
	name := m.layout.name(place{kind: inPartition, key: k})
	if !slices.ContainsFunc(m.during(name, c.saved, now), func(s state) bool { return m.has(s, c, now) }) {
		m.wrong("%s says that it has stored a report under %s, but it has not", inc, m.short(name))
	}
	if inc.queue[k] == c {
		inc.leave(c, now)
	}
}

// gaveUp notes that an instance no longer tries to store a report.
func (m *model) gaveUp(inc *incarnation, name string) {
	now := m.now()
	inc.gaveUp++
	p, _ := m.layout.parse(name)
	c := inc.queue[p.key]
	if c == nil {
		c = &copyOf{item: Item{Key: p.key}} // it was purged meanwhile
	}
	if now.Sub(c.since) < giveUpAfter {
		m.wrong("%s gave up %s after %s", inc, m.short(name), now.Sub(c.since))
	}
	if now.Sub(inc.lastStored) > 10*time.Minute {
		m.wrong("%s gave up %s, although it has stored nothing else for %s", inc, m.short(name), now.Sub(inc.lastStored))
	}
	inc.leave(c, now)
}

// has reports whether a state is that of a copy.
func (m *model) has(s state, c *copyOf, now time.Time) bool {
	if s.what != sound {
		return false
	}
	if c.item.Target != nil {
		return s.val.kind == kindReference && s.val.target.key == *c.item.Target
	}
	if s.val.kind == kindDocument {
		return s.id == c.id
	}
	return slices.ContainsFunc(m.during(m.layout.name(s.val.target), c.saved, now), func(s state) bool { return s.id == c.id })
}

// load is a Load that was called.
type load struct {
	key         task.Key
	file        *[32]byte // the newest report of a file is asked for
	kind        task.Kind
	begun       time.Time
	left        bool // the caller has left before the end
	refusing    bool // grow refuses
	found       Found
	err         error
	quick       bool // it must be, unless something troubles the storage
	probing     bool // another Load is under way that shows whether the storage works again
	fromStorage bool
}

// ops returns the operations that the load consists of.
func (l *load) ops() []storagetest.Op {
	if l.file != nil {
		return []storagetest.Op{storagetest.Load, storagetest.List}
	}
	return []storagetest.Op{storagetest.Load}
}

var errNoRoom = errors.New("no room")

// beginLoad notes a Load.
func (m *model) beginLoad(inc *incarnation, l *load) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.begun = m.now()
	for _, o := range l.ops() {
		l.probing = l.probing || inc.loads[o] > 0 && !inc.lastGood[o].After(inc.lastFailure[o])
		inc.loads[o]++
	}
	l.fromStorage = inc.queue[l.key] == nil
}

// loaded checks the outcome of a Load.
func (m *model) loaded(inc *incarnation, l load) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count.loaded++
	now := m.now()
	took := now.Sub(l.begun)
	m.note("%s loaded %x after %s: found %v, error %v", inc, l.key[8:12], took, l.found.Report != nil, l.err != nil)
	if inc.dead {
		return
	}
	if took > 25*time.Second {
		m.wrong("%s took %s to load", inc, took)
	}
	possible, absent, exempt := m.possible(inc, place{kind: inPartition, key: l.key}, l.begun, now)
	if l.file != nil {
		possible, absent, exempt = m.newest(inc, l, now)
	}
	// A query by file lists first: another load may have begun to probe meanwhile.
	l.probing = l.probing || l.file != nil && inc.loads[storagetest.Load] > 1 && !inc.lastGood[storagetest.Load].After(inc.lastFailure[storagetest.Load])
	switch {
	case errors.Is(l.err, errNoRoom):
		if !l.refusing {
			m.wrong("%s: a Load fails for lack of room", inc)
		}
	case l.left && errors.Is(l.err, context.Canceled):
	case errors.Is(l.err, ErrUnreadable):
		m.count.unreadable++
		if !inc.fails(l.begun.Add(-10*time.Second), l.ops()...) && !l.probing && !exempt && !inc.broken(l.begun) && inc.sim.plan.works(inc.number, l.begun.Add(-10*time.Second), now) {
			m.wrong("%s could not read %x, although nothing troubles the storage: %v", inc, l.key[8:12], l.err)
		}
	case l.err != nil:
		m.wrong("%s: error of a Load: %v", inc, l.err)
	case l.found.Report == nil:
		m.count.absent++
		if lie := m.kind.Lies() && (exempt || inc.troubled(l.begun, time.Minute)); !absent && !lie {
			m.wrong("%s did not find %x, which it should have", inc, l.key[8:12])
		}
	default:
		m.checkFound(inc, l, possible)
	}
	for _, o := range l.ops() {
		inc.loads[o]--
		// A query by file may have been answered from the queue.
		if loaded := l.file == nil || o == storagetest.List; l.err == nil && l.fromStorage && loaded {
			inc.lastGood[o] = now
		}
	}
	if l.quick && took > 2*time.Second && !inc.troubled(l.begun, 0) && !exempt {
		m.wrong("%s took %s to load %x, although nothing troubles the storage", inc, took, l.key[8:12])
	}
}

func (m *model) checkFound(inc *incarnation, l load, possible map[reportID]bool) {
	id := idOf(l.found.Report)
	_, known := possible[id]
	if l.file != nil && (known || m.kind.Lies()) && inc.troubled(l.begun, time.Minute) {
		return // the storage may have a newer one than the queue
	}
	if !possible[id] {
		m.wrong("%s found a report under %x that is not the one that is stored: %v of %v", inc, l.key[8:12], id, possible)
		return
	}
	if !bytes.Equal(l.found.Report.Document().Body, m.bodies[id.hash]) {
		m.wrong("%s found another body under %x", inc, l.key[8:12])
	}
	age := l.begun.Add(inc.inst.minOffset(l.begun)).Sub(l.found.Report.At())
	if l.found.TTL <= 0 || l.found.TTL > m.longest || age > m.longest+time.Second {
		m.wrong("%s found a report of age %s that may be kept for %s", inc, age, l.found.TTL)
	}
}

// possible returns which reports can be found at a place, whether it is possible that there is none, and whether the key
// has trouble of its own.
func (m *model) possible(inc *incarnation, at place, from, to time.Time) (ids map[reportID]bool, absent, exempt bool) {
	ids = make(map[reportID]bool)
	var look func(p place, depth int)
	look = func(p place, depth int) {
		name := m.layout.name(p)
		exempt = exempt || m.wasBad(inc, name)
		queued := m.queued(inc, p.key, from, to, ids)
		for _, s := range m.during(name, from, to) {
			switch {
			case s.what != sound || s.val.kind == kindDamaged:
				absent = absent || !queued
			case s.val.kind == kindReference && depth == 0:
				look(s.val.target, 1)
			case s.val.kind == kindReference: // a document has become large, or the reverse
				look(s.val.target, 2)
				absent = true
			default:
				ids[s.id] = true
				age := to.Add(inc.inst.maxOffset(to)).Sub(s.val.at)
				absent = absent || age >= inc.shortest(to) && !queued
			}
		}
		if depth == 0 && queued {
			absent = false
		}
	}
	look(at, 0)
	return ids, absent, exempt
}

// newest is possible for the newest report of a file.
func (m *model) newest(inc *incarnation, l load, to time.Time) (ids map[reportID]bool, absent, exempt bool) {
	ids, absent = make(map[reportID]bool), true
	source := task.FileSource(simNamespace, *l.file, l.kind)
	var sure int64 // the time of a reference that must be found, if no newer one is
	found := make(map[reportID]int64)
	for _, name := range m.files[source] {
		all := m.during(name, l.begun, to)
		for _, s := range all {
			if s.what != sound {
				exempt = exempt || s.what == broken
				continue
			}
			targets, missing, bad := m.possible(inc, s.val.target, l.begun, to)
			exempt = exempt || bad
			for id := range targets {
				found[id] = max(found[id], s.val.at.UnixNano())
			}
			if len(all) == 1 && !missing && !bad {
				sure = max(sure, s.val.at.UnixNano())
				absent = false
			}
		}
	}
	for _, copies := range inc.copies {
		for _, c := range copies {
			queued, throughout := c.queued(l.begun, to)
			if !queued || c.item.Kind != l.kind || c.item.Report.File() != *l.file {
				continue
			}
			found[c.id] = max(found[c.id], c.id.at)
			if throughout {
				sure = max(sure, c.id.at)
				absent = false
			}
		}
	}
	for id, at := range found {
		ids[id] = at >= sure
	}
	return ids, absent, exempt
}

// queued adds the reports that are queued under a key, and reports whether one was from one time to another.
func (m *model) queued(inc *incarnation, k task.Key, from, to time.Time, ids map[reportID]bool) (throughout bool) {
	for _, c := range inc.copies[k] {
		queued, all := c.queued(from, to)
		if queued {
			ids[c.id] = true
			throughout = throughout || all
		}
	}
	return throughout
}

// queued reports whether the report may have been queued within a time, and whether it was all the time.
func (c *copyOf) queued(from, to time.Time) (ever, throughout bool) {
	if c.saved.After(to) || !c.ended.IsZero() && c.ended.Before(from) {
		return false, false
	}
	return true, !c.saved.After(from) && (c.ended.IsZero() || c.ended.After(to)) && !c.maybe
}
