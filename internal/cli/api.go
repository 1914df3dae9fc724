package cli

import (
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// The endpoints of the admin API.
const (
	NodesPath   = "/fsbroker/nodes"
	CachePath   = "/fsbroker/cache"
	HarvestPath = "/fsbroker/harvest"
)

// Node is the state of a node or a broker.
type Node struct {
	Namespace   string               `json:"namespace"`
	Role        string               `json:"role"`
	Node        string               `json:"node,omitempty"`
	Address     string               `json:"address"`
	State       string               `json:"state"`
	LastProblem *upstream.Failure    `json:"last_problem,omitempty"`
	Questions   int64                `json:"questions"` // requests under way
	SystemInfo  *upstream.SystemInfo `json:"system_info,omitempty"`

	// SystemInfoProblem is the code of the problem that took the place of SystemInfo.
	SystemInfoProblem string `json:"system_info_problem,omitempty"`
}

// Cache is the state of the cache of a namespace.
type Cache struct {
	Bytes     int64          `json:"bytes"`   // of all that follows, and of what is kept
	Sending   int64          `json:"sending"` // not kept any more, but still being sent, in bytes
	Reading   int64          `json:"reading"` // of the answers that are being read, in bytes
	Limit     int64          `json:"limit"`
	Entries   int            `json:"entries"`
	Evictions uint64         `json:"evictions"`
	Waiters   int64          `json:"waiters"`           // callers that wait for a report to be finished
	Storage   *archive.Stats `json:"storage,omitempty"` // nil without a storage
}

// Purged counts what a step of a purge has removed from each tier. A report may have been in several.
type Purged struct {
	Memory  int  `json:"memory"`
	Queue   int  `json:"queue"`
	Storage int  `json:"storage"`
	Next    *int `json:"next,omitempty"` // where the next step begins; nil when all is done
}

// Pending is a submission or a task that is followed until its report is finished.
type Pending struct {
	Client      string    `json:"client"`
	SubmitID    string    `json:"submit_id,omitempty"`
	Node        string    `json:"node,omitempty"`
	TaskID      string    `json:"task_id,omitempty"`
	SHA256      string    `json:"sha256,omitempty"`
	Name        string    `json:"name,omitempty"` // of the file
	State       string    `json:"state"`
	Accepted    time.Time `json:"accepted"`
	AgeSeconds  int64     `json:"age_seconds"`
	Questions   int       `json:"questions"`
	LastProblem string    `json:"last_problem,omitempty"`

	// Noted reports whether it is in the storage, so that it outlives the process.
	Noted bool `json:"noted"`
}

// GivenUp is the answer to a request to give up what is pending.
type GivenUp struct {
	GivenUp int `json:"given_up"`
}
