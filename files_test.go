package fsbroker

import (
	"crypto/sha256"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// keepOf keeps a finished report of a file under a number.
func (m *memory) keepOf(sum [sha256.Size]byte, i int, kind task.Kind, at time.Time) *entry {
	d := inflatedReport(10).Document()
	d.File, d.At = sum, at
	return m.keep(numbered(i), task.NewReport(d), kept{ttl: time.Hour, kind: kind})
}

// Whatever is kept, replaced, renewed and removed, in any order, memory finds the newest report of each file.
func TestNewestInMemory(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	files := [][sha256.Size]byte{{1}, {2}, {3}, {3, 31: 1}, {4, 30: 1}, {4, 31: 1}, {}} // some begin alike
	const names = 60
	m := newMemory(1 << 30)
	defer m.close()
	start := time.Now()
	for range 20_000 {
		i, at := random.IntN(names), start.Add(time.Duration(random.IntN(1e6)))
		switch e, ok := m.get(numbered(i)); {
		case !ok || random.IntN(3) == 0:
			m.keepOf(files[random.IntN(len(files))], i, task.Kind(random.IntN(2)), at)
		case random.IntN(2) == 0:
			d := e.report.Document()
			d.At = at
			m.keep(numbered(i), task.NewReport(d), kept{ttl: time.Hour, kind: e.kind})
		default:
			m.purge(archive.Selection{Keys: []task.Key{numbered(i)}}.Matches)
		}
		sum, kind := files[random.IntN(len(files))], task.Kind(random.IntN(2))
		var want *entry
		for i := range names {
			if e, ok := m.get(numbered(i)); ok && sum != [sha256.Size]byte{} && e.report.File() == sum && e.kind == kind && (want == nil || e.report.At().After(want.report.At())) {
				want = e
			}
		}
		got := m.newest(sum, kind)
		if (got == nil) != (want == nil) || got != nil && !got.report.At().Equal(want.report.At()) {
			t.Fatalf("found %v, want %v", got, want)
		}
	}
	m.purge(archive.Selection{}.Matches)
	if n := len(m.files.single) + len(m.files.lists); n != 0 {
		t.Errorf("%d files are left in the index", n)
	}
}

// Files whose sums begin alike are told apart.
func TestFilesThatBeginAlike(t *testing.T) {
	m := newMemory(1 << 20)
	defer m.close()
	one, other := [sha256.Size]byte{0: 1, 31: 1}, [sha256.Size]byte{0: 1, 31: 2}
	first := m.keepOf(one, 1, task.Summary, time.Now())
	if m.newest(other, task.Summary) != nil || m.newest(one, task.Complete) != nil || m.newest(one, task.Summary) != first {
		t.Error("the report of another file is found, or none")
	}
	second := m.keepOf(other, 2, task.Summary, time.Now())
	if m.newest(one, task.Summary) != first || m.newest(other, task.Summary) != second {
		t.Error("the second report hides the first, or is not found")
	}
}
