package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/budget"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// FetchTask fetches the report of a node's task from the node, or from the broker. It returns nil if the upstream does not know
// it. A fresh fetch asks the broker for the node's current report instead of its copy.
func (u *Upstream) FetchTask(ctx context.Context, appServerID, taskID string, kind task.Kind, fresh bool) (*task.Report, *problem.Problem) {
	params := reportParams("taskID", taskID, kind)
	if u.Role == problem.RoleBroker {
		params.Set("appServerID", appServerID)
		setNocache(params, fresh)
	}
	return u.fetchReport(ctx, params)
}

// FetchSubmitted fetches the report of a submission from the broker. It returns nil if the broker does not know it. A fresh
// fetch asks for the node's current report instead of the broker's copy.
func (u *Upstream) FetchSubmitted(ctx context.Context, submitID string, kind task.Kind, fresh bool) (*task.Report, *problem.Problem) {
	params := reportParams("submitID", submitID, kind)
	setNocache(params, fresh)
	return u.fetchReport(ctx, params)
}

func reportParams(name, id string, kind task.Kind) url.Values {
	return url.Values{name: {id}, "all": {strconv.FormatBool(kind == task.Complete)}}
}

func setNocache(params url.Values, fresh bool) {
	if fresh {
		params.Set("nocache", "true")
	}
}

// fetchReport fetches a report. It returns nil if the upstream does not know it.
func (u *Upstream) fetchReport(ctx context.Context, params url.Values) (*task.Report, *problem.Problem) {
	var report *task.Report
	status, p := u.fetch(ctx, "task", params, sourceRequest, func(body io.Reader, grow func(int64) error) (err error) {
		marked := &marker{Reader: body}
		report, err = task.ReadReport(marked, grow)
		if err != nil && !errors.Is(err, budget.ErrNoRoom) {
			return u.notA("report", err, marked)
		}
		return err
	})
	switch {
	case p != nil:
		return nil, p
	case status == http.StatusNoContent:
		return task.NothingYet(time.Now()), nil
	case status == http.StatusNotFound:
		return nil, nil
	}
	return report, nil
}

// notA returns the problem that an answer is not what it should be.
func (u *Upstream) notA(wanted string, err error, body *marker) *problem.Problem {
	if body.isHTML() {
		return u.problem(problem.BadAnswer, "sent something that looks like HTML and is not a "+wanted+": its operator checks that its address is that of the "+u.Role.String())
	}
	return u.problem(problem.BadAnswer, fmt.Sprintf("sent something that is not a %s: %s"+problem.TryAgain, wanted, err))
}

// FetchSubmission fetches what the broker says about a submission. It returns nil if the broker does not know it.
func (u *Upstream) FetchSubmission(ctx context.Context, submitID string) (*task.Submission, *problem.Problem) {
	var sub task.Submission
	status, p := u.fetch(ctx, "submit-result", url.Values{"submitID": {submitID}}, sourceOther, func(body io.Reader, _ func(int64) error) (err error) {
		sub, err = task.ReadSubmission(io.LimitReader(body, maxInfo))
		return err
	})
	switch {
	case p != nil:
		return nil, p
	case status == http.StatusNoContent:
		return &task.Submission{Queued: true}, nil
	case status == http.StatusNotFound:
		return nil, nil
	}
	return &sub, nil
}
