package task

import (
	"slices"
	"strings"
	"testing"
)

func TestReadAccepted(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	for name, test := range map[string]struct {
		answer string
		want   []Accepted
		err    string
	}{
		"one file": {
			`{"processTime":3,"acceptedFiles":[{"ID":"s1","submitName":"a.exe","sha256":"` + strings.ToUpper(sum) + `","mediaType":{"string":"x"},"priority":50,"positionInQueue":0}],"rejectedFiles":[],"submitWarnings":[]}`,
			[]Accepted{{"s1", sum, "a.exe"}}, "",
		},
		"an archive":            {`{"acceptedFiles":[{"ID":"s1"},{"ID":"s2","submitName":"é"}]}`, []Accepted{{"s1", "", ""}, {"s2", "", "é"}}, ""},
		"numbers":               {`{"acceptedFiles":[{"ID":12345678901234567890}]}`, []Accepted{{"12345678901234567890", "", ""}}, ""},
		"another case":          {`{"AcceptedFiles":[{"id":"s1","SHA256":"` + sum + `","SubmitName":"n"}]}`, []Accepted{{"s1", sum, "n"}}, ""},
		"other types":           {`{"acceptedFiles":[1,null,"x",{"ID":null},{"ID":{}},{"ID":"s1","sha256":7,"submitName":[]}]}`, []Accepted{{"s1", "", ""}}, ""},
		"no ID":                 {`{"acceptedFiles":[{"sha256":"` + sum + `"},{"ID":""},{"ID":"\u0000"}]}`, nil, ""},
		"an ID that is none":    {`{"acceptedFiles":[{"ID":"` + strings.Repeat("a", 1<<20) + `"},{"ID":"s2"}]}`, []Accepted{{"s2", "", ""}}, ""},
		"a very long name":      {`{"acceptedFiles":[{"submitName":"` + strings.Repeat("a", 1<<20) + `","ID":"s1"}]}`, []Accepted{{"s1", "", ""}}, ""},
		"unknown members":       {`{"acceptedFiles":[{"source":"ID","ID":"s1","of":{"ID":"s2"}}]}`, []Accepted{{"s1", "", ""}}, ""},
		"nothing accepted":      {`{"acceptedFiles":[],"rejectedFiles":[{"submitName":"a","rejectedReason":"b","ID":"r1"}]}`, nil, ""},
		"elsewhere":             {`{"rejectedFiles":[{"acceptedFiles":[{"ID":"r1"}]}],"acceptedFiles":{"ID":"r2"}}`, nil, ""},
		"it breaks off":         {`{"acceptedFiles":[{"ID":"s1"},{"ID":"s2"`, []Accepted{{"s1", "", ""}}, "it is not JSON, or it is incomplete"},
		"it goes on as no JSON": {`{"acceptedFiles":[{"ID":"s1"}],]`, []Accepted{{"s1", "", ""}}, "it is not JSON"},
		"a list":                {`[{"ID":"s1"}]`, nil, "it is not a JSON object"},
		"HTML":                  {`<html>`, nil, "it is not JSON"},
		"empty":                 {``, nil, "it is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			var got []Accepted
			err := ReadAccepted(strings.NewReader(test.answer), func(a Accepted) { got = append(got, a) })
			if !slices.Equal(got, test.want) || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("got %.200q, %v", got, err)
			}
		})
	}
}
