package examples_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// needProgram skips the test if a program is missing.
func needProgram(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("there is no %s: install the package prometheus", name)
	}
}

// TestAlertRules checks the alert rules and runs their unit tests.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	needProgram(t, "promtool")
	for _, args := range [][]string{
		{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}, {"check", "config", "prometheus.yaml"},
	} {
		command := programCommand(t, "promtool", args...)
		command.Dir = "prometheus"
		if output, err := command.CombinedOutput(); err != nil {
			t.Errorf("promtool %q: %v\n%s", args, err, output)
		}
	}
}

// TestPrometheus runs Prometheus with the example's configuration and rules, apart from their times, and a Caddy that has
// one node that works and one that is down. The alert about that node fires, and that about a report which is given up. All
// queries of the dashboard return something.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	needProgram(t, "prometheus")
	caddy := startMonitored(t)
	prometheus := startPrometheus(t, caddy.admin)

	caddy.traffic(t)
	alert := prometheus.waitForAlert(t, "FsbrokerNodeFails")
	if alert.Labels["node"] != "node-2" || alert.Labels["instance"] != caddy.admin || !strings.HasPrefix(alert.Annotations["summary"], "node node-2 at ") {
		t.Errorf("the alert is about something else: %+v", alert)
	}
	caddy.giveUp(t)
	if alert := prometheus.waitForAlert(t, "FsbrokerHarvestGivesUp"); alert.Labels["instance"] != caddy.admin {
		t.Errorf("the alert is about something else: %+v", alert)
	}

	for place, query := range dashboardQueries(t) {
		testenv.Eventually(t, fmt.Sprintf("a result of %s: %s", place, query), func() bool {
			found := len(prometheus.query(t, query)) > 0
			if !found {
				caddy.traffic(t) // a rate needs counters that grow
			}
			return found
		})
	}
}

// monitored is a Caddy with nodes and a storage.
type monitored struct{ site, admin string }

func startMonitored(t *testing.T) monitored {
	t.Helper()
	node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		state := map[string]string{"1": "SUCCESS", "2": "IN_PROGRESS"}[r.FormValue("taskID")]
		_, _ = fmt.Fprintf(w, `{"processTime":1,"result":{"taskReference":{"state":%q}}}`, state)
	}))
	t.Cleanup(node.Close)
	m := monitored{"http://" + freeAddress(t), freeAddress(t)}
	config := filepath.Join(t.TempDir(), "Caddyfile")
	writeFile(t, config, fmt.Sprintf(`{
	admin %s
	persist_config off
}
%s {
	fsbroker_task {
		secret tester the-secret
		node node-1 %s
		node node-2 http://%s
		harvest
		cache {
			storage file_system "%s"
		}
	}
}
`, m.admin, m.site, node.URL, freeAddress(t), filepath.ToSlash(t.TempDir())))
	startCaddy(t, nil, config)
	return m
}

// traffic sends requests with different outcomes.
func (m monitored) traffic(t *testing.T) {
	t.Helper()
	for query, want := range map[string]int{
		"appServerID=node-1&taskID=1":         http.StatusOK,
		"appServerID=node-1&taskID=1&nocache": http.StatusOK,
		"":                                    http.StatusBadRequest,
	} {
		if got := get(t, m.site+"/task?"+query, "the-secret", "").StatusCode; got != want {
			t.Errorf("%s: got %d, want %d", query, got, want)
		}
	}
	get(t, m.site+"/task?appServerID=node-2&taskID=1", "the-secret", "") // 502, or 503 within fail_duration
	get(t, m.site+"/task", "wrong", "")
}

// giveUp makes Caddy follow a report that is not finished, and give it up.
func (m monitored) giveUp(t *testing.T) {
	t.Helper()
	const task = "appServerID=node-1&taskID=2"
	if got := get(t, m.site+"/task?"+task, "the-secret", "").StatusCode; got != http.StatusOK {
		t.Errorf("%s: got %d, want %d", task, got, http.StatusOK)
	}
	caddy(t, nil, "fsbroker", "give-up", "--app-server-id", "node-1", "--task-id", "2", "--address", m.admin)
}

// prometheus is the URL of a Prometheus.
type prometheus string

// everyTime matches the times of a configuration and of rules that a test need not wait for.
var everyTime = regexp.MustCompile(`(?m)^( *(?:scrape_interval|evaluation_interval|for)): .*$`)

func startPrometheus(t *testing.T, target string) prometheus {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"prometheus.yaml", "alerts.yaml"} {
		text := everyTime.ReplaceAllString(string(readFile(t, filepath.Join("prometheus", name))), "$1: 200ms")
		writeFile(t, filepath.Join(dir, name), strings.Replace(text, "[localhost:9180]", `["`+target+`"]`, 1))
	}
	address := freeAddress(t)
	process := startProcess(t, programCommand(t, "prometheus", "--config.file="+filepath.Join(dir, "prometheus.yaml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address, "--log.level=warn"))
	p := prometheus("http://" + address)
	process.eventually("Prometheus is ready", func() bool {
		response, err := tryGet(t, string(p)+"/-/ready", "", "")
		return err == nil && response.StatusCode == http.StatusOK
	})
	return p
}

// api requests what the path of the API returns, and decodes its data.
func (p prometheus) api(t *testing.T, path string, data any) {
	t.Helper()
	response := get(t, string(p)+"/api/v1/"+path, "", "")
	answer := struct {
		Status string
		Data   any
	}{Data: data}
	if err := json.Unmarshal([]byte(response.body), &answer); err != nil || answer.Status != "success" {
		t.Fatalf("%s: %v: %s", path, err, response.body)
	}
}

// query returns the result of a query. The query may be Grafana's label_values.
func (p prometheus) query(t *testing.T, query string) (result []any) {
	t.Helper()
	if match := labelValues.FindStringSubmatch(query); match != nil {
		p.api(t, "label/"+match[2]+"/values?"+url.Values{"match[]": {match[1]}}.Encode(), &result)
		return result
	}
	var data struct{ Result []any }
	p.api(t, "query?"+url.Values{"query": {query}}.Encode(), &data)
	return data.Result
}

var labelValues = regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)

// alert is an alert of Prometheus.
type alert struct {
	State               string
	Labels, Annotations map[string]string
}

// waitForAlert waits until an alert fires.
func (p prometheus) waitForAlert(t *testing.T, name string) (found alert) {
	t.Helper()
	testenv.Eventually(t, "the alert "+name, func() bool {
		var data struct{ Alerts []alert }
		p.api(t, "alerts", &data)
		i := slices.IndexFunc(data.Alerts, func(a alert) bool { return a.Labels["alertname"] == name && a.State == "firing" })
		if i < 0 {
			return false
		}
		found = data.Alerts[i]
		return true
	})
	return found
}

// dashboardQueries returns the queries of the dashboard's panels and variables, by their places.
func dashboardQueries(t *testing.T) map[string]string {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ RefID, Expr string }
		}
		Templating struct {
			List []struct{ Name, Definition string }
		}
	}
	if err := json.Unmarshal(readFile(t, "grafana/dashboard.json"), &dashboard); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$instance", ".*", "$namespace", ".*", "$__rate_interval", "10s")
	queries := make(map[string]string)
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			queries[panel.Title+" "+target.RefID] = variables.Replace(target.Expr)
		}
	}
	for _, variable := range dashboard.Templating.List {
		if variable.Definition != "" {
			queries["the variable "+variable.Name] = variables.Replace(variable.Definition)
		}
	}
	if len(queries) < 25 {
		t.Errorf("the dashboard has only %d queries", len(queries))
	}
	return queries
}
