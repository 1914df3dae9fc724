package fsbroker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/caddyserver/caddy/v2"
)

func TestAdminNodes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newGate()
		well := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
			r.URL.Path = strings.TrimPrefix(r.URL.Path, "/base")
			if r.URL.Path == "/task" {
				g.then(systemInfo)(w, r)
				return
			}
			systemInfo(w, r)
		})
		old := newBackend(t, responds(http.StatusNotFound, ""))
		slow := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		gone := newBackend(t, nil)
		gone.Close()
		broker := newBackend(t, responds(http.StatusInternalServerError, ""))
		s := startWithAdmin(t, fmt.Sprintf(`fsbroker_task {
			secret {env.CALLER_SECRET}
			node a-well %s/base {env.NODE_SECRET}
			node b-old %s
			node c-slow %s
			node d-gone %s
			broker %s {env.BROKER_SECRET}
			health_timeout 300ms
		}
		fsbroker_task /other {
			secret {env.CALLER_SECRET}
			node a-well %[1]s/base {env.NODE_SECRET}
			cache {
				namespace other
			}
		}`, well.URL, old.URL, slow.URL, gone.URL, broker.URL), "")

		s.get("/task?submitID=s1").wantProblem(t, http.StatusBadGateway, "broker_bad_answer")
		held := s.goGet("/task?appServerID=a-well&taskID=t1")
		within(t, "the request", g.entered)
		host := func(b *backend) string { return strings.TrimPrefix(b.URL, "http://") }
		s.wantAdmin(http.MethodGet, "/fsbroker/nodes", http.StatusOK, fmt.Sprintf(`[`+
			`{"namespace":"default","role":"node","node":"a-well","address":"%s","state":"healthy","questions":1,`+
			`"system_info":{"name":"fsTransform","version":"2.1.0","queue":{"active":3,"queued":2,"completed":12345}}},`+
			`{"namespace":"default","role":"node","node":"b-old","address":"%s","state":"degraded","questions":0,"system_info_problem":"node_bad_answer"},`+
			`{"namespace":"default","role":"node","node":"c-slow","address":"%s","state":"degraded","last_problem":{"code":"node_timeout","cause":"the node did not answer within 300ms","at":"…"},"questions":0,"system_info_problem":"node_timeout"},`+
			`{"namespace":"default","role":"node","node":"d-gone","address":"%[4]s","state":"down","last_problem":{"code":"node_unreachable","cause":"dial tcp %[4]s: connect: connection refused","at":"…"},"questions":0,"system_info_problem":"node_unreachable"},`+
			`{"namespace":"default","role":"broker","address":"%[5]s","state":"degraded","last_problem":{"code":"broker_bad_answer","cause":"the broker answered with the unexpected status 500","at":"…"},"questions":0,"system_info_problem":"broker_bad_answer"},`+
			`{"namespace":"other","role":"node","node":"a-well","address":"%[1]s","state":"healthy","questions":0,`+
			`"system_info":{"name":"fsTransform","version":"2.1.0","queue":{"active":3,"queued":2,"completed":12345}}}]`,
			host(well), host(old), host(slow), host(gone), host(broker)))
		if lines := s.logged("broker fails"); len(lines) != 1 || lines[0]["node"] != nil {
			t.Errorf("the log has %v", lines)
		}
		close(g.open)
		(<-held).wantStatus(t, http.StatusOK)

		if _, body := s.requestAdmin(http.MethodGet, "/fsbroker/nodes"); strings.Contains(body, `"questions":1`) {
			t.Errorf("a request is still under way: %s", body)
		}
		s.wantNoSecretInLog()
	})
}

func TestAdminCache(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, ""), "")
	s.wantAdmin(http.MethodGet, "/fsbroker/cache", http.StatusOK, `{"default":{"bytes":0,"sending":0,"reading":0,"limit":268435456,"entries":0,"evictions":0,"waiters":0}}`)
	s.get(pair)
	var caches map[string]struct {
		Bytes   int64
		Entries int
	}
	_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
	if err := json.Unmarshal([]byte(body), &caches); err != nil || caches["default"].Entries != 1 || caches["default"].Bytes < 1000 {
		t.Errorf("%v: %s", err, body)
	}

	s.load(options(node, "cache {\n max_size 1B\n storage\n }"))
	s.get(pair)
	eventually(t, "the report to be stored", func() bool {
		_, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache")
		return strings.Contains(body, `"queued":0`)
	})
	s.wantAdmin(http.MethodGet, "/fsbroker/cache", http.StatusOK,
		`{"default":{"bytes":0,"sending":0,"reading":0,"limit":1,"entries":0,"evictions":1,"waiters":0,"storage":{"module":"folder","queued":0,"queued_bytes":0,"failing":false}}}`)

	s.load("respond 404") // without the handler, there is nothing to show
	s.wantAdmin(http.MethodGet, "/fsbroker/cache", http.StatusOK, `{}`)
	s.wantAdmin(http.MethodGet, "/fsbroker/nodes", http.StatusOK, `[]`)
	s.wantAdmin(http.MethodDelete, "/fsbroker/cache", http.StatusOK, `{"memory":0,"queue":0,"storage":0}`)
}

func TestAdminErrors(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, stored), "")
	s.get(pair)
	s.wantQueueEmpty()
	const malformed = `{"error":"give submitID, or appServerID and taskID together, or appServerID, sha256 or older_than alone, once each, to purge some of the reports, or nothing to purge everything"}`
	const badFrom = `{"error":"from must be the next of the step before: a number up to 4096"}`
	const badAge = `{"error":"older_than must be a duration of more than 0, such as 24h or 30d"}`
	const badSum = `{"error":"sha256 must be 64 hexadecimal digits"}`
	for request, want := range map[string]string{
		"POST /fsbroker/nodes":                                       `405 {"error":"method not allowed: use GET"}`,
		"DELETE /fsbroker/nodes":                                     `405 {"error":"method not allowed: use GET"}`,
		"POST /fsbroker/cache":                                       `405 {"error":"method not allowed: use DELETE, GET"}`,
		"DELETE /fsbroker/cache?taskID=t1":                           "400 " + malformed,
		"DELETE /fsbroker/cache?appServerID=":                        "400 " + malformed,
		"DELETE /fsbroker/cache?appServerID=node-1&older_than=1h":    "400 " + malformed,
		"DELETE /fsbroker/cache?submitID=s1&taskID=t1":               "400 " + malformed,
		"DELETE /fsbroker/cache?older_than=soon":                     "400 " + badAge,
		"DELETE /fsbroker/cache?older_than=-1h":                      "400 " + badAge,
		"DELETE /fsbroker/cache?older_than":                          "400 " + badAge,
		"DELETE /fsbroker/cache?sha256=12":                           "400 " + badSum,
		"DELETE /fsbroker/cache?sha256=" + strings.Repeat("g", 64):   "400 " + badSum,
		"DELETE /fsbroker/cache?sha256=" + strings.Repeat("0", 66):   "400 " + badSum,
		"DELETE /fsbroker/cache?from=-1":                             "400 " + badFrom,
		"DELETE /fsbroker/cache?from=":                               "400 " + badFrom,
		"DELETE /fsbroker/cache?from=4097":                           "400 " + badFrom,
		"DELETE /fsbroker/cache?appServerID=node-2":                  `404 {"error":"no upstream is configured that can know it: check appServerID, or configure a broker"}`,
		"DELETE /fsbroker/cache?submitID=s1":                         `404 {"error":"no upstream is configured that can know it: check appServerID, or configure a broker"}`,
		"DELETE /fsbroker/cache?older_than=1h":                       `200 {"memory":0,"queue":0,"storage":0}`,
		"DELETE /fsbroker/cache?sha256=" + strings.Repeat("0", 64):   `200 {"memory":0,"queue":0,"storage":0}`,
		"DELETE /fsbroker/cache?appServerID=node-1&taskID=":          "400 " + malformed,
		"DELETE /fsbroker/cache?appServerID=node-1&taskid=t1":        "400 " + malformed,
		"DELETE /fsbroker/cache?task=t1":                             "400 " + malformed,
		"DELETE /fsbroker/cache?appServerID=node-1&taskID=t1&all":    "400 " + malformed,
		"DELETE /fsbroker/cache?appServerID=a&taskID=t1&taskID=t2":   "400 " + malformed,
		"DELETE /fsbroker/cache?appServerID=node-1&taskID=%zz":       `400 {"error":"the query is malformed"}`,
		"DELETE /fsbroker/cache?appServerID=node-2&taskID=t1":        `404 {"error":"no upstream is configured that can know it: check appServerID, or configure a broker"}`,
		"DELETE /fsbroker/cache?appServerID=node-1&taskID=not-there": `200 {"memory":0,"queue":0,"storage":0}`,
	} {
		method, path, _ := strings.Cut(request, " ")
		status, body := s.requestAdmin(method, path)
		if got := fmt.Sprint(status, " ", strings.TrimSpace(body)); got != want {
			t.Errorf("%s: got %s, want %s", request, got, want)
		}
	}
	s.wantValues(1)
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; hit")
}

func TestPurge(t *testing.T) {
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, stored), "")
	fill := func() {
		for _, task := range []string{"t1", "t1&all", "t2"} {
			s.get("/task?appServerID=node-1&taskID="+task).wantStatus(t, http.StatusOK)
		}
		s.wantValues(3)
		s.wantQueueEmpty()
	}
	const task1 = "/fsbroker/cache?appServerID=node-1&taskID=t1"
	fill()
	s.wantAdmin(http.MethodDelete, task1, http.StatusOK, `{"memory":2,"queue":0,"storage":2}`)
	s.wantAdmin(http.MethodDelete, task1, http.StatusOK, `{"memory":0,"queue":0,"storage":0}`)
	s.wantValues(1)
	s.get("/task?appServerID=node-1&taskID=t2").wantHeader(t, "Cache-Status", "fsbroker; hit")
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
	fill()

	// A purge removes damaged values that were set aside, too.
	value := s.wantValues(3)[0]
	setAside := filepath.Join(filepath.Dir(filepath.Dir(value)), "damaged")
	if err := os.Mkdir(setAside, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(value, filepath.Join(setAside, filepath.Base(value))); err != nil {
		t.Fatal(err)
	}
	s.wantAdmin(http.MethodDelete, "/fsbroker/cache", http.StatusOK, `{"memory":3,"queue":0,"storage":2}`)
	s.wantValues(0)
	if left, _ := filepath.Glob(filepath.Join(setAside, "*")); len(left) != 0 {
		t.Errorf("there are still the values %v", left)
	}
	s.get(pair).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
}

// A purge of a node, a file, or what is old leaves the others alone, in memory and in the storage.
func TestPurgeOfSome(t *testing.T) {
	const sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		document := reportOf(r.URL.Query().Get("taskID"), "SUCCESS")
		if r.URL.Query().Get("taskID") == "of-file" {
			document = fmt.Sprintf(`{"result":{"taskReference":{"state":"SUCCESS","additionalInfo":{"digests":{"SHA-256":"%s"}}}}}`, sum)
		}
		responds(http.StatusOK, document)(w, r)
	})
	other := newBackend(t, responds(http.StatusOK, reportOf("other", "SUCCESS")))
	s := startWithAdmin(t, options(node, fmt.Sprintf("node node-2 %s\n%s", other.URL, stored)), "")
	ask := func(names ...string) {
		for _, name := range names {
			nodeID, taskID, _ := strings.Cut(name, " ")
			s.get(fmt.Sprintf("/task?appServerID=%s&taskID=%s", nodeID, taskID)).wantStatus(t, http.StatusOK)
		}
	}
	purge := func(query, want string) {
		t.Helper()
		s.wantQueueEmpty()
		s.wantAdmin(http.MethodDelete, "/fsbroker/cache?"+query, http.StatusOK, want)
	}
	ask("node-1 t1", "node-1 of-file", "node-1 t3", "node-2 t1")
	s.wantValues(4)
	purge("sha256="+strings.ToUpper(sum), `{"memory":1,"queue":0,"storage":1}`)
	s.wantValues(3)
	purge("older_than=1h", `{"memory":0,"queue":0,"storage":0}`)
	s.wantValues(3)
	purge("appServerID=node-1", `{"memory":2,"queue":0,"storage":2}`)
	s.wantValues(1)
	s.get("/task?appServerID=node-2&taskID=t1").wantHeader(t, "Cache-Status", "fsbroker; hit")
	purge("older_than=1ms", `{"memory":1,"queue":0,"storage":1}`)
	s.wantValues(0)

	// Only what is in the later partitions is purged from the storage.
	ask("node-1 t1", "node-1 t2", "node-1 t3", "node-1 t4", "node-1 t5", "node-1 t6")
	values := s.wantValues(6)
	partition := func(name string) string { return filepath.Base(filepath.Dir(filepath.Dir(name))) }
	slices.SortFunc(values, func(a, b string) int { return strings.Compare(partition(a), partition(b)) })
	from, err := strconv.ParseInt(partition(values[3]), 16, 0)
	if err != nil {
		t.Fatal(err)
	}
	purge(fmt.Sprintf("appServerID=node-1&from=%d", from), `{"memory":6,"queue":0,"storage":3}`)
	if left := s.wantValues(3); !slices.Equal(left, slices.Sorted(slices.Values(values[:3]))) {
		t.Errorf("left are %v, want %v", left, values[:3])
	}
}

// A submission that became a node's task is a reference to its report, and is purged with it.
func TestPurgeOfATaskPurgesItsSubmissions(t *testing.T) {
	node := newBackend(t, systemInfo)
	broker := newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	s := startWithAdmin(t, options(node, brokerOption(broker)+"\n"+stored), "")
	s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
	s.wantValues(2)
	s.wantQueueEmpty()
	s.wantAdmin(http.MethodDelete, "/fsbroker/cache?appServerID=node-1&taskID=t1", http.StatusOK, `{"memory":2,"queue":0,"storage":1}`)
	s.get("/task?submitID=s1").wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
}

// A purge removes what is queued for the storage, and what a write that is under way stores.
func TestPurgeOfTheQueue(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		fault.dir = storageDir(t)
		node := newBackend(t, systemInfo)
		s := startWithAdmin(t, options(node, "cache {\n storage faulty\n }"), "")
		t.Cleanup(func() { setFault(nil, nil, false) })

		setFault(errors.New("storage is away"), nil, false)
		for _, task := range []string{"t1", "t1&all", "t2", "t3"} {
			s.get("/task?appServerID=node-1&taskID="+task).wantStatus(t, http.StatusOK)
		}
		// Nobody knows what a storage has that is away, so that is no success. Memory and the queue are purged nevertheless.
		const away = `{"error":"memory is purged, but the storage is not, or only in part: try again with from=0: the storage faulty: it does not work: storage is away"}`
		s.wantAdmin(http.MethodDelete, "/fsbroker/cache?appServerID=node-1&taskID=t1", http.StatusBadGateway, away)
		if _, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache"); !strings.Contains(body, `"entries":2`) || !strings.Contains(body, `"queued":2`) {
			t.Errorf("after a purge of a task: %s", body)
		}
		s.wantAdmin(http.MethodDelete, "/fsbroker/cache", http.StatusBadGateway, away)
		if _, body := s.requestAdmin(http.MethodGet, "/fsbroker/cache"); !strings.Contains(body, `"entries":0`) || !strings.Contains(body, `"queued":0,"queued_bytes":0`) {
			t.Errorf("after a purge of everything: %s", body)
		}

		hang := make(chan struct{})
		setFault(nil, nil, false)
		beforeEach(t, func(operation, key string, _ int) error {
			if operation == "Store" && isReport(key) {
				<-hang
			}
			return nil
		})
		before := writes()
		node.setHandler(responds(http.StatusOK, reportOf("t4", "SUCCESS")))
		s.get("/task?appServerID=node-1&taskID=t4&nocache").wantStatus(t, http.StatusOK)
		eventually(t, "the write to begin", func() bool { return writes() > before })
		purged := make(chan error, 1)
		go func() {
			purged <- s.checkAdmin(http.MethodDelete, "/fsbroker/cache", http.StatusOK, `{"memory":1,"queue":1,"storage":1}`)
		}()
		synctest.Wait() // for the purge to wait for the write
		close(hang)
		if err := <-purged; err != nil {
			t.Error(err)
		}
		if err := caddy.Stop(); err != nil { // which waits for what is left to be written, and would bring the value back
			t.Fatal(err)
		}
		if left := storedIn(t, fault.dir); len(left) != 0 {
			t.Errorf("there are still the values %v", left)
		}
	})
}

// The documented requests to the admin API work.
func TestDocsAdminCommands(t *testing.T) {
	var commands []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(readDoc(t, "OPERATION.md"), -1) {
		for line := range strings.Lines(block[1]) {
			if strings.Contains(line, "localhost:2019") {
				commands = append(commands, strings.TrimSpace(line))
			}
		}
	}
	if len(commands) < 4 {
		t.Fatalf("the page has only %d commands", len(commands))
	}
	node := newBackend(t, systemInfo)
	s := startWithAdmin(t, options(node, "broker "+node.URL+"\n"+stored), "")
	s.get(pair)
	for _, line := range commands {
		line, _, _ = strings.Cut(line, "#")
		line = strings.ReplaceAll(strings.Replace(line, "curl ", "curl -fsS ", 1), "localhost:2019", s.admin)
		output, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
		if err != nil || !json.Valid(output) {
			t.Errorf("%s: %v\n%s", line, err, output)
		}
	}
	s.wantValues(0)
}
