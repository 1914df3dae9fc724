package fsbroker_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// encryptionKey sets an environment variable to a new key, in one of its forms, and returns the placeholder for it.
func encryptionKey(t *testing.T, name string, encode func([]byte) string) (placeholder, key string) {
	sum := sha256.Sum256([]byte(t.Name() + name))
	key = encode(sum[:])
	t.Setenv(name, key)
	return "{env." + name + "}", key
}

// encrypted returns the option for a storage whose values are encrypted.
func encrypted(keys ...string) string {
	return fmt.Sprintf("cache {\n storage\n encryption_key %s\n }", strings.Join(keys, " "))
}

func TestEncryption(t *testing.T) {
	one, oneKey := encryptionKey(t, "FSBROKER_KEY_ONE", hex.EncodeToString)
	two, twoKey := encryptionKey(t, "FSBROKER_KEY_TWO", base64.StdEncoding.EncodeToString)
	node := newBackend(t, anyTask)
	s := startSite(t, options(node, stored))
	store := func(i int) []byte {
		t.Helper()
		node.setHandler(anyTask)
		before := s.values()
		s.get(taskPath(i)).wantHeader(t, "Cache-Status", "fsbroker; fwd=uri-miss; stored")
		node.setHandler(responds(http.StatusNotFound, ""))
		for _, name := range s.wantValues(len(before) + 1) {
			if !slices.Contains(before, name) {
				return readFile(t, name)
			}
		}
		return nil
	}
	has := func(i int) bool {
		t.Helper()
		r := s.get(taskPath(i))
		if r.status == http.StatusNotFound {
			return false
		}
		if !strings.HasPrefix(r.header.Get("Cache-Status"), "fsbroker; hit") || string(r.body) != reportOf(fmt.Sprintf("t%d", i), "SUCCESS") {
			t.Errorf("%d: status %d, %v: %s", i, r.status, r.header, r.body)
		}
		return true
	}

	plain := store(0)
	body := plain[len(plain)-300:] // of the compressed document
	s.restart(options(node, encrypted(one)))
	if !has(0) {
		t.Error("what was stored unencrypted cannot be read with a key")
	}
	sealed := store(1)
	if checkStored(s.values()[0], sealed) == nil || bytes.Contains(sealed, body[:100]) {
		t.Error("a report is stored unencrypted")
	}

	// Rotation: the new key is put first, and the old one is removed later.
	s.restart(options(node, encrypted(two, one)))
	if !has(0) || !has(1) {
		t.Error("what was stored before the rotation cannot be read")
	}
	store(2)
	s.restart(options(node, encrypted(two)))
	for range 2 {
		if has(1) || !has(0) || !has(2) {
			t.Error("without the old key, the wrong reports can be read")
		}
	}
	const lost = "a stored value cannot be read and is left alone"
	if lines := s.logged(lost); len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "key that is not configured") {
		t.Errorf("the log says about a lost key: %v", lines)
	}

	// A report whose key is lost is fetched again, and the value is left alone.
	node.setHandler(anyTask)
	s.get(taskPath(1)).wantStatus(t, http.StatusOK)
	s.restart(options(node, encrypted(one)))
	node.setHandler(responds(http.StatusNotFound, ""))
	if !has(1) || has(2) {
		t.Error("with the old key alone, the wrong reports can be read")
	}

	// Without any key, all that is encrypted is left alone.
	s.restart(options(node, stored))
	if !has(0) || has(1) || has(2) || len(s.values()) != 3 {
		t.Error("without a key, the wrong reports can be read")
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	wantNowhere(t, s.dir, oneKey, twoKey)
}

// wantNowhere checks that no file in a folder, such as a log, has one of the texts.
func wantNowhere(t *testing.T, dir string, texts ...string) {
	t.Helper()
	for _, name := range filesIn(t, dir) {
		content := readFile(t, name)
		for _, text := range texts {
			if bytes.Contains(content, []byte(text)) {
				t.Errorf("%s has %q", name, text)
			}
		}
	}
}

// filesIn returns all files below a folder.
func filesIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// Nothing of a report can be read in the storage, whichever way it is stored there: as a document, a large one, or a
// reference from a submission or a file.
func TestNothingIsStoredUnencrypted(t *testing.T) {
	key, text := encryptionKey(t, "FSBROKER_KEY", base64.RawURLEncoding.EncodeToString)
	const sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	document := fmt.Sprintf(`{"result":{"taskReference":{"state":"SUCCESS","additionalInfo":{"digests":{"SHA-256":"%s"}}}},%s`, sum, dense(600 << 10)[1:])
	node := newBackend(t, responds(http.StatusOK, document))
	broker := newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"t1"}`))
	store := func(option string) *site {
		s := startSite(t, options(node, brokerOption(broker)+"\n"+option))
		s.get("/task?submitID=s1").wantStatus(t, http.StatusOK)
		s.wantValues(2)
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
		return s
	}
	const bodies = 48 + sha256.Size // where they begin in what is stored unencrypted
	var bits []string
	for _, name := range filesIn(t, store(stored).dir) {
		if value := readFile(t, name); bytes.HasPrefix(value, []byte("fsbk")) {
			bits = append(bits, string(value[bodies:bodies+40]), string(value[len(value)-40:]))
		}
	}
	if len(bits) != 2*4 { // the document, and references from the task, the submission and the file
		t.Fatalf("there are %d values", len(bits)/2)
	}
	s := store(encrypted(key))
	wantNowhere(t, s.dir, append(bits, sum, text)...)
	s.restart(options(node, brokerOption(broker)+"\n"+encrypted(key)))
	if r := s.get("/task?submitID=s1"); string(r.body) != document || r.header.Get("Cache-Status") != "fsbroker; hit; detail=storage" {
		t.Errorf("status %d, %v", r.status, r.header)
	}
}

// A key that is wrong is an error, which does not show it.
func TestWrongEncryptionKeys(t *testing.T) {
	s := newSite(t)
	node := newBackend(t, systemInfo)
	right, _ := encryptionKey(t, "FSBROKER_KEY", hex.EncodeToString)
	t.Setenv("FSBROKER_SHORT_KEY", "0123456789abcdef")
	t.Setenv("FSBROKER_EMPTY_KEY", "")
	for keys, want := range map[string]string{
		"{env.FSBROKER_SHORT_KEY}":           "encryption key 1 must be 32 bytes",
		right + " {env.FSBROKER_SHORT_KEY}":  "encryption key 2 must be 32 bytes",
		"{env.FSBROKER_EMPTY_KEY}":           "{env.FSBROKER_EMPTY_KEY} has no value: the environment variable is set, but empty",
		right + " {env.FSBROKER_NO_KEY}":     "{env.FSBROKER_NO_KEY} has no value: the environment variable is not set",
		"{file./no/such/key}":                "{file./no/such/key} has no value: there is no such file",
		"0123456789abcdef":                   "encryption key 1 must be 32 bytes",
		`""`:                                 "an encryption key is empty",
		"":                                   "expected encryption_key <key> [<older key>...]",
		right + "\n encryption_key " + right: "encryption_key is given more than once",
		right + " {\n x\n }":                 "encryption_key takes no block",
	} {
		err := s.tryLoad(options(node, encrypted(keys)))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "0123456789abcdef") {
			t.Errorf("%s: got %v, want %s", keys, err, want)
		}
	}
	err := s.tryLoad(options(node, "cache {\n encryption_key "+right+"\n }"))
	if err == nil || !strings.Contains(err.Error(), "encryption_key needs a storage") {
		t.Errorf("without a storage: %v", err)
	}
}
