package archive

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
)

// limited is a storage that does not keep large values.
type limited struct {
	certmagic.Storage
	store func(value []byte) (kept []byte, err error)
}

func (l limited) Store(ctx context.Context, name string, value []byte) error {
	kept, err := l.store(value)
	if err != nil {
		return err
	}
	return l.Storage.Store(ctx, name, kept)
}

// cutAt cuts values as MySQL does that is not strict.
func cutAt(limit int) func([]byte) ([]byte, error) {
	return func(value []byte) ([]byte, error) { return value[:min(len(value), limit)], nil }
}

// refuseAbove refuses values as MySQL does that is strict.
func refuseAbove(limit int) func([]byte) ([]byte, error) {
	return func(value []byte) ([]byte, error) {
		if len(value) > limit {
			return nil, errors.New("data too long at tcp://db?password=secret")
		}
		return value, nil
	}
}

// newLimited returns an archive over a storage that does not keep large values.
func newLimited(store func([]byte) ([]byte, error)) *fixture {
	return newFixtureWith(func(f *fixture, _ *Config) { f.backend.Storage = limited{f.storage.Storage(), store} })
}

// A storage that does not keep large values is found out soon after the start.
func TestTrial(t *testing.T) {
	for name, test := range map[string]struct {
		store   func([]byte) ([]byte, error)
		warning string // none if it is empty
		whole   int    // zero if there is no limit
	}{
		"keeps all":   {store: cutAt(2 << 20)},
		"cuts":        {store: cutAt(65535), warning: "a value of 71680 bytes came back with 65535", whole: 65535},
		"cuts later":  {store: cutAt(512 << 10), warning: "a value of 1048576 bytes came back with 524288", whole: 512 << 10},
		"refuses":     {store: refuseAbove(65535), warning: "a value of 71680 bytes was refused: data too long at tcp://db?REDACTED"},
		"refuses 1 M": {store: refuseAbove(1<<20 - 1), warning: "a value of 1048576 bytes was refused"},
		"changes": {store: func(value []byte) ([]byte, error) {
			return []byte(strings.ToValidUTF8(string(value), "?")), nil
		}, warning: "a value of 71680 bytes came back changed", whole: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newLimited(test.store)
				defer f.Close()
				time.Sleep(time.Minute)
				s := f.Stats()
				if text, err := json.Marshal(s); err != nil || strings.Contains(string(text), `"warnings":[`) != (test.warning != "") {
					t.Errorf("the state is %s, error %v", text, err)
				}
				if lines := f.logged("does not keep large values"); len(s.Warnings) != lines || (lines != 0) != (test.warning != "") || s.Failing {
					t.Fatalf("%d lines, %+v", lines, s)
				}
				if test.warning != "" && (!strings.HasPrefix(s.Warnings[0], test.warning) || strings.Contains(s.Warnings[0], "secret")) {
					t.Errorf("warned of %q", s.Warnings)
				}
				if whole := f.backend.whole.Load(); whole > 2<<20 && test.whole != 0 || test.whole > 1 && whole != int64(test.whole) {
					t.Errorf("values of up to %d bytes are stored", whole)
				}
				if left := f.storage.Names("fsbroker_task/tested/trials"); len(left) != 0 {
					t.Errorf("%q is left", left)
				}
			})
		})
	}
}

// A report that the storage would store only in part counts as refused, and holds up no other. So does one that is saved before
// the storage has been tried.
func TestReportsThatWouldBeCut(t *testing.T) {
	t.Run("at the start", func(t *testing.T) { testReportsThatWouldBeCut(t, 0) })
	t.Run("later", func(t *testing.T) { testReportsThatWouldBeCut(t, time.Minute) })
}

func testReportsThatWouldBeCut(t *testing.T, after time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		f := newLimited(cutAt(65535))
		defer f.Close()
		time.Sleep(after)
		for i := range 10 {
			f.Save(item(i, 100<<10))
			f.Save(item(100+i, 60<<10))
		}
		time.Sleep(time.Minute)
		if s := f.Stats(); f.confirmations() != 10 || s.Queued != 10 || s.Failing {
			t.Errorf("%d are stored, %+v", f.confirmations(), s)
		}
		if n := f.logged("does not take a report: it is retried"); n != 10 {
			t.Errorf("it is logged %d times", n)
		}
		for i := range 10 {
			if found, err := f.find(t, numbered(100+i)); err != nil || found.Report == nil || found.Queued {
				t.Errorf("a small report: %+v, error %v", found, err)
			}
			if found, err := f.find(t, numbered(i)); err != nil || found.Report == nil || !found.Queued {
				t.Errorf("a large report: %+v, error %v", found, err)
			}
		}
		if n := f.logged("damaged"); n != 0 {
			t.Errorf("%d are damaged", n)
		}
	})
}

// A storage that is away is tried later, and not warned of.
func TestTrialOfAStorageThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		away.Store(true)
		cut := cutAt(65535)
		f := newLimited(func(value []byte) ([]byte, error) {
			if away.Load() {
				return nil, errAway
			}
			return cut(value)
		})
		defer f.Close()
		time.Sleep(time.Hour)
		if s := f.Stats(); len(s.Warnings) != 0 {
			t.Errorf("warned of %q", s.Warnings)
		}
		away.Store(false)
		time.Sleep(3 * time.Minute)
		if s := f.Stats(); len(s.Warnings) != 1 {
			t.Errorf("warned of %q", s.Warnings)
		}
	})
}
