package cluster_test

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"
)

// redisValue is how caddy-storage-redis encodes a value: JSON, with the bytes in Base64.
type redisValue struct {
	Value       []byte    `json:"value"`
	Modified    time.Time `json:"modified"`
	Size        int64     `json:"size"`
	Compression int       `json:"compression"`
	Encryption  int       `json:"encryption"`
}

// TestSize measures how much memory of Redis complete reports take in the encoding of caddy-storage-redis. Their references are
// the only small values. The README has the figures.
func TestSize(t *testing.T) {
	const reports = 200
	c := newCluster(t)
	i := c.start()
	var bodies int
	for n := range reports {
		path := c.mustScan(1, text(10+2*n))
		bodies += len(i.want(path+"&all", http.StatusOK, fromNode).body)
	}
	i.wantStored()
	i.stop()

	var documents, references struct{ count, stored, encoded, memory int }
	for _, key := range c.values() {
		value, err := c.redis.Client.HGet(t.Context(), key, "value").Bytes()
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := json.Marshal(redisValue{Value: value, Modified: time.Now(), Size: int64(len(value))})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.redis.Client.Del(t.Context(), key).Err(); err != nil {
			t.Fatal(err)
		}
		if err := c.redis.Client.Set(t.Context(), key, encoded, 0).Err(); err != nil {
			t.Fatal(err)
		}
		memory, err := c.redis.Client.MemoryUsage(t.Context(), key).Result()
		if err != nil {
			t.Fatal(err)
		}
		of := &documents
		if len(value) < 256 {
			of = &references
		}
		of.count++
		of.stored += len(value)
		of.encoded += len(encoded)
		of.memory += int(memory)
	}
	if documents.count != reports || references.count != reports {
		t.Fatalf("Redis has %d documents and %d references of %d reports", documents.count, references.count, reports)
	}
	t.Logf("a report: %d bytes, compressed %d, in JSON %d (%.2f), in memory %d (%.2f)", bodies/reports,
		documents.stored/reports, documents.encoded/reports, ratio(documents.encoded, documents.stored),
		documents.memory/reports, ratio(documents.memory, documents.stored))
	t.Logf("a reference to it: %d bytes, in JSON %d, in memory %d", references.stored/reports, references.encoded/reports, references.memory/reports)
	if encoded, memory := ratio(documents.encoded, documents.stored), ratio(documents.memory, documents.stored); encoded < 1.3 || encoded > 1.4 || memory > 1.6 {
		t.Errorf("Redis holds %.2f times the size of a compressed report, %.2f times in memory", encoded, memory)
	}
}

func ratio(a, b int) float64 { return float64(a) / float64(b) }
