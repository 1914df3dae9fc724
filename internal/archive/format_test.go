package archive

import (
	"strings"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

func FuzzDecode(f *testing.F) {
	k := numbered(1)
	r, err := task.ReadReport(strings.NewReader(`{"result":{"text":"`+strings.Repeat("x", 1000)+`"}}`), func(int64) error { return nil })
	if err != nil {
		f.Fatal(err)
	}
	for _, v := range []*task.Report{r, report(10)} {
		value, err := Encode(k, v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		v, err := Decode(k, value)
		if err != nil {
			return
		}
		if again, err := Encode(k, v); err != nil || string(again) != string(value) {
			t.Errorf("%x became %x, error %v", value, again, err)
		}
	})
}
