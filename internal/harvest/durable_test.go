package harvest

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive/storagetest"
)

// An answer with several IDs is one note, which is deleted when all of them have ended.
func TestNotesOfAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.Redis)
		p := u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Second)
		targets := []Target{u.submit(1, 10*time.Second), u.submit(2, time.Minute), u.submit(3, 10*time.Second)}
		if !p.mustAdd(t, targets...) || len(noted(m)) != 1 || !p.List()[0].Noted {
			t.Fatalf("notes %q", noted(m))
		}
		if !p.mustAdd(t, targets[1]) || len(noted(m)) != 1 {
			t.Errorf("what is pending is noted again: %q", noted(m))
		}
		time.Sleep(30 * time.Second)
		if p.pending() != 1 || len(noted(m)) != 1 {
			t.Errorf("%d pending, notes %q", p.pending(), noted(m))
		}
		time.Sleep(time.Minute)
		if p.counts() != [3]int{3} || len(noted(m)) != 0 {
			t.Errorf("counts %v, notes %q", p.counts(), noted(m))
		}
	})
}

// A large answer becomes several notes that every storage takes.
func TestLargeAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.Consul)
		p := u.start(m, Config{Instance: "a"}, nil)
		time.Sleep(time.Second)
		var targets []Target
		for i := range 5000 {
			target := u.submit(i, 5*time.Minute)
			target.Name = strings.Repeat("name", 50)
			targets = append(targets, target)
		}
		if !p.mustAdd(t, targets...) || len(noted(m)) < 2 {
			t.Fatalf("notes %q", noted(m))
		}
		p.kill(storagetest.None)
		p = u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Second)
		if p.pending() != 5000 {
			t.Errorf("%d are pending after a restart", p.pending())
		}
		time.Sleep(10 * time.Minute)
		if p.counts() != [3]int{5000} || len(noted(m)) != 0 {
			t.Errorf("counts %v, notes %q", p.counts(), noted(m))
		}
	})
}

// An instance that comes back resumes its own at once, and says when it was accepted.
func TestResume(t *testing.T) {
	for _, kind := range storagetest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newUpstream()
				m := storagetest.New(kind)
				p := u.start(m, Config{Instance: "a"}, nil)
				time.Sleep(time.Second)
				for i := range 100 {
					if !p.mustAdd(t, u.submit(i, 3*time.Minute)) {
						t.Fatal("it is not noted")
					}
				}
				time.Sleep(time.Minute)
				p.kill(storagetest.None)
				time.Sleep(time.Minute)
				asked := u.questions() // it asks as soon as it starts
				p = u.start(m, Config{Instance: "a"}, nil)
				defer p.stop()
				synctest.Wait()
				if list := p.List(); len(list) != 100 || list[0].Age < 2*time.Minute || !list[0].Noted {
					t.Fatalf("pending is %+v", list)
				}
				time.Sleep(time.Second)
				if n := u.questions() - asked; n != 100 || len(noted(m)) != 100 {
					t.Errorf("%d questions in a second, %d notes", n, len(noted(m)))
				}
				time.Sleep(2 * time.Minute)
				if p.counts() != [3]int{100} || len(noted(m)) != 0 {
					t.Errorf("counts %v, notes %q", p.counts(), noted(m))
				}
				if n := p.logged("what was pending is followed again"); n != 1 {
					t.Errorf("it is logged %d times", n)
				}
			})
		})
	}
}

// Another instance takes over what an instance has followed that does not come back: one, and at the time that is promised.
func TestTakeOver(t *testing.T) {
	for _, kind := range storagetest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newUpstream()
				m := storagetest.New(kind)
				a := u.start(m, Config{Instance: "a"}, nil)
				b, c := u.start(m, Config{Instance: "b"}, nil), u.start(m, Config{Instance: "c"}, nil)
				defer b.stop()
				defer c.stop()
				time.Sleep(time.Minute)
				for i := range 100 {
					if !a.mustAdd(t, u.submit(i, 5*time.Minute)) {
						t.Fatal("it is not noted")
					}
				}
				time.Sleep(time.Minute)
				if b.pending()+c.pending() != 0 {
					t.Error("others follow what a living instance follows")
				}
				a.kill(storagetest.None)
				killed := time.Now()
				for b.pending()+c.pending() < 100 && time.Since(killed) < time.Hour {
					time.Sleep(100 * time.Millisecond)
				}
				if took := time.Since(killed); took < expireAfter-renewEvery || took > expireAfter+2*lookEvery {
					t.Errorf("it took %s", took)
				}
				time.Sleep(5 * time.Second)
				const lock = "fsbroker_task/tested/notes-a-0.lock"
				n, told := b.pending()+c.pending(), b.logged("is taken over")+c.logged("is taken over")
				if kind.Exclusive() && (n != 100 || told != 1 || m.Holder(lock) != nil) {
					t.Errorf("%d are followed, which is logged %d times; the lock is held by %v", n, told, m.Holder(lock))
				}
				time.Sleep(5 * time.Minute)
				finished := b.counts()[0] + c.counts()[0]
				if finished < 100 || len(noted(m)) != 0 || kind.Exclusive() && finished != 100 {
					t.Errorf("counts %v and %v, notes %q", b.counts(), c.counts(), noted(m))
				}
				time.Sleep(time.Hour)
				if leases := m.Names("fsbroker_task/tested/notes/leases/"); len(leases) != 2 {
					t.Errorf("leases %q", leases)
				}
			})
		})
	}
}

// What covers a lease that cannot be read is taken over as well, unless its holder renews it.
func TestDamagedLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.FileSystem)
		a, b := u.start(m, Config{Instance: "a"}, nil), u.start(m, Config{Instance: "b"}, nil)
		defer b.stop()
		time.Sleep(time.Second)
		a.mustAdd(t, u.submit(1, time.Hour))
		lease := m.Names("fsbroker_task/tested/notes/leases/a")[0]
		m.Put(lease, []byte("damaged"))
		time.Sleep(time.Minute)
		if a.pending() != 1 || b.pending() != 0 {
			t.Errorf("while its holder renews it, %d and %d are pending", a.pending(), b.pending())
		}
		a.kill(storagetest.None)
		m.Put(lease, []byte("damaged"))
		time.Sleep(expireAfter + 3*lookEvery)
		if b.pending() != 1 {
			t.Error("it is not taken over")
		}
	})
}

// What a lock covers that is slow, held for ever, or hangs, is taken over all the same. A lock that hangs costs one call, and
// does not delay Close. A holder that comes back while the lock is waited for keeps what it follows.
func TestTakeOverWithLocks(t *testing.T) {
	for name, test := range map[string]struct {
		fault storagetest.Fault
		late  time.Duration
	}{
		"freed for who waits": {fault: storagetest.Fault{Before: 20 * time.Second}, late: 20 * time.Second},
		"held":                {fault: storagetest.Fault{Hang: true}, late: 45 * time.Second},
		"deaf":                {fault: storagetest.Fault{Hang: true, Deaf: true}, late: 45 * time.Second},
		"fails":               {fault: storagetest.Fault{Effect: storagetest.None, Err: storagetest.ErrInjected}, late: 45 * time.Second},
	} {
		for _, back := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, holder comes back: %t", name, back), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					u, m := newUpstream(), storagetest.New(storagetest.Consul)
					a, b := u.start(m, Config{Instance: "a"}, nil), u.start(m, Config{Instance: "b"}, nil)
					time.Sleep(time.Second)
					a.mustAdd(t, u.submit(1, time.Hour))
					b.faulty.Set(func(c storagetest.Call) (f storagetest.Fault) {
						if c.Op == storagetest.Lock && strings.Contains(c.Name, "/notes-") {
							return test.fault
						}
						return f
					})
					a.kill(storagetest.None)
					time.Sleep(expireAfter + 2*lookEvery)
					if back {
						a = u.start(m, Config{Instance: "a"}, nil)
						defer a.stop()
					}
					time.Sleep(test.late - 4*lookEvery)
					before := b.pending()
					time.Sleep(6 * lookEvery)
					if after := b.pending(); before != 0 || (after != 0) == back {
						t.Errorf("%d are taken over before the time, %d in the end", before, after)
					}
					if n := b.faulty.Pending(storagetest.Lock); n > 1 {
						t.Errorf("%d locks hang", n)
					}
					begun := time.Now()
					if b.stop(); time.Since(begun) > 0 {
						t.Errorf("Close took %s", time.Since(begun))
					}
					b.faulty.Mend()
				})
			})
		}
	}
}

// One try at a time is made to take over what a lease covers, also while the storage hangs.
func TestTakeOverThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.FileSystem)
		a, b := u.start(m, Config{Instance: "a"}, nil), u.start(m, Config{Instance: "b"}, nil)
		defer b.stop()
		time.Sleep(time.Second)
		a.mustAdd(t, u.submit(1, time.Hour))
		a.kill(storagetest.None)
		most, folder := 0, path.Dir(noted(m)[0])
		b.faulty.Set(func(c storagetest.Call) storagetest.Fault {
			return storagetest.Fault{Hang: c.Op == storagetest.List && c.Name == folder}
		})
		for range 300 {
			time.Sleep(time.Second)
			synctest.Wait()
			most = max(most, b.faulty.Pending(storagetest.List))
		}
		if most != 1 {
			t.Errorf("%d lists hang at once", most)
		}
		b.faulty.Mend()
		time.Sleep(time.Minute)
		if b.pending() != 1 {
			t.Error("it is not taken over when the storage works again")
		}
	})
}

// Nothing is noted below a lease that is not renewed: another instance may have taken over what it covers.
func TestNotesNeedALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.FileSystem)
		p := u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Second)
		p.faulty.Set(failing(isLease))
		if !p.mustAdd(t, u.submit(1, time.Hour)) {
			t.Error("it is not noted although the lease is fresh")
		}
		time.Sleep(freshFor)
		if p.mustAdd(t, u.submit(2, time.Hour)) || len(noted(m)) != 1 {
			t.Errorf("notes %q, although the lease is old", noted(m))
		}
		p.faulty.Mend()
		time.Sleep(2 * renewAgain)
		if len(noted(m)) != 2 {
			t.Error("it is not noted when the lease is renewed")
		}
	})
}

// What is given up while it is being noted is not noted in the end. It is deleted once, after it was stored.
func TestGivenUpWhileItIsNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.FileSystem)
		p := u.start(m, Config{Instance: "a"}, nil)
		defer time.Sleep(time.Minute) // until what is under way in the storage has ended
		defer p.stop()
		time.Sleep(time.Minute) // until the storage has been tried
		before := p.faulty.Calls(storagetest.Delete)
		p.faulty.Set(storagetest.Delayed(time.Second))
		target := u.submit(1, time.Hour)
		p.mustAdd(t, target)
		p.GiveUp(target.ID)
		synctest.Wait()
		if n := p.faulty.Pending(storagetest.Delete); n != 0 || len(noted(m)) != 0 {
			t.Errorf("%d deletions are under way before it is stored", n)
		}
		time.Sleep(time.Minute)
		if n := p.faulty.Calls(storagetest.Delete) - before; n != 1 || len(noted(m)) != 0 {
			t.Errorf("it is deleted %d times; notes %q", n, noted(m))
		}
	})
}

// What cannot be noted in time is followed anyway, and noted when the storage works again.
func TestNotedLater(t *testing.T) {
	for name, fault := range map[string]func(storagetest.Call) storagetest.Fault{
		"fails":           storagetest.Failing(storagetest.ErrInjected),
		"fails for notes": failing(func(name string) bool { return !isLease(name) }),
		"hangs for notes": func(c storagetest.Call) storagetest.Fault { return storagetest.Fault{Hang: !isLease(c.Name)} },
		"hangs":           storagetest.Hanging(false),
		"deaf":            storagetest.Hanging(true),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newUpstream()
				m := storagetest.New(storagetest.FileSystem)
				p := u.start(m, Config{Instance: "a"}, nil)
				defer p.stop()
				time.Sleep(time.Second)
				p.faulty.Set(fault)
				for i := range 100 {
					began := time.Now()
					if p.mustAdd(t, u.submit(i, time.Hour)) || time.Since(began) != 500*time.Millisecond {
						t.Fatalf("it is noted, or not after %s", time.Since(began))
					}
				}
				short := u.submit(100, time.Minute)
				p.mustAdd(t, short)
				time.Sleep(3 * time.Minute)
				stores := p.faulty.Calls(storagetest.Store)
				time.Sleep(time.Minute)
				if n := p.faulty.Calls(storagetest.Store) - stores; n > 200 {
					t.Errorf("%d writes in a minute to a storage that fails", n)
				}
				if p.pending() != 100 || p.counts() != [3]int{1} || p.List()[0].Noted || p.logged("cannot be noted") != 1 {
					t.Errorf("%d pending, counts %v", p.pending(), p.counts())
				}
				begun := time.Now()
				if p.Flush(); time.Since(begun) > 0 {
					t.Errorf("a storage that fails was waited for, %s", time.Since(begun))
				}
				p.faulty.Mend()
				time.Sleep(time.Minute)
				if len(noted(m)) != 100 || !p.List()[99].Noted || p.logged("can be noted") != 1 {
					t.Errorf("%d notes", len(noted(m)))
				}
			})
		})
	}
}

// A value that the storage refuses, or that hangs, does not hold up others.
func TestOneBadNote(t *testing.T) {
	for name, fault := range map[string]storagetest.Fault{
		"refused": {Effect: storagetest.None, Err: storagetest.ErrInjected},
		"hangs":   {Hang: true, Deaf: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newUpstream()
				m := storagetest.New(storagetest.FileSystem)
				p := u.start(m, Config{Instance: "a"}, nil)
				defer p.stop()
				time.Sleep(time.Second)
				bad := ""
				p.faulty.Set(func(c storagetest.Call) storagetest.Fault {
					if bad == "" && c.Op == storagetest.Store {
						bad = c.Name
					}
					if c.Name == bad {
						return fault
					}
					return storagetest.Fault{Before: 20 * time.Millisecond}
				})
				if p.mustAdd(t, u.submit(0, time.Hour)) {
					t.Fatal("it is noted")
				}
				for i := range 1000 {
					if !p.mustAdd(t, u.submit(i+1, time.Hour)) {
						t.Fatalf("another one is not noted: %d", i)
					}
					time.Sleep(10 * time.Millisecond)
				}
				p.faulty.Mend()
			})
		})
	}
}

// What a storage has lost is noted again.
func TestLostNotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.FileSystem)
		p := u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Second)
		p.mustAdd(t, u.submit(1, time.Hour))
		m.Remove(noted(m)[0])
		time.Sleep(2 * compareEvery)
		if len(noted(m)) != 1 {
			t.Error("it is not noted again")
		}
	})
}

// Two processes with one data directory have two leases. One that is started again takes its own, even after a crash.
func TestSlots(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "locks")
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.FileSystem)
		c := Config{Instance: "a", LockDir: dir}
		first, second := u.start(m, c, nil), u.start(m, c, nil)
		if first.lease.holder != "a-0" || second.lease.holder != "a-1" {
			t.Errorf("the leases are %s and %s", first.lease.holder, second.lease.holder)
		}
		time.Sleep(time.Second)
		first.mustAdd(t, u.submit(1, time.Hour))
		second.mustAdd(t, u.submit(2, time.Hour))
		first.kill(storagetest.None)
		again := u.start(m, c, nil)
		time.Sleep(time.Second)
		if again.lease.holder != "a-0" || again.pending() != 1 || second.pending() != 1 {
			t.Errorf("%s follows %d, the other one %d", again.lease.holder, again.pending(), second.pending())
		}
		time.Sleep(10 * time.Minute)
		if again.pending() != 1 || second.pending() != 1 {
			t.Error("they fight")
		}
		again.stop()
		second.stop()
	})
}

// Without a directory for locks, a process has a lease of its own.
func TestNoSlot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.FileSystem)
		p := u.start(m, Config{Instance: "a", LockDir: file}, nil)
		defer p.stop()
		if !strings.HasPrefix(p.lease.holder, "a-") || len(p.lease.holder) < 10 || p.logged("cannot be told from others") != 1 {
			t.Errorf("the lease is %s", p.lease.holder)
		}
	})
}

// A note that is damaged is deleted, and one that another version has stored is left alone. Both are told once.
func TestNotesThatCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.FileSystem)
		other := u.start(m, Config{Instance: "b"}, nil)
		defer other.stop()
		if err := other.archive.StoreNote(t.Context(), "a-0", "strange", []byte(`{"a": 1}`)); err != nil {
			t.Fatal(err)
		}
		if err := other.archive.StoreNote(t.Context(), "a-0", "empty", []byte(`[{}]`)); err != nil {
			t.Fatal(err)
		}
		const folder = "fsbroker_task/tested/notes/a-0/"
		m.Put(folder+"damaged", []byte("damaged"))
		p := u.start(m, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Hour)
		if left := noted(m); !slices.Equal(left, []string{folder + "empty", folder + "strange"}) {
			t.Errorf("left is %q", left)
		}
		if p.logged("cannot be read") != 2 || p.logged("is damaged") != 1 || p.pending() != 0 {
			t.Errorf("logged %+v", p.log.All())
		}
	})
}

// A process that could not reach the storage for a while, like all others, is not taken over afterwards.
func TestOutageIsNoDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m := storagetest.New(storagetest.FileSystem)
		a, b := u.start(m, Config{Instance: "a"}, nil), u.start(m, Config{Instance: "b"}, nil)
		defer a.stop()
		defer b.stop()
		time.Sleep(time.Minute)
		a.mustAdd(t, u.submit(1, time.Hour))
		for range 3 {
			a.faulty.Set(storagetest.Failing(storagetest.ErrInjected))
			b.faulty.Set(storagetest.Failing(storagetest.ErrInjected))
			time.Sleep(5 * time.Minute)
			b.faulty.Mend()
			time.Sleep(5 * time.Second)
			a.faulty.Mend()
			time.Sleep(time.Minute)
		}
		if a.pending() != 1 || b.pending() != 0 {
			t.Errorf("%d and %d are pending", a.pending(), b.pending())
		}
	})
}

func TestEncodeTargets(t *testing.T) {
	now := time.Now().UTC()
	targets := []Target{
		{ID: ID{SubmitID: "a"}, Client: "client", SHA256: "sum", Name: "\"name\"\xff", Accepted: now},
		{ID: ID{AppServerID: "node", TaskID: "task"}, Known: true, Accepted: now},
	}
	pages := encodeTargets(targets)
	got, err := decodeTargets(pages[0])
	targets[0].Name = "\"name\"�"
	if len(pages) != 1 || err != nil || !slices.Equal(got, targets) {
		t.Errorf("%d pages, %+v, error %v", len(pages), got, err)
	}
	for _, wrong := range []string{"", "{}", `[{}]`, `[{"node": "a"}]`, `[{"submit_id": "a"`} {
		if _, err := decodeTargets([]byte(wrong)); err == nil {
			t.Errorf("%q can be read", wrong)
		}
	}
}

// FuzzDecodeTargets reads any note, and what it has read again.
func FuzzDecodeTargets(f *testing.F) {
	f.Add([]byte(`[{"submit_id": "a", "accepted": "2026-01-01T00:00:00Z"}, {"node": "a", "task_id": "b"}]`))
	f.Fuzz(func(t *testing.T, content []byte) {
		targets, err := decodeTargets(content)
		if err != nil || len(targets) == 0 {
			return
		}
		var again []Target
		for _, page := range encodeTargets(targets) {
			more, err := decodeTargets(page)
			if err != nil {
				t.Fatal(err)
			}
			again = append(again, more...)
		}
		if !slices.EqualFunc(targets, again, func(p, q Target) bool { return p.ID == q.ID && p.Accepted.Equal(q.Accepted) }) {
			t.Errorf("%+v became %+v", targets, again)
		}
	})
}

// A reload leaves the notes alone.
func TestNotesAcrossAReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, m := newUpstream(), storagetest.New(storagetest.Redis)
		var before *Source
		p := u.start(m, Config{Instance: "a"}, func(s *Source) { before = s })
		defer p.stop()
		p.mustAdd(t, u.submit(1, time.Hour))
		notes := noted(m)
		p.Attach(u.source(p.archive, before.Logger))
		p.Pause(before)
		p.Detach(before)
		time.Sleep(time.Minute)
		if left := noted(m); len(left) != 1 || !slices.Equal(left, notes) || !p.List()[0].Noted {
			t.Errorf("notes %q became %q", notes, left)
		}
	})
}

// Notes are again where they were before a source that has ended.
func TestStorageOfTheSourceBefore(t *testing.T) {
	for name, end := range map[string]func(*Follower, *Source){"paused": (*Follower).Pause, "detached": (*Follower).Detach} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, m := newUpstream(), storagetest.New(storagetest.Redis)
				p := u.start(m, Config{Instance: "a"}, nil)
				defer p.stop()
				s := u.source(nil, zap.NewNop())
				p.Attach(s)
				end(p.Follower, s)
				if !p.mustAdd(t, u.submit(1, time.Hour)) || len(noted(m)) != 1 {
					t.Errorf("notes %q", noted(m))
				}
			})
		})
	}
}

// Another storage gets the notes at once, and none is waited for that nobody can store.
func TestAnotherStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUpstream()
		m, another := storagetest.New(storagetest.Redis), storagetest.New(storagetest.Redis)
		var first *Source
		p := u.start(m, Config{Instance: "a"}, func(s *Source) { first = s })
		time.Sleep(time.Second)
		targets := []Target{u.submit(0, time.Hour), u.submit(1, time.Hour)}
		if !p.mustAdd(t, targets...) || len(noted(m)) != 1 {
			t.Fatalf("notes %q", noted(m))
		}
		without := u.source(nil, zap.NewNop())
		p.Attach(without)
		p.Pause(first)
		p.Detach(first)
		for i := range 100 {
			began := time.Now()
			if !p.mustAdd(t, u.submit(i+2, time.Hour)) || time.Since(began) > 0 {
				t.Fatalf("it took %s to note it nowhere", time.Since(began))
			}
		}
		for _, item := range p.List() {
			if item.Noted {
				t.Fatalf("%+v is noted nowhere", item)
			}
		}
		next := archive.New(archive.Config{Namespace: "tested"})
		defer next.Close()
		next.Attach(&archive.Backend{Storage: another.Storage(), Logger: zap.NewNop(), Retention: time.Hour})
		p.Attach(u.source(next, zap.NewNop()))
		p.Pause(without)
		p.Detach(without)
		if !p.mustAdd(t, u.submit(102, time.Hour)) {
			t.Error("it is not noted at once")
		}
		p.stop()
		synctest.Wait()
		p = u.start(another, Config{Instance: "a"}, nil)
		defer p.stop()
		time.Sleep(time.Second)
		if p.pending() != 103 {
			t.Errorf("%d are pending after a restart with the other storage", p.pending())
		}
		time.Sleep(2 * time.Hour)
		if len(noted(another)) != 0 || p.counts() != [3]int{103} {
			t.Errorf("counts %v, notes %q", p.counts(), noted(another))
		}
	})
}

// Each task in the storage that fails is told of, with what follows from it.
func TestTasksThatFail(t *testing.T) {
	for name, test := range map[string]struct {
		fails func(c storagetest.Call) bool
		told  string
	}{
		"resume": {func(c storagetest.Call) bool { return c.Op == storagetest.List && strings.HasSuffix(c.Name, "/a-0") }, "is not followed"},
		"look":   {func(c storagetest.Call) bool { return c.Op == storagetest.List && strings.HasSuffix(c.Name, "/leases") }, "is not taken over"},
		"a look at one lease": {func(c storagetest.Call) bool {
			return c.Op == storagetest.Load && strings.HasSuffix(c.Name, "/leases/b-0")
		}, "is not taken over"},
		"lease": {func(c storagetest.Call) bool { return c.Op == storagetest.Store && isLease(c.Name) }, "other instances may take it over"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, m := newUpstream(), storagetest.New(storagetest.FileSystem)
				p, other := u.start(m, Config{Instance: "a"}, nil), u.start(m, Config{Instance: "b"}, nil)
				defer p.stop()
				defer other.stop()
				p.faulty.Set(func(c storagetest.Call) storagetest.Fault {
					if test.fails(c) {
						return storagetest.Fault{Effect: storagetest.None, Err: storagetest.ErrInjected}
					}
					return storagetest.Fault{}
				})
				time.Sleep(time.Minute + 10*time.Second)
				if told, all := p.logged(test.told), p.logged("a background task fails"); told != 1 || all != 1 {
					t.Errorf("%d lines tell of it, of %d", told, all)
				}
				p.faulty.Mend()
				time.Sleep(time.Minute)
				if n := p.logged("a background task works again"); n != 1 {
					t.Errorf("that it works again is logged %d times", n)
				}
			})
		})
	}
}
