package task

import (
	"strings"
	"testing"
)

func TestKeysDiffer(t *testing.T) {
	node, other, elsewhere, submissions := NodeSource("a", "b"), NodeSource("a", "bc"), NodeSource("b", "b"), SubmissionSource("a")
	file := FileSource("a", [32]byte{1}, Summary)
	seen := make(map[Key]string)
	for name, k := range map[string]Key{
		"nothing":              NewKey(),
		"one empty part":       NewKey(""),
		"two empty parts":      NewKey("", ""),
		"ab":                   NewKey("ab"),
		"a, b":                 NewKey("a", "b"),
		"a, b, empty":          NewKey("a", "b", ""),
		"high-level report":    ReportKey(node, "c", Summary),
		"complete report":      ReportKey(node, "c", Complete),
		"in another namespace": ReportKey(elsewhere, "c", Summary),
		"of another node":      ReportKey(other, "c", Summary),
		"submission":           SubmissionKey(submissions, "c", Summary),
		"complete":             SubmissionKey(submissions, "c", Complete),
		"another submission":   SubmissionKey(submissions, "b", Summary),
		"a file":               FileKey(file, ReportKey(node, "c", Summary)),
		"complete, of a file":  FileKey(file, ReportKey(node, "c", Complete)),
		"another file":         FileKey(FileSource("a", [32]byte{2}, Summary), ReportKey(node, "c", Summary)),
		"all of a file":        FileKey(FileSource("a", [32]byte{1}, Complete), ReportKey(node, "c", Summary)),
	} {
		if other, ok := seen[k]; ok {
			t.Errorf("%s and %s have the same key", name, other)
		}
		seen[k] = name
	}
}

func TestKeyBeginsWithItsSource(t *testing.T) {
	node, file := NodeSource("a", "b"), FileSource("a", [32]byte{1}, Complete)
	report := ReportKey(node, "c", Complete)
	if report.Source() != node {
		t.Error("the key of a report does not begin with its node")
	}
	if k := FileKey(file, report); k.Source() != file || k.in(node) != report {
		t.Error("the key of a file's report is not the file and the report's key")
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "4c4c4544-0044": true, "ä b": true, strings.Repeat("a", MaxIDLength): true,
		"": false, strings.Repeat("a", MaxIDLength+1): false, "a\nb": false, "\x00": false, "\xff": false,
	} {
		if got := ValidID(id); got != want {
			t.Errorf("%q: %v, want %v", id, got, want)
		}
	}
}
