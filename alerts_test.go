package fsbroker_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// The module exports every metric in the alert rules. Each rule is tested and explained, and says how bad it is and what to
// do. The tests of the examples run the rules.
func TestAlerts(t *testing.T) {
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr         string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal([]byte(alertFile(t, "alerts.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	exported, tests, readme := exportedMetrics(t), alertFile(t, "alerts_test.yaml"), alertFile(t, "README.md")
	found := 0
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			found++
			names := metricNames(rule.Expr)
			if len(names) == 0 {
				t.Errorf("%s: there is no metric in %s", rule.Alert, rule.Expr)
			}
			for _, name := range names {
				if name != "and" && !exported[name] {
					t.Errorf("%s: nothing exports %s", rule.Alert, name)
				}
			}
			if rule.Labels["severity"] == "" || rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
				t.Errorf("%s has no severity, summary or description", rule.Alert)
			}
			if !strings.Contains(tests, "alertname: "+rule.Alert+"\n        exp_alerts:\n") {
				t.Errorf("no test lets %s fire", rule.Alert)
			}
			if !strings.Contains(readme, "`"+rule.Alert+"`") {
				t.Errorf("the README does not explain %s", rule.Alert)
			}
		}
	}
	if found < 7 {
		t.Errorf("found only %d alerts", found)
	}
}

func alertFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("examples", "prometheus", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
