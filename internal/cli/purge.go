package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
)

// purgeFlags are the flags that say what to purge.
var purgeFlags = []parameterFlag{
	{"submit-id", "submitID", "Purge the reports of this submission"},
	{"app-server-id", "appServerID", "Purge the reports of this node, or of one of its tasks"},
	{"task-id", "taskID", "With --app-server-id: purge the reports of this task only"},
	{"sha256", "sha256", "Purge the reports of the file with this SHA-256 sum"},
	{"older-than", "older_than", "Purge the reports that are older, such as 24h or 30d"},
}

func purgeCommand() *cobra.Command {
	cmd := adminCommand(&cobra.Command{
		Use:   "purge {--submit-id|--app-server-id [--task-id]|--sha256|--older-than <value>} | --all",
		Short: "Purges reports from the memory, the storage queue and the storage",
		Long: `
Purges reports of all namespaces from the memory, from the queue to the storage,
and from the storage. It prints how many entries it has removed from each.

Say what to purge with exactly one of --submit-id, --app-server-id (with or
without --task-id), --sha256, --older-than and --all.

A purge of a large storage takes several requests, and shows how far it has come.
If it fails or is interrupted, run it again: what is removed stays removed.
`,
		Example: `  caddy fsbroker purge --app-server-id node-1 --task-id 42
  caddy fsbroker purge --older-than 30d
  caddy fsbroker purge --all --json`,
	}, runPurge, purgeFlags...)
	cmd.Flags().Bool("all", false, "Purge everything")
	return cmd
}

// runPurge is `caddy fsbroker purge`.
func runPurge(c *invocation) error {
	query, err := purgeQuery(c.Flags)
	if err != nil {
		return err
	}
	if _, _, err := get[map[string]Cache](c, CachePath, "fsbroker_task"); err != nil {
		return err
	}
	removed, err := c.purge(query)
	if err != nil && removed != (Purged{}) {
		err = fmt.Errorf("%w (before that, %s)", err, removed)
	}
	if err != nil {
		return err
	}
	body, err := json.Marshal(removed)
	if err != nil {
		return err
	}
	return c.print(append(body, '\n'), fmt.Sprintln(removed))
}

// purgeQuery returns what to purge as the query of the admin API. An empty query purges everything, so it must have been
// asked for: a variable that is empty by mistake is an error.
func purgeQuery(fl caddycmd.Flags) (url.Values, error) {
	query, err := parameters(fl, purgeFlags, "give it a value, or use --all to purge everything")
	if err != nil {
		return nil, err
	}
	selected := len(query)
	if query.Has("taskID") {
		if !query.Has("appServerID") {
			return nil, usageError{errors.New("--task-id needs --app-server-id")}
		}
		selected--
	}
	if fl.Bool("all") {
		selected++
	}
	if selected != 1 {
		return nil, usageError{errors.New("say what to purge with exactly one of --submit-id, --app-server-id, --sha256, --older-than and --all")}
	}
	return query, nil
}

// String tells what was removed.
func (p Purged) String() string {
	return fmt.Sprintf("removed %d from memory, %d from the queue, %d from the storage", p.Memory, p.Queue, p.Storage)
}

// purge purges step by step, and returns what was removed, even if a step fails.
func (c *invocation) purge(query url.Values) (sum Purged, err error) {
	bar := newProgress(c.errOut)
	defer bar.end()
	for from := 0; ; {
		var step Purged
		if _, err := c.request(http.MethodDelete, CachePath+"?"+query.Encode(), &step); err != nil {
			return sum, err
		}
		sum.Memory += step.Memory
		sum.Queue += step.Queue
		sum.Storage += step.Storage
		if step.Next == nil {
			return sum, nil
		}
		if *step.Next <= from && step.Memory+step.Queue+step.Storage == 0 {
			return sum, errors.New("the storage is too slow: a step has removed nothing. Run the command again later")
		}
		from = *step.Next
		query.Set("from", strconv.Itoa(from))
		bar.show(float64(from)/archive.Partitions, sum)
	}
}

// progress shows how far a purge has come. On a terminal, it is a bar that grows in place. Elsewhere, each step is a line.
type progress struct {
	w        io.Writer
	terminal bool
	shown    bool
}

func newProgress(w io.Writer) *progress {
	file, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(file.Fd()))}
}

// show shows that a part of the whole is done. What cannot be shown does not end the purge.
func (p *progress) show(part float64, sum Purged) {
	p.shown = true
	if !p.terminal {
		fmt.Fprintf(p.w, "%3.0f%%  %s\n", 100*part, sum)
		return
	}
	const width = 20
	done := max(0, min(width, int(width*part)))
	fmt.Fprintf(p.w, "\r[%s%s] %3.0f%%  %s\x1b[K", strings.Repeat("#", done), strings.Repeat("-", width-done), 100*part, sum)
}

// end removes the bar.
func (p *progress) end() {
	if p.terminal && p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
