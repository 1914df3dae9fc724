package cluster_test

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/hex"
	"io"
	"maps"
	"net/http"
	"testing"
)

// plaintexts returns how many values in Redis hold a text, as it is or compressed.
func (c *cluster) plaintexts(text string) (n int) {
	c.t.Helper()
	for _, key := range c.redis.Keys("*") {
		var value []byte
		switch c.redis.Client.Type(c.t.Context(), key).Val() {
		case "hash":
			value = []byte(c.redis.Client.HGet(c.t.Context(), key, "value").Val())
		case "string":
			value = []byte(c.redis.Client.Get(c.t.Context(), key).Val())
		}
		if holds([]byte(key), text) || holds(value, text) {
			n++
		}
	}
	return n
}

// holds reports whether a value has a text, as it is or compressed.
func holds(value []byte, text string) bool {
	if bytes.Contains(value, []byte(text)) {
		return true
	}
	for i := range value {
		if !bytes.HasPrefix(value[i:], []byte{0x1f, 0x8b, 8}) {
			continue
		}
		if r, err := gzip.NewReader(bytes.NewReader(value[i:])); err == nil {
			inflated, _ := io.ReadAll(r) // what follows it is no error
			if bytes.Contains(inflated, []byte(text)) {
				return true
			}
		}
	}
	return false
}

// Reports are sealed with the first key, and opened with any. A report whose key is lost is left alone, and so is one that is
// not sealed, unless that is accepted.
func TestEncryption(t *testing.T) {
	c := newCluster(t)
	for _, name := range []string{"KEY_1", "KEY_2"} {
		key := make([]byte, 32)
		_, _ = rand.Read(key)
		c.secrets[name] = hex.EncodeToString(key)
		c.env = append(c.env, name+"="+c.secrets[name])
	}
	const first, second, both = "encryption_key {env.KEY_1}", "encryption_key {env.KEY_2}", "encryption_key {env.KEY_2} {env.KEY_1}"
	const migrating = both + "\naccept_unencrypted"
	one := c.start("max_size 1B")
	restart := func(keys string) {
		t.Helper()
		one.stop()
		one.configure("max_size 1B", keys)
		one.run()
	}
	store := func() map[string]string {
		t.Helper()
		small, large := c.mustScan(1, text(1)), c.mustScan(2, text(2000))
		reports := one.collect(small, small+"&all", large+"&all")
		one.wantStored()
		return reports
	}

	unsealed := store()
	const mark = "transform-file" // is in every report
	if n := c.plaintexts(mark); n != len(unsealed) {
		t.Errorf("%d values hold plaintext, want %d", n, len(unsealed))
	}
	restart(first)
	sealed := store()
	restart(both)
	rotated := store()
	if n := c.plaintexts(mark); n != len(unsealed) {
		t.Errorf("%d values hold plaintext, want %d as before", n, len(unsealed))
	}
	c.forget()
	all := maps.Clone(unsealed)
	maps.Copy(all, sealed)
	maps.Copy(all, rotated)
	restart(migrating)
	one.wantAll(all)

	restart(second)
	one.wantAll(rotated)
	for _, locked := range []map[string]string{sealed, unsealed} {
		for path := range locked {
			one.want(path, http.StatusNotFound, fromNowhere)
		}
	}
	eventually(t, "a warning about a key that is lost", func() bool { return one.logged("left alone") })
	restart(migrating)
	one.wantAll(all)
}
