package fsbroker

import (
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/caddyserver/caddy/v2"
)

// Harvest configures that submissions and tasks are followed until their reports are finished, so that the reports are kept
// although nobody asks for them in time: each submission whose answer passes through here, and each report that is asked
// for and is not finished. With a storage, what is followed is noted there: it is resumed after a restart, and taken over by
// another instance if this one has ended for 30 seconds.
//
// When a report of a submission or a task is finished for the first time and kept, the event `fsbroker_report_finished` is
// emitted, with `namespace`, `client`, `submit_id` or `node` and `task_id`, `sha256` and `name`. After a crash it may be
// emitted again.
type Harvest struct {
	// Whether the high-level report is wanted. Default: true unless `complete` is set
	Summary bool `json:"summary,omitempty"`

	// Whether the complete report is wanted. Default: true unless `summary` is set
	Complete bool `json:"complete,omitempty"`

	// How long a submission or a task is followed. Then it is given up, which is logged. Default: `24h`
	For caddy.Duration `json:"for,omitempty"`
}

const defaultHarvestFor = 24 * time.Hour

// instanceName returns the name of this instance, which lasts, and the directory for the locks that tell processes apart
// which have the same name. It must be called before Caddy's own first call, from its start on, which would write another name
// to the file.
func instanceName() (name, lockDir string, err error) {
	id, err := caddy.InstanceID()
	if err != nil {
		return uuid.NewString(), "", err
	}
	return id.String(), filepath.Join(caddy.AppDataDir(), "fsbroker"), nil
}
