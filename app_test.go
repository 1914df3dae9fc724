package fsbroker

import (
	"testing"

	"github.com/caddyserver/certmagic"

	"github.com/caddyserver/caddy/v2"
)

// A storage is known by the name of its module.
func TestStorageName(t *testing.T) {
	for want, storage := range map[string]certmagic.Storage{
		"file_system":    new(certmagic.FileStorage),
		"named":          named{},
		"*fsbroker.bare": new(bare),
	} {
		if got := storageName(storage); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

type bare struct{ certmagic.Storage }

type named struct{ certmagic.Storage }

func (named) CaddyModule() caddy.ModuleInfo { return caddy.ModuleInfo{ID: "caddy.storage.named"} }
