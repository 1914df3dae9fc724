package harvest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

// simulation is several instances that use one storage and one upstream, for hours in which all of them fail.
type simulation struct {
	*testing.T
	random    *rand.Rand
	memory    *storagetest.Memory
	upstream  *upstream
	processes []*process // by instance; nil while it does not run
	confirmed map[ID]Target
	told      map[ID]string // how what has ended has ended
	next      int
	crashes   int
}

// Each submission that was confirmed ends as finished, failed or given up, whatever crashes. HARVEST_SEEDS is the number of
// runs for each kind of storage.
func TestSimulation(t *testing.T) {
	seeds := 1
	if n, err := strconv.Atoi(os.Getenv("HARVEST_SEEDS")); err == nil {
		seeds = n
	}
	for _, kind := range storagetest.Kinds {
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s, %d", kind, seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { simulate(t, kind, uint64(seed)) })
			})
		}
	}
}

func simulate(t *testing.T, kind storagetest.Kind, seed uint64) {
	const instances, hours = 3, 1
	sim := &simulation{
		T: t, random: rand.New(rand.NewPCG(seed, uint64(kind))), memory: storagetest.New(kind), upstream: newUpstream(),
		processes: make([]*process, instances), confirmed: make(map[ID]Target), told: make(map[ID]string),
	}
	sim.upstream.latency, sim.upstream.volatile = 50*time.Millisecond, true
	for i := range sim.processes {
		sim.start(i)
	}
	for begun := time.Now(); time.Since(begun) < hours*time.Hour; {
		sim.step()
		time.Sleep(time.Duration(sim.random.Int64N(int64(10 * time.Second))))
	}
	sim.settle()
}

// start starts an instance.
func (sim *simulation) start(i int) {
	sim.processes[i] = sim.upstream.start(sim.memory, Config{Instance: fmt.Sprint("instance", i)}, func(s *Source) {
		s.For = 2 * time.Hour
		s.Fetch = sim.remember(s.Fetch)
	})
}

// remember returns a Fetch that keeps reports in the memory of a process, from where they get into the storage after a while.
func (sim *simulation) remember(fetch func(context.Context, Target, bool) (Outcome, error)) func(context.Context, Target, bool) (Outcome, error) {
	type report struct {
		ID
		all bool
	}
	var mu sync.Mutex
	saved := make(map[report]time.Time)
	random := rand.New(rand.NewPCG(sim.random.Uint64(), 0))
	return func(ctx context.Context, t Target, all bool) (Outcome, error) {
		mu.Lock()
		at, ok := saved[report{t.ID, all}]
		mu.Unlock()
		if ok {
			out := Outcome{State: Finished, Report: testReport, Saved: !time.Now().Before(at)}
			if out.Saved {
				sim.upstream.task(t.ID, func(k *fakeTask) { k.kept[map[bool]int{true: 1}[all]] = true })
			}
			return out, nil
		}
		out, err := fetch(ctx, t, all)
		if err == nil && out.State == Finished {
			mu.Lock()
			defer mu.Unlock()
			saved[report{t.ID, all}] = time.Now().Add(time.Duration(random.Int64N(int64(20 * time.Second))))
			k := sim.upstream.task(t.ID, func(*fakeTask) {})
			out.Saved = k.kept[map[bool]int{true: 1}[all]]
		}
		return out, err
	}
}

// step does one thing.
func (sim *simulation) step() {
	i := sim.random.IntN(len(sim.processes))
	p := sim.processes[i]
	switch n := sim.random.IntN(100); {
	case p == nil:
		if n < 20 {
			sim.start(i)
		}
	case n < 70:
		sim.submit(p)
	case n < 78:
		sim.end(i, func() { p.kill(storagetest.Effect(sim.random.IntN(2))) })
	case n < 80:
		sim.end(i, p.stop)
	case n < 84:
		p.faulty.Set(sim.fault())
	case n < 94:
		p.faulty.Mend()
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
	switch sim.random.IntN(5) {
	case 0:
		return storagetest.Failing(storagetest.ErrInjected)
	case 1:
		return storagetest.Hanging(false)
	case 2:
		return storagetest.Hanging(true)
	case 3:
		return storagetest.Delayed(time.Second)
	}
	random := rand.New(rand.NewPCG(sim.random.Uint64(), 0))
	return func(storagetest.Call) storagetest.Fault { // the mutex of the storage is held
		return []storagetest.Fault{
			{}, {Before: 100 * time.Millisecond}, {Effect: storagetest.None, Err: storagetest.ErrInjected},
			{Effect: storagetest.Half}, {Err: storagetest.ErrInjected}, {After: time.Second},
		}[random.IntN(6)]
	}
}

// submit submits an archive of some files, some of which fail, are known late, or are lost.
func (sim *simulation) submit(p *process) {
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
	if p.mustAdd(sim.T, targets...) {
		for _, t := range targets {
			sim.confirmed[t.ID] = t
		}
	}
}

// end ends an instance, and notes what it has told.
func (sim *simulation) end(i int, end func()) {
	end()
	sim.processes[i].faulty.Mend()
	sim.crashes++
	sim.hear(sim.processes[i])
	sim.processes[i] = nil
}

// hear notes what an instance has told.
func (sim *simulation) hear(p *process) {
	for _, e := range p.log.All() {
		if id, ok := e.ContextMap()["id"].(string); ok {
			sim.told[ID{SubmitID: id}] = e.Message
		}
	}
}

// settle ends all faults, and checks that all is well in the end.
func (sim *simulation) settle() {
	sim.away(nil)
	for i, p := range sim.processes {
		if p == nil && i == 0 {
			sim.start(i) // one is enough
		} else if p != nil {
			p.faulty.Mend()
		}
	}
	time.Sleep(3 * time.Hour)
	for _, p := range sim.processes {
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
	kept, asked := 0, 0
	for id := range sim.confirmed {
		k := sim.upstream.task(id, func(*fakeTask) {})
		asked += k.asked[0] + k.asked[1]
		switch {
		case k.kept == [2]bool{true, true} && k.told > 0:
			kept++
		case sim.told[id] == "":
			sim.Errorf("%s has ended and nobody was told: %+v", id, k)
		}
	}
	if names := noted(sim.memory); len(names) != 0 {
		sim.Errorf("%d notes are left: %q", len(names), names[:min(3, len(names))])
	}
	// A task is asked for about 25 times in ten minutes. Some are followed by two instances.
	if most := 150 * len(sim.confirmed); asked > most {
		sim.Errorf("%d questions", asked)
	}
	sim.Logf("%d crashes and stops; %d submissions, %d confirmed, %d kept, %d told otherwise; %d questions",
		sim.crashes, sim.next, len(sim.confirmed), kept, len(sim.confirmed)-kept, sim.upstream.questions())
}
