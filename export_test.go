package fsbroker

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
