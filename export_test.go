package fsbroker

import (
	"encoding/hex"
	"testing"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// StoreUsers returns the number of configurations that use what a namespace shares.
func StoreUsers(namespace string) int {
	n, _ := pool.References(namespace)
	return n
}

// Waiters returns the number of callers that wait for a report to be finished.
func Waiters() (n int) {
	pool.Range(func(_, s any) bool {
		n += int(s.(*shared).waiters.Load())
		return true
	})
	return n
}

// RaceDetector reports whether the race detector is on.
const RaceDetector = raceDetector

// ProblemCodes returns the codes of all problems.
func ProblemCodes() (codes []string) {
	for kind, k := range problemKinds {
		if !k.upstream {
			codes = append(codes, k.code)
			continue
		}
		for _, role := range []role{roleNode, roleBroker} {
			codes = append(codes, (&problem{kind: problemKind(kind), role: role}).code())
		}
	}
	return codes
}

// CheckStored checks a stored value, given its hexadecimal name.
func CheckStored(name string, value []byte) error {
	_, _, err := decodeStored(name, value)
	return err
}

func decodeStored(name string, value []byte) (k task.Key, r *task.Report, err error) {
	if _, err := hex.Decode(k[:], []byte(name)); err != nil {
		return k, nil, err
	}
	r, err = archive.Decode(k, value)
	return k, r, err
}

// StoredLater returns a stored report as it would be if the node had answered later.
func StoredLater(t *testing.T, name string, value []byte, later time.Duration) []byte {
	k, r, err := decodeStored(name, value)
	if err != nil {
		t.Fatal(err)
	}
	d := r.Document()
	d.At = d.At.Add(later)
	if value, err = archive.Encode(k, task.NewReport(d)); err != nil {
		t.Fatal(err)
	}
	return value
}
