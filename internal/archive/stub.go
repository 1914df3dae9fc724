package archive

import (
	"errors"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

type Keyring struct{}

func NewKeyring(keys ...string) (*Keyring, error) { return nil, nil }

type kind uint8

const (
	kindDocument kind = iota + 1
	kindReference
	kindDamaged
)

type placeKind uint8

const (
	inPartition placeKind = iota
	large
	ofFile
	damaged
)

type place struct {
	kind placeKind
	key  task.Key
}

type value struct {
	kind   kind
	at     time.Time
	key    task.Key
	report *task.Report
	target place
	size   int64
	raw    []byte
}
type layout string

const partitions = 4096
const valueOverhead = 100
const maxIndexed = 4096

var errUnknownVersion, errLostKey = errors.New(""), errors.New("")

func newLayout(ns string) layout                                    { return "" }
func (l layout) name(p place) string                                { return "" }
func (l layout) parse(name string) (p place, ok bool)               { return }
func (l layout) partition(n int) string                             { return "" }
func (l layout) sourceFolder(n int, s task.Source) string           { return "" }
func (l layout) fileFolder(s task.Source) string                    { return "" }
func (l layout) damagedFolder(n int) string                         { return "" }
func (l layout) indexFolder() string                                { return "" }
func (l layout) indexName(t time.Time, writer string, n int) string { return "" }
func (l layout) parseIndexName(s string) (t time.Time, ok bool)     { return }
func (l layout) recordName(writer string) string                    { return "" }
func (l layout) sweepCursor() string                                { return "" }
func (l layout) sweepLock() string                                  { return "" }
func encode(v value, name string, ring *Keyring) (b []byte, err error) {
	return
}
func decode(b []byte, name string, k task.Key, ring *Keyring) (v value, err error) { return }
func timeOf(b []byte, name string, k task.Key, ring *Keyring) (t time.Time, err error) {
	return
}
func encodeIndex(t time.Time, p []place) []byte                    { return nil }
func decodeIndex(b []byte) (p []place, t time.Time, err error)     { return }
func CheckValue(name string, b []byte, r *Keyring) (t time.Time, err error) { return }
