package fsbroker

import (
	"encoding/hex"
	"testing"
	"time"
)

// StoreUsers tells how many handlers use the store that all share.
func StoreUsers() int {
	n, _ := stores.References(storeKey)
	return n
}

// Waiters tells how many callers wait for reports to be finished.
func Waiters() (n int) {
	stores.Range(func(_, s any) bool {
		n = int(s.(*store).waiters.Load())
		return true
	})
	return n
}

// RaceDetector is on.
const RaceDetector = raceDetector

// SetRetries changes how long a write that failed waits, until the test ends.
func SetRetries(t *testing.T, first, last time.Duration) {
	wasFirst, wasLast := firstRetry, lastRetry
	firstRetry, lastRetry = first, last
	t.Cleanup(func() { firstRetry, lastRetry = wasFirst, wasLast })
}

// decodeNamed decodes a stored value, by the hexadecimal name it is stored under.
func decodeNamed(name string, value []byte) (k key, v keepable, err error) {
	if _, err := hex.Decode(k[:], []byte(name)); err != nil {
		return k, nil, err
	}
	v, err = decodeStored(k, value)
	return k, v, err
}

// CheckStored says what is wrong with a stored value, by its name.
func CheckStored(name string, value []byte) error {
	_, _, err := decodeNamed(name, value)
	return err
}

// StoredLater is a stored report as it would be had it come that much later.
func StoredLater(t *testing.T, name string, value []byte, later time.Duration) []byte {
	k, v, err := decodeNamed(name, value)
	if err != nil {
		t.Fatal(err)
	}
	r := v.(*report)
	r.at = r.at.Add(later)
	if value, err = encodeStored(k, r); err != nil {
		t.Fatal(err)
	}
	return value
}
