package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// SystemInfo is what a node or a broker says about itself.
type SystemInfo struct {
	Name            string    `json:"name,omitempty"`
	Version         string    `json:"version,omitempty"`
	Queue           QueueInfo `json:"queue"`
	ActiveThreads   *int64    `json:"active_threads,omitempty"`
	FreeDiskSpaceMB *int64    `json:"free_disk_space_mb,omitempty"`
}

// QueueInfo has the numbers of tasks that a node states. A broker states only those in its queue.
type QueueInfo struct {
	Active    *int64 `json:"active,omitempty"`
	Queued    *int64 `json:"queued,omitempty"`
	Completed *int64 `json:"completed,omitempty"`
}

// maxInfo is how much is read of what an upstream says about itself or about a submission, in bytes.
const maxInfo = 64 << 10

// Check checks the health of the upstream, even if it is down.
func (u *Upstream) Check(ctx context.Context) { _, _ = u.fetchSystemInfo(ctx, sourceCheck) }

// SystemInfo fetches what the upstream says about itself, even if it is down. That does not make it unhealthy, unless it cannot
// be connected to.
func (u *Upstream) SystemInfo(ctx context.Context) (*SystemInfo, *problem.Problem) {
	return u.fetchSystemInfo(ctx, sourceOther)
}

func (u *Upstream) fetchSystemInfo(ctx context.Context, source healthSource) (*SystemInfo, *problem.Problem) {
	var info SystemInfo
	r := u.exchange(ctx, u.CheckTimeout, "system-info", make(url.Values), func(body io.Reader, _ func(int64) error) (err error) {
		marked := &marker{Reader: io.LimitReader(body, maxInfo)}
		if info, err = readSystemInfo(marked); err != nil {
			return u.notA("JSON object", errors.New("it is not JSON, or something else"), marked)
		}
		return nil
	})
	if r.problem == nil && r.status != http.StatusOK {
		r.problem = u.problem(problem.BadAnswer, fmt.Sprintf("answered with the status %d instead of its system information", r.status))
	}
	u.health.record(source, r)
	if r.problem != nil {
		return nil, r.problem
	}
	return &info, nil
}

// readSystemInfo reads a JSON object. Members that are missing or have another type are left out.
func readSystemInfo(body io.Reader) (SystemInfo, error) {
	var doc *struct {
		VersionInfo struct {
			Name, Version optional[string]
		}
		QueueInfo struct {
			ActiveCount, QueueCount, CompletedCount optional[float64]
		}
		ActiveThreads, FreeDiscSpaceInMb optional[float64]
	}
	text, err := io.ReadAll(body)
	if err != nil {
		return SystemInfo{}, err
	}
	err = json.Unmarshal(text, &doc)
	if mismatch, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && mismatch.Field != "" {
		err = nil // of a member
	}
	if err == nil && doc == nil {
		err = errors.New("it is null")
	}
	if err != nil {
		return SystemInfo{}, err
	}
	info := SystemInfo{Name: short(doc.VersionInfo.Name), Version: short(doc.VersionInfo.Version)}
	info.ActiveThreads, info.FreeDiskSpaceMB = whole(doc.ActiveThreads), whole(doc.FreeDiscSpaceInMb)
	info.Queue = QueueInfo{
		Active:    whole(doc.QueueInfo.ActiveCount),
		Queued:    whole(doc.QueueInfo.QueueCount),
		Completed: whole(doc.QueueInfo.CompletedCount),
	}
	return info, nil
}

// optional is a JSON value that may be missing or have another type.
type optional[T any] struct{ value *T }

// UnmarshalJSON implements json.Unmarshaler.
func (o *optional[T]) UnmarshalJSON(text []byte) error {
	var value T
	if json.Unmarshal(text, &value) == nil {
		o.value = &value
	}
	return nil
}

// maxName bounds the name and the version of an upstream, in bytes.
const maxName = 64

// short returns a text that can be shown, or an empty string.
func short(text optional[string]) string {
	if text.value == nil || len(*text.value) > maxName || !task.ValidID(*text.value) {
		return ""
	}
	return *text.value
}

// whole returns a number as an integer, or nil.
func whole(number optional[float64]) *int64 {
	if number.value == nil {
		return nil
	}
	n := int64(*number.value)
	return &n
}
