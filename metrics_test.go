package fsbroker_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestMetrics(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		node := newBackend(t, responds(http.StatusOK, reportOf("secret-task", "SUCCESS")))
		broker := newBackend(t, responds(http.StatusNotFound, ""))
		gone := newBackend(t, nil)
		gone.Close()
		directives := func(more string) string {
			return fmt.Sprintf(`fsbroker_task {
				secret meter {env.CALLER_SECRET}
				node metered %s {env.NODE_SECRET}
				broker %s
				cache {
					storage
				}
				%s
			}`, node.URL, broker.URL, more)
		}
		s := startWithAdmin(t, directives("node metered-gone "+gone.URL), "")
		before := s.scrape()

		const task = "/task?appServerID=metered&taskID=secret-task"
		s.get(task).wantStatus(t, 200)
		s.wantMetrics(before, map[string]string{"storage_writes_total": "1"})
		etag := s.get(task).header.Get("ETag")
		s.get(task).wantStatus(t, 200)
		s.get(task, "If-None-Match: "+etag).wantStatus(t, 304)
		s.get(task+"&nocache").wantStatus(t, 200)
		s.get("/task?submitID=secret-submission").wantStatus(t, 404)
		s.get("/task?appServerID=secret-node&taskID=t").wantStatus(t, 404)
		s.get("/task?appServerID=metered-gone&taskID=t").wantStatus(t, 502)
		s.get("/task?appServerID=metered-gone&taskID=t").wantStatus(t, 503)
		s.get("/task").wantStatus(t, 400)
		s.do(t.Context(), http.MethodGet, task).wantStatus(t, 401)
		node.setHandler(responds(http.StatusNoContent, ""))
		s.get(task+"2").wantStatus(t, 204)

		host, goneHost := strings.TrimPrefix(node.URL, "http://"), strings.TrimPrefix(gone.URL, "http://")
		lasting := map[string]string{
			`requests_total{cache="miss",client="meter",code="200",endpoint="/task"}`:                    "1",
			`requests_total{cache="miss",client="meter",code="204",endpoint="/task"}`:                    "1",
			`requests_total{cache="hit",client="meter",code="304",endpoint="/task"}`:                     "1",
			`requests_total{cache="bypass",client="meter",code="200",endpoint="/task"}`:                  "1",
			`requests_total{cache="error",client="meter",code="404",endpoint="/task"}`:                   "2",
			`requests_total{cache="error",client="meter",code="502",endpoint="/task"}`:                   "1",
			`requests_total{cache="none",client="meter",code="503",endpoint="/task"}`:                    "1",
			`requests_total{cache="none",client="meter",code="400",endpoint="/task"}`:                    "1",
			`requests_total{cache="none",client="",code="401",endpoint="/task"}`:                         "1",
			`questions_total{node="metered",outcome="answered",role="node"}`:                             "2",
			`questions_total{node="metered",outcome="nothing_yet",role="node"}`:                          "1",
			`questions_total{node="metered-gone",outcome="unreachable",role="node"}`:                     "1",
			`questions_total{node="",outcome="unknown",role="broker"}`:                                   "5", // one submission, three tasks
			`question_duration_seconds_count{node="metered",role="node"}`:                                "3",
			`node_up{address="` + host + `",namespace="default",node="metered",role="node"}`:             "1",
			`questions_in_flight{address="` + host + `",namespace="default",node="metered",role="node"}`: "0",
			`storage_queue_length{namespace="default"}`:                                                  "0",
			`storage_queue_bytes{namespace="default"}`:                                                   "0",
			`cache_entries{namespace="default"}`:                                                         "1",
			`cache_limit_bytes{namespace="default"}`:                                                     "2.68435456e+08",
		}
		s.wantMetrics(before, lasting)
		s.wantMetrics(before, map[string]string{
			`requests_total{cache="hit",client="meter",code="200",endpoint="/task"}`:                  "2",
			`node_up{address="` + goneHost + `",namespace="default",node="metered-gone",role="node"}`: "0",
		})

		// A reload keeps the counters, and removes the gauges of nodes that are no longer configured.
		s.load(directives(""))
		s.get(task).wantStatus(t, 200)
		s.wantMetrics(before, lasting)
		s.wantMetrics(before, map[string]string{
			`requests_total{cache="hit",client="meter",code="200",endpoint="/task"}`:                  "3",
			`node_up{address="` + goneHost + `",namespace="default",node="metered-gone",role="node"}`: "",
		})
		for series := range s.scrape() {
			if strings.Contains(series, "secret-") {
				t.Errorf("the series %s has a name that a caller sent", series)
			}
		}
	})
}

// exportedMetrics returns the names of all series of a site with traffic.
func exportedMetrics(t *testing.T) map[string]bool {
	t.Helper()
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startWithAdmin(t, options(node, stored), "")
	s.get(pair).wantStatus(t, http.StatusOK)
	exported := make(map[string]bool)
	for series := range s.scrape() {
		name, _, _ := strings.Cut(series, "{")
		exported[name] = true
	}
	return exported
}

func TestDocsExplainEveryMetric(t *testing.T) {
	page := readDoc(t, "OPERATION.md")
	for name := range exportedMetrics(t) {
		name = strings.TrimPrefix(name, "caddy_fsbroker_")
		for _, suffix := range []string{"_bucket", "_sum", "_count"} { // of a histogram
			name = strings.TrimSuffix(name, suffix)
		}
		if !strings.Contains(page, "`"+name+"`") {
			t.Errorf("the page does not explain %s", name)
		}
	}
}

// The module exports every metric in the dashboard's queries, and the dashboard shows every metric.
func TestDashboard(t *testing.T) {
	exported := exportedMetrics(t)
	text, err := os.ReadFile(filepath.Join("examples", "grafana", "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Title      string
		Panels     []panel
		Templating struct {
			List []struct {
				Name, Type string
				Query      any
			}
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	queries := make(map[string]string) // by the panel or variable
	for _, variable := range dashboard.Templating.List {
		if query, ok := variable.Query.(map[string]any); ok {
			queries[variable.Name] = labelOfVariable.ReplaceAllString(fmt.Sprint(query["query"]), ")")
		}
	}
	ids := make(map[int]bool)
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Type == "" || p.Title == "" || p.GridPos.W == 0 || p.GridPos.X+p.GridPos.W > 24 || (p.Type == "row") != (len(p.Targets) == 0) {
			t.Errorf("the panel %d, %q, is not valid", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			queries[p.Title+" "+target.RefID] = target.Expr
		}
	}
	if dashboard.Title == "" || len(queries) < 20 {
		t.Errorf("the dashboard has only %d queries", len(queries))
	}
	shown := make(map[string]bool)
	for place, query := range queries {
		names := metricNames(query)
		if len(names) == 0 {
			t.Errorf("%s: there is no metric in %s", place, query)
		}
		for _, name := range names {
			shown[name] = true
			if !exported[name] {
				t.Errorf("%s: nothing exports %s", place, name)
			}
		}
	}
	for name := range exported {
		if !shown[name] {
			t.Errorf("%s is on no panel", name)
		}
	}
}

// panel is a panel of a Grafana dashboard.
type panel struct {
	ID          int
	Type, Title string
	GridPos     struct{ H, W, X, Y int }
	Targets     []struct{ RefID, Expr string }
}

var (
	notMetrics = regexp.MustCompile(`\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)|\w+\s*\(`)
	identifier = regexp.MustCompile(`[a-zA-Z_:][\w:]*`)

	labelOfVariable = regexp.MustCompile(`, \w+\)$`)
)

// metricNames returns the metrics in a query: the names outside of selectors, ranges, groupings and functions.
func metricNames(query string) []string {
	for notMetrics.MatchString(query) {
		query = notMetrics.ReplaceAllString(query, " ")
	}
	return identifier.FindAllString(query, -1)
}

func TestMetricNames(t *testing.T) {
	for query, want := range map[string]string{
		`sum by (a) (rate(x_total{b="c"}[5m])) / sum(y)`:            "[x_total y]",
		`histogram_quantile(0.9, sum by (le) (rate(z_bucket[5m])))`: "[z_bucket]",
		`label_values(up)`: "[up]",
	} {
		if got := fmt.Sprint(metricNames(query)); got != want {
			t.Errorf("%s: got %s, want %s", query, got, want)
		}
	}
}
