package fsbroker

import (
	"net/url"
	"testing"
)

func TestQuestion(t *testing.T) {
	for query, want := range map[string]question{
		"submitID=s1":                              {submitID: "s1"},
		"submitID=s1&all&nocache":                  {submitID: "s1", all: true, nocache: true},
		"&&taskID=t%201&appServerID=a+b&":          {appServerID: "a b", taskID: "t 1"},
		"appServerID=a&taskID=t&all=no&secret=%26": {appServerID: "a", taskID: "t", secret: "&"},
		"serect=x=y&submitID=s%C3%A4":              {submitID: "sä", serect: "x=y"},
	} {
		if got := readQuestion(query); got != want {
			t.Errorf("%s: %+v, want %+v", query, got, want)
		}
	}
}

func FuzzQuestion(f *testing.F) {
	f.Add("appServerID=n1&taskID=t1&all=true&nocache=0&serect=x")
	f.Add("submitID=%41&secret=%zz;&all")
	f.Fuzz(func(t *testing.T, query string) {
		q := readQuestion(query)
		values, err := url.ParseQuery(query)
		if err != nil {
			if q.bad == nil {
				t.Errorf("taken, though: %v", err)
			}
			return
		}
		if q.bad != nil {
			return
		}
		for name, got := range map[string]string{
			"submitID": q.submitID, "appServerID": q.appServerID, "taskID": q.taskID, "secret": q.secret, "serect": q.serect,
		} {
			if len(values[name]) > 1 || values.Get(name) != got {
				t.Errorf("%s is %q, not %q", name, got, values[name])
			}
		}
		if q.submitID == "" && (q.appServerID == "" || q.taskID == "") {
			t.Errorf("names no report: %+v", q)
		}
	})
}
