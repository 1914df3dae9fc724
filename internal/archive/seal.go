package archive

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Keyring has the keys that values are sealed with. The first seals, and any of them opens. A nil Keyring seals nothing, and
// only values that are not sealed can be read with it.
//
// A value is sealed with AES-256-GCM and a random nonce, which is safe for 2³² values with one key.
type Keyring struct {
	// AcceptUnsealed is whether values that are not sealed can be read as well. It must be set before the first use.
	AcceptUnsealed bool

	keys []ringKey
}

// ringKey is a key of a ring.
type ringKey struct {
	id   [8]byte
	aead cipher.AEAD // puts a random nonce in front
}

const (
	keySize = 32

	// sealOverhead is how much larger than its body what follows the header of a sealed value is: the ID of the key, the
	// nonce, and the tag.
	sealOverhead = 8 + 12 + 16
)

// NewKeyring returns the ring of keys, each of which has 32 bytes that are written as 64 hexadecimal digits or as base64.
// Without keys it returns nil. An error says which key is wrong and shows nothing of it.
func NewKeyring(keys ...string) (*Keyring, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	ring := &Keyring{keys: make([]ringKey, len(keys))}
	for i, text := range keys {
		key, err := newRingKey(text)
		if err != nil {
			return nil, fmt.Errorf("encryption key %d %w", i+1, err)
		}
		ring.keys[i] = key
	}
	return ring, nil
}

var errKeyForm = errors.New("must be 32 bytes, written as 64 hexadecimal digits or as base64")

func newRingKey(text string) (ringKey, error) {
	key, ok := keyBytes(strings.TrimSpace(text))
	if !ok {
		return ringKey{}, errKeyForm
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return ringKey{}, errKeyForm
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return ringKey{}, fmt.Errorf("cannot be used: %w", err)
	}
	sum := sha256.Sum256(append([]byte("fsbroker key id"), key...))
	return ringKey{id: [8]byte(sum[:]), aead: aead}, nil
}

// keyBytes returns the bytes of a key as it is written. No text is both hexadecimal and base64 of that many bytes.
func keyBytes(text string) (key []byte, ok bool) {
	if len(text) == hex.EncodedLen(keySize) {
		key, err := hex.DecodeString(text)
		return key, err == nil
	}
	text = strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimSuffix(text, "="))
	if len(text) != base64.RawStdEncoding.EncodedLen(keySize) {
		return nil, false
	}
	key, err := base64.RawStdEncoding.Strict().DecodeString(text)
	return key, err == nil && len(key) == keySize
}

// seal appends a sealed body to the header of a value. It needs no other memory if the header has the capacity for it.
func (r *Keyring) seal(header, additionalData []byte, body ...[]byte) []byte {
	k := r.keys[0]
	begin := len(header) + len(k.id)
	stored := append(header, k.id[:]...) //nolint:gocritic // it begins with the header
	for _, part := range body {
		stored = append(stored, part...)
	}
	return k.aead.Seal(stored[:begin], nil, stored[begin:], additionalData) //nolint:gosec // it makes a random nonce
}

// open returns the body that is sealed.
func (r *Keyring) open(sealed, additionalData []byte) ([]byte, error) {
	if len(sealed) < sealOverhead {
		return nil, errCutShort
	}
	if r == nil {
		return nil, errLostKey
	}
	for _, k := range r.keys {
		if ciphertext := sealed[len(k.id):]; k.id == [8]byte(sealed) {
			body, err := k.aead.Open(nil, nil, ciphertext, additionalData)
			if err != nil {
				return nil, errors.New("its seal is broken")
			}
			return body, nil
		}
	}
	return nil, errLostKey
}

// Format implements fmt.Formatter, so that the keys are never printed.
func (r *Keyring) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, "keyring") }
