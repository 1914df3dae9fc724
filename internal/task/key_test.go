package task

import (
	"strings"
	"testing"
)

func TestKeysDiffer(t *testing.T) {
	seen := make(map[Key]string)
	for name, k := range map[string]Key{
		"nothing":            NewKey(),
		"one empty part":     NewKey(""),
		"two empty parts":    NewKey("", ""),
		"ab":                 NewKey("ab"),
		"a, b":               NewKey("a", "b"),
		"a, b, empty":        NewKey("a", "b", ""),
		"high-level report":  ReportKey("a", "b", "c", false),
		"complete report":    ReportKey("a", "b", "c", true),
		"in another scope":   ReportKey("b", "b", "c", false),
		"of another node":    ReportKey("a", "bc", "", false),
		"submission":         SubmissionKey("a", "b", false),
		"complete":           SubmissionKey("a", "b", true),
		"another submission": SubmissionKey("ab", "", false),
	} {
		if other, ok := seen[k]; ok {
			t.Errorf("%s and %s have the same key", name, other)
		}
		seen[k] = name
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
