package fsbroker

import (
	"encoding/binary"
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

// CheckStored says what is wrong with a stored value, by the hexadecimal name it is stored under.
func CheckStored(name string, value []byte) error {
	var k key
	if _, err := hex.Decode(k[:], []byte(name)); err != nil {
		return err
	}
	_, err := decodeStored(k, value)
	return err
}

// StoredLater is a stored value as it would be had it come that much later.
func StoredLater(t *testing.T, value []byte, later time.Duration) []byte {
	var h storedHeader
	if _, err := binary.Decode(value, binary.BigEndian, &h); err != nil {
		t.Fatal(err)
	}
	v, err := decodeStored(h.Key, value)
	if err != nil {
		t.Fatal(err)
	}
	r := v.(*report)
	r.at = r.at.Add(later)
	if value, err = encodeStored(h.Key, r); err != nil {
		t.Fatal(err)
	}
	return value
}
