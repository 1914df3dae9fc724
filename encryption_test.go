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

// accepting is like encrypted, but values that are not encrypted are read as well.
func accepting(keys ...string) string { return encrypted(append(keys, "\n accept_unencrypted")...) }

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
	if has(0) {
		t.Error("what was stored unencrypted is read with a key")
	}
	s.restart(options(node, accepting(one)))
	if !has(0) {
		t.Error("what was stored unencrypted is not read, although it is accepted")
	}
	sealed := store(1)
	if checkStored(s.values()[0], sealed) == nil || bytes.Contains(sealed, body[:100]) {
		t.Error("a report is stored unencrypted")
	}

	// Rotation: the new key is put first, and the old one is removed later.
	s.restart(options(node, accepting(two, one)))
	if !has(0) || !has(1) {
		t.Error("what was stored before the rotation cannot be read")
	}
	store(2)
	s.restart(options(node, encrypted(two)))
	for range 2 {
		if has(1) || has(0) || !has(2) {
			t.Error("without the old key, the wrong reports can be read")
		}
	}
	const leftAlone, lost, unsealed = "a stored value cannot be read and is left alone", "key that is not configured", "it is not encrypted"
	var causes []string
	for _, line := range s.waitLogged(3, leftAlone) {
		causes = append(causes, fmt.Sprint(line["error"]))
	}
	slices.Sort(causes)
	if len(causes) != 3 || !strings.Contains(causes[0], lost) || !strings.Contains(causes[1], unsealed) || !strings.Contains(causes[2], unsealed) {
		t.Errorf("the log says about values that are left alone: %q", causes)
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

// The log warns once for a namespace that values are accepted which are not encrypted.
func TestAcceptingIsWarnedOf(t *testing.T) {
	key, _ := encryptionKey(t, "FSBROKER_KEY", hex.EncodeToString)
	node := newBackend(t, anyTask)
	both := func(option string) string {
		return at("/one", options(node, option)) + "\n" + at("/other", options(node, option))
	}
	s := startSite(t, both(encrypted(key)))
	if lines := s.logged("accept_unencrypted"); len(lines) > 0 {
		t.Errorf("they are not accepted, and the log has %v", lines)
	}
	s.load(both(accepting(key)))
	if lines := s.logged("accept_unencrypted"); len(lines) != 1 || lines[0]["level"] != "warn" || lines[0]["namespace"] != "default" {
		t.Errorf("two handlers accept them, and the log has %v", lines)
	}
}

// Whoever can write to the storage, but has no key, can make up a document or a reference, or put one value in the place of
// another. None of that becomes a response.
func TestForgedValues(t *testing.T) {
	key, _ := encryptionKey(t, "FSBROKER_KEY", hex.EncodeToString)
	paths := []string{taskPath(1), taskPath(2), "/task?submitID=s1"}
	store := func(node, broker *backend, option string) (s *site, names []string, values [][]byte) {
		s = startSite(t, options(node, brokerOption(broker)+"\n"+option))
		for i, path := range paths {
			s.get(path).wantStatus(t, http.StatusOK)
			for _, name := range s.wantValues(i + 1) {
				if inStorage := strings.TrimPrefix(name, s.dir); !slices.Contains(names, inStorage) {
					names, values = append(names, inStorage), append(values, readFile(t, name))
				}
			}
		}
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
		return s, names, values
	}
	refersTo := func(task string) *backend {
		return newBackend(t, explains(`{"state":"SUCCESS","appServerID":"node-1","taskID":"`+task+`"}`))
	}
	_, forgedNames, forged := store(newBackend(t, responds(http.StatusOK, reportOf("forged", "SUCCESS"))), refersTo("t2"), stored)
	node, broker := newBackend(t, anyTask), refersTo("t1")
	s, names, sealed := store(node, broker, encrypted(key))
	if !slices.Equal(names, forgedNames) {
		t.Fatalf("the reports have the names %q with a key, and %q without", names, forgedNames)
	}
	node.setHandler(responds(http.StatusNotFound, ""))
	broker.setHandler(responds(http.StatusNotFound, ""))
	for what, test := range map[string]struct {
		at       int // which value is replaced
		by       []byte
		unsealed bool
	}{
		"nothing":                         {-1, nil, false},
		"a forged document":               {0, forged[0], true},
		"a forged reference":              {2, forged[2], true},
		"a forged reference, not another": {0, forged[2], false},
		"another document":                {0, sealed[1], false},
		"a document for a reference":      {2, sealed[1], false},
		"a reference for a document":      {1, sealed[2], false},
	} {
		t.Run(what, func(t *testing.T) {
			s := s.in(t)
			for i, name := range names {
				overwrite(t, s.dir+name, sealed[i])
			}
			if test.at >= 0 {
				overwrite(t, s.dir+names[test.at], test.by)
			}
			s.restart(options(node, brokerOption(broker)+"\n"+encrypted(key)))
			for range 2 {
				for i, path := range paths {
					want := http.StatusOK
					if i == test.at || i == 2 && test.at == 0 { // it refers to the first
						want = http.StatusNotFound
					}
					if r := s.get(path); r.status != want {
						t.Errorf("%s: status %d, want %d: %s", path, r.status, want, r.body)
					}
				}
			}
			if test.unsealed && !bytes.Equal(readFile(t, s.dir+names[test.at]), test.by) {
				t.Error("the value is not left alone")
			}
		})
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
