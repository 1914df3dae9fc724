package harvest

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

var (
	simSeeds = flag.Int("sim.seeds", len(storagetest.Kinds), "number of seeds that TestSimulation runs, from 1 on")
	simSeed  = flag.Uint64("sim.seed", 0, "the seed that TestSimulation runs")
	simHours = flag.Float64("sim.hours", 1, "hours of trouble that TestSimulation simulates for each seed")
)

// simulation is several instances that use one storage and one upstream, for hours in which all of them fail.
type simulation struct {
	*testing.T
	seed      uint64
	random    *rand.Rand
	memory    *storagetest.Memory
	upstream  *upstream
	instances []*instance // nil while it does not run
	confirmed map[ID]Target
	told      map[ID]string // how what has ended has ended
	next      int
	crashes   int
}

// Each submission that was confirmed ends as two reports in the storage, as a failure that is told, or as a give-up that is
// told, whatever crashes. Reports get into the storage through the queue of an archive, in the same storage as the notes.
// Each seed has another kind of storage than the one before. A seed decides what happens, but not the order of what happens
// at the same instant: a seed that fails may have to be run a few times.
func TestSimulation(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes some seconds")
	}
	seeds := make([]uint64, *simSeeds)
	for i := range seeds {
		seeds[i] = uint64(i) + 1
	}
	if *simSeed > 0 {
		seeds = []uint64{*simSeed}
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	for _, seed := range seeds {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			began := time.Now()
			var summary string
			synctest.Test(t, func(t *testing.T) { summary = simulate(t, seed, time.Duration(*simHours*float64(time.Hour))) })
			took := time.Since(began)
			t.Logf("seed %d, %g hours in %s, %s", seed, (*simHours + settling.Hours()), took.Round(time.Millisecond), summary)
		})
		if !ok {
			t.Fatalf("run it again: go test ./internal/harvest -run '^TestSimulation$' -sim.seed %d -sim.hours %g", seed, *simHours)
		}
	}
}

const (
	// simulatedFor is how long a target is followed, and settling is the time without trouble in the end.
	simulatedFor = time.Hour
	settling     = 90 * time.Minute
)

func simulate(t *testing.T, seed uint64, span time.Duration) (summary string) {
	kind := storagetest.KindOf(seed)
	sim := &simulation{
		T: t, seed: seed, random: rand.New(rand.NewPCG(seed, 0)), memory: storagetest.New(kind), upstream: newUpstream(),
		instances: make([]*instance, 3), confirmed: make(map[ID]Target), told: make(map[ID]string),
	}
	sim.upstream.latency, sim.upstream.volatile = 50*time.Millisecond, true
	for i := range sim.instances {
		sim.start(i)
	}
	for begun := time.Now(); time.Since(begun) < span; {
		sim.step()
		time.Sleep(time.Duration(sim.random.Int64N(int64(10 * time.Second))))
	}
	return fmt.Sprintf("%s, %s", kind, sim.settle())
}

// instance is a process that follows, with an archive, and with reports in its memory.
type instance struct {
	*process
	sim     *simulation
	source  *Source
	backend *archive.Backend

	well time.Time // since when the storage works; zero if it does not

	mu    sync.Mutex
	kept  map[task.Key]*task.Report
	saved map[task.Key]bool
}

// start starts an instance.
func (sim *simulation) start(i int) {
	core, log := observer.New(zapcore.InfoLevel)
	logger := zap.New(core)
	in := &instance{
		process: &process{log: log, faulty: storagetest.NewFaulty(sim.memory)}, sim: sim,
		kept: make(map[task.Key]*task.Report), saved: make(map[task.Key]bool),
	}
	in.mend()
	in.archive = archive.New(archive.Config{Namespace: "tested", Seed: sim.random.Uint64(), Stored: in.stored})
	in.backend = &archive.Backend{Storage: in.faulty.Storage(), Logger: logger, Retention: 30 * 24 * time.Hour}
	in.archive.Attach(in.backend)
	in.Follower = New(Config{Namespace: "tested", Instance: fmt.Sprint("instance", i), Seed: sim.random.Uint64()})
	in.source = sim.upstream.source(in.archive, logger)
	in.source.For, in.source.Fetch = simulatedFor, in.fetch
	in.Attach(in.source)
	sim.instances[i] = in
}

// mend ends the trouble with the storage, which is some milliseconds away.
func (in *instance) mend() {
	in.faulty.Mend()
	in.faulty.Set(storagetest.Delayed(20 * time.Millisecond))
	in.well = time.Now()
}

// keyOfReport returns the key of a report, and the report.
func keyOfReport(id ID, kind task.Kind) (task.Key, *task.Report) {
	k := task.SubmissionKey(task.SubmissionSource("tested"), id.SubmitID, kind)
	body := []byte(fmt.Sprint(id, kind))
	return k, task.NewReport(task.Document{At: time.Now(), Hash: hex.EncodeToString(k[:16]), Length: len(body), Body: body})
}

// fetch fetches a report as the resolver does: from memory, the storage, or the upstream.
func (in *instance) fetch(ctx context.Context, t Target, kind task.Kind) (Outcome, error) {
	k, report := keyOfReport(t.ID, kind)
	in.mu.Lock()
	kept, saved := in.kept[k], in.saved[k]
	in.mu.Unlock()
	if kept != nil {
		return Outcome{State: Finished, Report: kept, Saved: saved, Key: k}, nil
	}
	found, unreadable := in.archive.Load(ctx, k, func(int64) error { return nil })
	if found.Report != nil {
		in.keep(k, found.Report, !found.Queued)
		return Outcome{State: Finished, Report: found.Report, Saved: !found.Queued, Key: k}, nil
	}
	out, err := in.sim.upstream.fetch(ctx, t, kind)
	switch {
	case err == nil && out.State == Unknown && unreadable != nil:
		return Outcome{}, unreadable
	case err != nil || out.State != Finished:
		return out, err
	}
	in.keep(k, report, false)
	if !in.archive.Save(archive.Item{Key: k, Report: report, Kind: kind}) && ctx.Err() == nil {
		in.sim.Error("the queue has no room")
	}
	return Outcome{State: Finished, Report: report, Key: k}, nil
}

func (in *instance) keep(k task.Key, r *task.Report, saved bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.kept[k], in.saved[k] = r, saved
}

// stored is called when the archive has stored a report.
func (in *instance) stored(i archive.Item) {
	in.mu.Lock()
	in.saved[i.Key] = in.kept[i.Key] != nil
	in.mu.Unlock()
	in.Saved(in.archive, i.Key)
}

// forget evicts all reports from memory.
func (in *instance) forget() {
	in.mu.Lock()
	defer in.mu.Unlock()
	clear(in.kept)
	clear(in.saved)
}

// waitForWrite waits until something is being written, or for some seconds.
func (in *instance) waitForWrite() {
	for begun := time.Now(); in.faulty.Pending(storagetest.Store) == 0 && time.Since(begun) < 20*time.Second; {
		time.Sleep(time.Millisecond)
	}
}

// leave ends the instance as Caddy does.
func (in *instance) leave() {
	in.Pause(in.source)
	_ = in.archive.Drain(in.backend)
	in.Flush()
	in.Detach(in.source)
	in.process.stop()
}

// step does one thing.
func (sim *simulation) step() {
	i := sim.random.IntN(len(sim.instances))
	p := sim.instances[i]
	switch n := sim.random.IntN(100); {
	case p == nil:
		if n < 20 {
			sim.start(i)
		}
	case n < 67:
		sim.submit(p)
	case n < 70:
		p.forget()
	case n < 78:
		sim.end(i, func() {
			p.waitForWrite()
			p.kill(storagetest.Effect(sim.random.IntN(2)))
		})
	case n < 80:
		sim.end(i, p.leave)
	case n < 84:
		p.faulty.Set(sim.fault())
		p.well = time.Time{}
	case n < 94:
		if p.well.IsZero() {
			p.mend()
		}
	case n < 96:
		sim.away(errAway)
	default:
		sim.away(nil)
	}
}

func (sim *simulation) away(err error) {
	sim.upstream.mu.Lock()
	defer sim.upstream.mu.Unlock()
	sim.upstream.away = err
}

// fault returns how a storage behaves for a while.
func (sim *simulation) fault() func(storagetest.Call) storagetest.Fault {
	switch sim.random.IntN(6) {
	case 0:
		return storagetest.Failing(storagetest.ErrInjected)
	case 1:
		return storagetest.Hanging(false)
	case 2:
		return storagetest.Hanging(true)
	case 3:
		return storagetest.Delayed(time.Second)
	case 4: // notes are fast, reports are not
		return func(c storagetest.Call) storagetest.Fault {
			if c.Op == storagetest.Store && !strings.Contains(c.Name, "/notes/") {
				return storagetest.Fault{Before: 10 * time.Second}
			}
			return storagetest.Fault{}
		}
	}
	seed := sim.random.Uint64()
	return func(c storagetest.Call) storagetest.Fault { // it depends on the call alone
		hash := fnv.New64a()
		fmt.Fprint(hash, c.Op, c.Name, c.Begun.UnixNano())
		random := rand.New(rand.NewPCG(seed, hash.Sum64()))
		return []storagetest.Fault{
			{}, {Before: 100 * time.Millisecond}, {Effect: storagetest.None, Err: storagetest.ErrInjected},
			{Effect: storagetest.Half}, {Err: storagetest.ErrInjected}, {After: time.Second},
		}[random.IntN(6)]
	}
}

// submit submits an archive of some files, some of which fail, are known late, or are lost.
func (sim *simulation) submit(p *instance) {
	var targets []Target
	for range 1 + sim.random.IntN(3) {
		sim.next++
		t := sim.upstream.submit(sim.next, time.Duration(sim.random.Int64N(int64(10*time.Minute))))
		sim.upstream.task(t.ID, func(k *fakeTask) {
			switch sim.random.IntN(20) {
			case 0:
				k.failed = true
			case 1:
				k.known = k.finished
			case 2:
				k.gone = k.finished.Add(-time.Second)
			default:
				k.gone = k.finished.Add(10 * time.Minute)
			}
		})
		targets = append(targets, t)
	}
	switch {
	case p.mustAdd(sim.T, targets...):
		for _, t := range targets {
			sim.confirmed[t.ID] = t
		}
	case !p.well.IsZero() && time.Since(p.well) > time.Minute:
		sim.Errorf("%s is not noted in time, although the storage works since %s", targets[0].ID, p.well)
	}
}

// end ends an instance, and notes what it has told.
func (sim *simulation) end(i int, end func()) {
	end()
	sim.instances[i].faulty.Mend()
	sim.crashes++
	sim.hear(sim.instances[i])
	sim.instances[i] = nil
}

// hear notes what an instance has told.
func (sim *simulation) hear(p *instance) {
	for _, e := range p.log.All() {
		if id, ok := e.ContextMap()["id"].(string); ok {
			sim.told[ID{SubmitID: id}] = e.Message
		}
	}
}

// settle ends all faults, and checks that all is well in the end.
func (sim *simulation) settle() (summary string) {
	sim.away(nil)
	for i, p := range sim.instances {
		if p == nil && i == 0 {
			sim.start(i) // one is enough
		} else if p != nil {
			p.mend()
		}
	}
	time.Sleep(settling)
	for _, p := range sim.instances {
		if p == nil {
			continue
		}
		sim.hear(p)
		if n := p.pending(); n != 0 {
			sim.Errorf("%d are pending: %+v", n, p.List()[0])
		}
		p.stop()
		p.faulty.Mend()
	}
	synctest.Wait()
	reader := archive.New(archive.Config{Namespace: "tested"})
	reader.Attach(&archive.Backend{Storage: sim.memory.Storage(), Logger: zap.NewNop(), Retention: 30 * 24 * time.Hour})
	kept, asked := 0, 0
	for id := range sim.confirmed {
		k := sim.upstream.task(id, func(*fakeTask) {})
		asked += k.asked[0] + k.asked[1]
		switch stored := sim.isStored(reader, id, task.Summary) && sim.isStored(reader, id, task.Complete); {
		case stored && k.told > 0:
			kept++
		case sim.told[id] == "":
			sim.Errorf("%s has ended and nobody was told; stored: %t; %+v", id, stored, k)
		}
	}
	if names := sim.notes(reader); len(names) != 0 {
		sim.Errorf("%d notes are left: %q", len(names), names[:min(3, len(names))])
	}
	reader.Close()
	// A task is asked for about 25 times in ten minutes. Some are followed by two instances.
	if most := 150 * len(sim.confirmed); asked > most {
		sim.Errorf("%d questions", asked)
	}
	return fmt.Sprintf("%d crashes and stops; %d submissions, %d confirmed, %d kept, %d told otherwise; %d questions",
		sim.crashes, sim.next, len(sim.confirmed), kept, len(sim.confirmed)-kept, sim.upstream.questions())
}

// notes returns the notes of all instances that can be found. A storage like that of Redis may have a value of which it does
// not know the name, after an operation that was done by half.
func (sim *simulation) notes(reader *archive.Archive) (found []string) {
	for i := range sim.instances {
		holder := fmt.Sprint("instance", i, "-0")
		names, err := reader.ListNotes(sim.Context(), holder)
		if err != nil {
			sim.Error(err)
		}
		for _, name := range names {
			if _, err := reader.LoadNote(sim.Context(), holder, name); !errors.Is(err, fs.ErrNotExist) {
				found = append(found, holder+"/"+name)
			}
		}
	}
	return found
}

// isStored reports whether the storage has a report.
func (sim *simulation) isStored(reader *archive.Archive, id ID, kind task.Kind) bool {
	k, report := keyOfReport(id, kind)
	found, err := reader.Load(sim.Context(), k, func(int64) error { return nil })
	if err != nil {
		sim.Error(err)
	}
	return found.Report != nil && found.Report.Same(report)
}
