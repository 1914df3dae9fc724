package fsbroker_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	fsbroker "github.com/caddy-fsbroker/caddy-fsbroker"
)

// forgetful is a broker that takes in files, and deletes a report a moment after it is finished.
type forgetful struct {
	*backend

	analysis, keeps time.Duration // how long a report takes, and how long it is there
	silent          time.Duration // how long a submission is unknown at first

	mu        sync.Mutex
	submitted map[string]time.Time
	questions map[string]int         // for a report, by submission
	answer    func(ID string) string // to a submission, if it is not that of one file
}

func newForgetful(t testing.TB, analysis, keeps time.Duration) *forgetful {
	f := &forgetful{analysis: analysis, keeps: keeps, submitted: make(map[string]time.Time), questions: make(map[string]int)}
	f.backend = newBackend(t, f.serveBroker)
	return f
}

func (f *forgetful) serveBroker(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := r.FormValue("submitID")
	switch r.URL.Path {
	case "/submit":
		id = fmt.Sprintf("s%d", len(f.submitted)+1)
		f.submitted[id] = time.Now()
		answer := fmt.Sprintf(`{"processTime":1,"acceptedFiles":[{"ID":%q,"submitName":"file of %[1]s","sha256":%q}]}`, id, sumOf(id))
		if f.answer != nil {
			answer = f.answer(id)
		}
		_, _ = io.WriteString(w, answer)
	case "/task":
		f.questions[id]++
		at, known := f.submitted[id]
		switch age := time.Since(at); {
		case !known, age < f.silent, age > f.silent+f.analysis+f.keeps:
			w.WriteHeader(http.StatusNotFound)
		case age < f.silent+f.analysis:
			w.WriteHeader(http.StatusNoContent)
		default:
			_, _ = fmt.Fprintf(w, `{"processTime":1,"result":{"taskReference":{"ID":"t-%s","state":"SUCCESS","additionalInfo":{"digests":{"SHA-256":%q}}},"all":%s}}`,
				id, sumOf(id), r.FormValue("all"))
		}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// accept makes the broker know submissions that did not come through the module.
func (f *forgetful) accept(ids ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range ids {
		f.submitted[id] = time.Now()
	}
}

// asked returns how often a report was asked for.
func (f *forgetful) asked(id string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.questions[id]
}

// forget makes the broker forget everything.
func (f *forgetful) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.submitted)
}

// sumOf returns the sum of the file of a submission.
func sumOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])
}

// harvesting are the options that follow what is submitted.
const harvesting = "poll_interval 100ms\n fail_duration 100ms\n harvest"

// submit submits a file, and returns its submission.
func (s *site) submit() string {
	s.t.Helper()
	got := s.send("POST", "/submit", strings.NewReader("a file"), bearer)
	var answer struct{ AcceptedFiles []struct{ ID string } }
	if err := json.Unmarshal(got.body, &answer); err != nil || got.status != http.StatusOK || len(answer.AcceptedFiles) == 0 {
		s.t.Fatalf("status %d, %v: %s", got.status, err, got.body)
	}
	return answer.AcceptedFiles[0].ID
}

// pending returns the IDs of what is followed in the default namespace, with their states.
func (s *adminSite) pending() (ids []string) {
	s.t.Helper()
	status, body := s.requestAdmin(http.MethodGet, "/fsbroker/harvest")
	var all map[string][]struct {
		SubmitID string `json:"submit_id"`
		Node     string
		TaskID   string `json:"task_id"`
		State    string
	}
	if err := json.Unmarshal([]byte(body), &all); err != nil || status != http.StatusOK {
		s.t.Fatalf("status %d, %v: %s", status, err, body)
	}
	for _, p := range all["default"] {
		ids = append(ids, p.SubmitID+p.Node+"/"+p.TaskID+" "+p.State)
	}
	return ids
}

// wantNothingPending waits until nothing is followed any more.
func (s *adminSite) wantNothingPending() {
	s.t.Helper()
	eventually(s.t, "nothing to be pending", func() bool { return len(s.pending()) == 0 })
}

// wantHarvested checks that both reports of a submission are kept, by its ID and by its file, without a question.
func (s *site) wantHarvested(t *testing.T, id string) {
	t.Helper()
	for _, path := range []string{"/task?submitID=" + id, "/task?sha256=" + sumOf(id)} {
		for _, all := range []string{"false", "true"} {
			got := s.get(path+"&all="+all, "Cache-Control: only-if-cached")
			if got.status != http.StatusOK || !strings.Contains(string(got.body), `"all":`+all) {
				t.Errorf("%s, all %s: status %d: %s", path, all, got.status, got.body)
			}
		}
	}
}

// A report is kept although nobody asks for it while the broker has it. The event is emitted once.
func TestHarvest(t *testing.T) {
	for name, cache := range map[string]string{"memory": "", "storage": stored} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				broker := newForgetful(t, time.Second, 2*time.Second)
				s := startWithAdmin(t, proxied(broker.URL, "", harvesting+"\n"+cache), recordFinished)
				before := s.scrape()
				id := s.submit()
				if got := s.pending(); !slices.Equal(got, []string{id + "/ accepted"}) && !slices.Equal(got, []string{id + "/ unfinished"}) {
					t.Errorf("pending is %q", got)
				}
				s.wantMetrics(nil, map[string]string{"harvest_pending": "1"})
				s.wantNothingPending()
				broker.forget()
				s.wantHarvested(t, id)
				wantEvents(t, fmt.Sprintf("default tester %s / %s file of %s", id, sumOf(id), id))
				s.wantMetrics(before, map[string]string{
					"harvest_pending": "0", "harvest_finished_total": "1", "harvest_failed_total": "0", "harvest_given_up_total": "0",
					"harvest_oldest_pending_seconds": "0",
				})
				if asked := broker.asked(id); asked > 8 {
					t.Errorf("the broker was asked %d times", asked)
				}
				if cache != "" {
					s.restart(proxied(broker.URL, "", harvesting+"\n"+cache))
					s.wantHarvested(t, id)
					wantEvents(t)
				}
				s.wantNoSecretInLog()
			})
		})
	}
}

// Only the kind is fetched that is wanted.
func TestHarvestOfOneKind(t *testing.T) {
	for kind, status := range map[string][2]int{"summary": {http.StatusOK, http.StatusGatewayTimeout}, "complete": {http.StatusGatewayTimeout, http.StatusOK}} {
		t.Run(kind, func(t *testing.T) {
			broker := newForgetful(t, 0, time.Hour)
			s := startWithAdmin(t, proxied(broker.URL, "", harvesting+" "+kind), "")
			id := s.submit()
			s.wantNothingPending()
			s.get("/task?submitID="+id, "Cache-Control: only-if-cached").wantStatus(t, status[0])
			s.get("/task?submitID="+id+"&all", "Cache-Control: only-if-cached").wantStatus(t, status[1])
		})
	}
}

// A submission that was accepted through here is no unknown one, until an upstream has known it.
func TestAcceptedSubmission(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newForgetful(t, time.Second, time.Hour)
		broker.silent = time.Second
		s := startWithAdmin(t, proxied(broker.URL, "", harvesting), "")
		id := s.submit()
		for _, path := range []string{"/task?submitID=" + id, "/task?submitID=" + id + "&all", "/task?nocache&submitID=" + id} {
			got := s.get(path)
			got.wantStatus(t, http.StatusNoContent)
			got.wantHeader(t, "Retry-After", "1")
		}
		s.get("/task?submitID=another").wantProblem(t, http.StatusNotFound, "unknown_submission")
		s.get("/task?wait=20&submitID="+id).wantStatus(t, http.StatusOK)
		s.wantNothingPending()
		broker.forget()
		s.wantHarvested(t, id)
		s.get("/task?nocache&submitID="+id).wantProblem(t, http.StatusNotFound, "unknown_submission")
	})
}

// That no upstream knows a submission yet that was accepted is kept for a poll interval, like an unfinished report.
func TestPollsOfAnAcceptedSubmission(t *testing.T) {
	broker := newForgetful(t, time.Second, time.Hour)
	broker.silent = time.Hour
	s := startWithAdmin(t, proxied(broker.URL, "", "poll_interval 20s\n harvest"), "")
	id := s.submit()
	path := "/task?submitID=" + id
	begin := time.Now()
	for range 50 {
		got := s.get(path)
		got.wantStatus(t, http.StatusNoContent)
		got.wantHeader(t, "Retry-After", "20")
	}
	asked, most := broker.asked(id), 1+int(time.Since(begin)/(20*time.Second))
	if asked == 0 || asked > most {
		t.Errorf("the report was asked for %d times, want up to %d", asked, most)
	}
	// With nocache, the broker is asked, and the complete report is another one. Errors are not kept.
	for _, other := range []string{path + "&nocache", path + "&nocache", path + "&all"} {
		s.get(other).wantStatus(t, http.StatusNoContent)
		if now := broker.asked(id); now <= asked {
			t.Errorf("%s: the report was not asked for", other)
		}
		asked = broker.asked(id)
	}
	for n := range 2 {
		s.get("/task?submitID=another").wantProblem(t, http.StatusNotFound, "unknown_submission")
		if now := broker.asked("another"); now != n+1 {
			t.Errorf("an unknown report was asked for %d times, want %d", now, n+1)
		}
	}
	// What is kept does not make it followed again.
	s.wantAdmin(http.MethodDelete, "/fsbroker/harvest?submitID="+id, http.StatusOK, `{"given_up":1}`)
	s.get(path)
	if got := s.pending(); len(got) > 0 {
		t.Errorf("pending is %q", got)
	}
	s.get(path+"&nocache").wantProblem(t, http.StatusNotFound, "unknown_submission")
}

// Polls do not make the follower take a submission for known, and hide for a poll interval at the most what becomes of it.
func TestEndOfAcceptance(t *testing.T) {
	for name, end := range map[string]func(s *adminSite, b *forgetful, path string){
		"known": func(s *adminSite, b *forgetful, path string) {
			b.setHandler(responds(http.StatusOK, reportOf("t1", "SUCCESS")))
			s.getUntil(path, "the report", func(r reply) bool { return r.status == http.StatusOK })
		},
		"failed": func(s *adminSite, b *forgetful, path string) {
			b.setHandler(explains(`{"state":"FAILED"}`))
			s.getUntil(path, "the failure", func(r reply) bool { return strings.Contains(string(r.body), "submission_failed") })
		},
		"given up": func(s *adminSite, _ *forgetful, path string) {
			s.requestAdmin(http.MethodDelete, "/fsbroker/harvest?"+strings.TrimPrefix(path, "/task?"))
			s.getUntil(path, "the end", func(r reply) bool { return strings.Contains(string(r.body), "unknown_submission") })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				broker := newForgetful(t, time.Second, time.Hour)
				broker.silent = time.Hour
				s := startWithAdmin(t, proxied(broker.URL, "", harvesting), "")
				id := s.submit()
				path := "/task?submitID=" + id
				s.getUntil(path, "some questions", func(r reply) bool {
					r.wantStatus(t, http.StatusNoContent)
					return broker.asked(id) > 10
				})
				if got := s.pending(); !slices.Equal(got, []string{id + "/ accepted"}) {
					t.Errorf("pending is %q", got)
				}
				end(s, broker, path)
				s.wantNothingPending()
			})
		})
	}
}

// A report that is asked for before it is finished is followed from then on, by whatever name.
func TestUnfinishedReportIsFollowed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newForgetful(t, 2*time.Second, time.Hour)
		node := newBackend(t, nil)
		var finished sync.Once
		done := make(chan struct{})
		node.setHandler(func(w http.ResponseWriter, _ *http.Request) {
			state := "SUCCESS"
			finished.Do(func() { state = "IN_PROGRESS"; close(done) })
			_, _ = io.WriteString(w, reportOf("t1", state))
		})
		s := startWithAdmin(t, proxied(broker.URL, "", "node node-1 "+node.URL+"\n"+harvesting), recordFinished)
		broker.accept("elsewhere")
		s.get("/task?submitID=elsewhere").wantStatus(t, http.StatusNoContent)
		s.get("/task?appServerID=node-1&taskID=t1").wantStatus(t, http.StatusOK)
		within(t, "a question", done)
		if got := s.pending(); len(got) == 0 || got[0] != "elsewhere/ unfinished" {
			t.Errorf("pending is %q", got)
		}
		s.wantNothingPending()
		broker.forget()
		node.setHandler(responds(http.StatusNotFound, ""))
		s.wantHarvested(t, "elsewhere")
		for _, all := range []string{"", "&all"} {
			s.get("/task?appServerID=node-1&taskID=t1"+all, "Cache-Control: only-if-cached").wantStatus(t, http.StatusOK)
		}
		wantEvents(t, "default tester  node-1/t1  ", "default tester elsewhere / "+sumOf("elsewhere")+" ")
	})
}

// The answer to a submission is passed on as it is, and all that it names is followed: an archive, and an answer that is
// too long to be held, breaks off, or is no JSON.
func TestAnswerToASubmission(t *testing.T) {
	files := func(n int, more string) string {
		var b strings.Builder
		b.WriteString(`{"acceptedFiles":[`)
		for i := range n {
			fmt.Fprintf(&b, `{"ID":"a%d","submitName":"%s"},`, i, more)
		}
		return strings.TrimSuffix(b.String(), ",") + `],"rejectedFiles":[],"submitWarnings":[]}`
	}
	for name, test := range map[string]struct {
		answer   string
		accepted int
		warns    bool
	}{
		"an archive":    {files(500, ""), 500, false},
		"a long one":    {files(2000, strings.Repeat("x", 1500)), 2000, false},
		"no files":      {`{"acceptedFiles":[],"rejectedFiles":[{"submitName":"a","rejectedReason":"b"}]}`, 0, false},
		"HTML":          {"<html>" + strings.Repeat("\n", 2<<20), 0, true},
		"it ends early": {strings.TrimSuffix(files(3, ""), `],"rejectedFiles":[],"submitWarnings":[]}`), 3, true},
		"empty":         {"", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				broker := newForgetful(t, time.Hour, time.Hour)
				broker.answer = func(string) string { return test.answer }
				s := startWithAdmin(t, proxied(broker.URL, "", harvesting+"\n"+stored), "")
				if got := s.send("POST", "/submit", nil, bearer, "Accept-Encoding: gzip"); string(got.body) != test.answer || got.status != http.StatusOK {
					t.Errorf("status %d, %d bytes, want %d", got.status, len(got.body), len(test.answer))
				}
				eventually(t, fmt.Sprint(test.accepted, " to be pending"), func() bool { return len(s.pending()) == test.accepted })
				notes, err := filepath.Glob(filepath.Join(s.dir, "fsbroker_task", "default", "notes", "*-*", "*"))
				if wanted := min(1, test.accepted); err != nil || test.accepted <= 500 && len(notes) != wanted {
					t.Errorf("there are the notes %q, %v; want %d", notes, err, wanted)
				}
				if lines := s.logged("the answer to a submission cannot be read"); (len(lines) > 0) != test.warns {
					t.Errorf("the log has %v", lines)
				}
			})
		})
	}
}

// An answer is held until its submission is noted, but not for long. It is followed in any case.
func TestAnswerIsHeldUntilItIsNoted(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newForgetful(t, time.Second, time.Hour)
		fault.dir = storageDir(t)
		s := startWithAdmin(t, proxied(broker.URL, "", harvesting+"\ncache {\n storage faulty\n }"), "")
		isNote := func(key string) bool { return strings.Contains(key, "/notes/") && !strings.Contains(key, "/leases/") }
		noted := make(chan string, 100)
		beforeEach(t, func(operation, key string, _ int) error {
			if operation == "Store" && isNote(key) {
				time.Sleep(100 * time.Millisecond)
				noted <- key
			}
			return nil
		})
		s.submit()
		if len(noted) != 1 {
			t.Errorf("%d notes are stored before the answer, want 1", len(noted))
		}
		beforeEach(t, func(operation, key string, _ int) error {
			if operation == "Store" && isNote(key) {
				return errors.New("the storage is full")
			}
			return nil
		})
		start := time.Now()
		id := s.submit()
		if took := time.Since(start); took < 400*time.Millisecond || took > 3*time.Second {
			t.Errorf("it took %s, want about 500ms", took)
		}
		eventually(t, "a warning", func() bool { return len(s.logged("cannot be noted in the storage")) > 0 })
		eventually(t, "the report", func() bool {
			return s.get("/task?submitID="+id, "Cache-Control: only-if-cached").status == http.StatusOK
		})
	})
}

// What is pending is shown by client, and can be given up. Problems are shown as they are told to callers.
func TestHarvestAdmin(t *testing.T) {
	broker := newForgetful(t, time.Hour, time.Hour)
	directives := strings.Replace(proxied(broker.URL, "", harvesting), "secret tester", "secret other {env.NODE_SECRET}\n secret tester", 1)
	s := startWithAdmin(t, directives, "")
	s.wantAdmin("GET", "/fsbroker/harvest", http.StatusOK, `{"default":[]}`)
	first, second := s.submit(), s.submit()
	s.get("/task?submitID="+first, "Authorization: Bearer "+nodeSecret).wantStatus(t, http.StatusNoContent)
	broker.accept("s9")
	s.send("GET", "/task?submitID=s9", nil, "secret: "+nodeSecret).wantStatus(t, http.StatusNoContent)
	broker.Close()
	eventually(t, "a problem", func() bool {
		_, body := s.requestAdmin("GET", "/fsbroker/harvest")
		return strings.Count(body, `"last_problem":"broker_`) == 3
	})
	if got := s.pending(); len(got) != 3 || got[0] != "s9/ unfinished" {
		t.Errorf("pending is %q, want that of the client other first", got)
	}
	for path, want := range map[string]int{
		"": http.StatusBadRequest, "?submitID=": http.StatusBadRequest, "?submitID=a&submitID=b": http.StatusBadRequest, "?appServerID=a": http.StatusBadRequest,
		"?older_than=1h": http.StatusBadRequest, "?submitID=unknown": http.StatusNotFound, "?appServerID=a&taskID=b": http.StatusNotFound,
	} {
		if status, body := s.requestAdmin("DELETE", "/fsbroker/harvest"+path); status != want {
			t.Errorf("%q: status %d, want %d: %s", path, status, want, body)
		}
	}
	s.wantAdmin("DELETE", "/fsbroker/harvest?submitID="+first, http.StatusOK, `{"given_up":1}`)
	if lines := s.waitLogged(1, "a submission is given up"); len(lines) != 1 || lines[0]["id"] != first || lines[0]["client"] != "tester" || lines[0]["why"] != "an operator has given it up" {
		t.Errorf("the log has %v", lines)
	}
	runCommand(t, "harvest", "--address", s.admin).want(t, 0, `tester +`+second+` +- +- +\d+s +(accepted|unfinished) +\d+ +no +broker_\w+ +file of `+second)
	runCommand(t, "give-up", "--submit-id", second, "--address", s.admin).want(t, 0, "given up")
	runCommand(t, "give-up", "--submit-id", second, "--address", s.admin).want(t, 1, "it is not pending")
	runCommand(t, "give-up", "--address", s.admin).want(t, 2, "give submitID")
	if got := s.pending(); len(got) != 1 {
		t.Errorf("pending is %q", got)
	}
	s.load(proxied(broker.URL, "", ""))
	s.wantAdmin("GET", "/fsbroker/harvest", http.StatusOK, `{}`)
	runCommand(t, "harvest", "--address", s.admin).want(t, 1, "no fsbroker_task with harvest is loaded")
}

// What is followed outlives a reload, also one that changes the storage.
func TestHarvestAcrossReloads(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		broker := newForgetful(t, 2*time.Second, time.Hour)
		s := startWithAdmin(t, proxied(broker.URL, "", harvesting), recordFinished)
		id := s.submit()
		for i := range 5 {
			s.load(proxied(broker.URL, "", harvesting+fmt.Sprintf("\ntimeout %ds", 20+i)))
		}
		s.load(proxied(broker.URL, "", harvesting+"\n"+stored))
		s.wantNothingPending()
		s.wantHarvested(t, id)
		wantEvents(t, fmt.Sprintf("default tester %s / %s file of %s", id, sumOf(id), id))
		eventually(t, "the notes to be deleted", func() bool {
			notes, _ := filepath.Glob(filepath.Join(s.dir, "fsbroker_task", "default", "notes", "*-*", "*"))
			return len(notes) == 0
		})
	})
}

// After kill -9, the next process goes on, at once.
func TestHarvestOutlivesAKill(t *testing.T) {
	fsbroker.SkipUnlessSlow(t)
	broker := newForgetful(t, 4*time.Second, time.Hour)
	folder := t.TempDir()
	directives := proxied(broker.URL, "", harvesting+"\n"+shared)
	first := startProcess(t, folder, directives)
	var ids []string
	for range 20 {
		ids = append(ids, first.submit())
	}
	first.kill()
	second := first.again()
	for _, id := range ids {
		eventually(t, "the reports of "+id, func() bool {
			for _, path := range []string{"/task?submitID=" + id, "/task?all&submitID=" + id} {
				if second.get(path, "Cache-Control: only-if-cached").status != http.StatusOK {
					return false
				}
			}
			return true
		})
		second.wantHarvested(t, id)
	}
}

// An answer that the broker sends slowly is held for 500 ms at the most, and what has come of it is followed then.
func TestSlowAnswerToASubmission(t *testing.T) {
	for name, first := range map[string]string{"an ID": `{"acceptedFiles":[{"ID":"s1"},`, "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				rest := make(chan struct{})
				broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path != "/submit" {
						w.WriteHeader(http.StatusNoContent)
						return
					}
					_, _ = io.WriteString(w, first)
					_ = http.NewResponseController(w).Flush()
					<-rest
					_, _ = io.WriteString(w, `{"ID":"s2"}]}`)
				})
				s := startWithAdmin(t, proxied(broker.URL, "", harvesting), "")
				start := time.Now()
				time.AfterFunc(5*time.Second, sync.OnceFunc(func() { close(rest) }))
				resp, err := s.client.Do(s.request("POST", "/submit", nil, bearer))
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				begun := make([]byte, len(first))
				if _, err := io.ReadFull(resp.Body, begun); err != nil || string(begun) != first {
					t.Errorf("%q, %v", begun, err)
				}
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("it took %s until the caller got what the broker has sent", took)
				}
				if first != "" {
					eventually(t, "the first to be pending", func() bool { return len(s.pending()) == 1 })
					if took := time.Since(start); took > 3*time.Second {
						t.Errorf("it took %s until what the caller has got is followed", took)
					}
				}
				if more, err := io.ReadAll(resp.Body); err != nil || string(more) != `{"ID":"s2"}]}` {
					t.Errorf("%q, %v", more, err)
				}
				if first != "" {
					eventually(t, "both to be pending", func() bool { return len(s.pending()) == 2 })
				}
			})
		})
	}
}

// A submission whose report is stored as that of its task is pending until the storage has that one.
func TestReportOfATaskIsSavedBeforeItsSubmissionEnds(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, dense(4000)))
		broker := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/submit":
				_, _ = io.WriteString(w, `{"acceptedFiles":[{"ID":"s1"}]}`)
			case "/submit-result":
				_, _ = io.WriteString(w, `{"appServerID":"node-1","taskID":"t1"}`)
			default:
				w.WriteHeader(http.StatusNotFound)
			}
		})
		fault.dir = storageDir(t)
		s := startWithAdmin(t, proxied(broker.URL, "", "node node-1 "+node.URL+"\n"+harvesting+"\ncache {\n storage faulty\n }"), "")
		var refused, references atomic.Int32
		beforeEach(t, func(operation, key string, size int) error {
			switch {
			case operation != "Store" || !isReport(key):
			case size > 1000:
				refused.Add(1)
				return errors.New("the storage is full")
			default:
				references.Add(1)
			}
			return nil
		})
		s.submit()
		eventually(t, "both references to be stored", func() bool { return references.Load() == 2 })
		eventually(t, "the reports to be refused again and again", func() bool { return refused.Load() >= 8 })
		if got := s.pending(); !slices.Equal(got, []string{"s1/ finished"}) {
			t.Errorf("pending is %q, although the storage does not have the report", got)
		}
		beforeEach(t, nil)
		s.wantNothingPending()
		s.restart(proxied(broker.URL, "", harvesting+"\ncache {\n storage faulty\n }"))
		for _, all := range []string{"", "&all"} {
			s.get("/task?submitID=s1"+all, "Cache-Control: only-if-cached").wantStatus(t, http.StatusOK)
		}
	})
}
