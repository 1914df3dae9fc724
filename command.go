package fsbroker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/archive"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "fsbroker",
		Usage: "nodes|cache|purge|harvest|give-up",
		Short: "Shows what fsbroker_task asks, keeps and follows, and purges reports",
		Long: `
Shows the nodes, the brokers and the cache of the fsbroker_task handlers of a
running Caddy, and what they follow, and purges reports from the cache.

The commands send requests to Caddy's admin API, so Caddy must be running, and
its admin API must be on. They need no secret, and show no report.
` + exitCodesHelp,
		CobraFunc: configureCommand,
	})
}

// exitUsage is the exit code of a command that was used wrongly.
const exitUsage = 2

const exitCodesHelp = `
Exit codes:
  0  It is done.
  1  A request failed, or Caddy has no fsbroker_task.
  2  The command was used wrongly. Nothing has been changed.
`

const addressHelp = `
The admin API is at --address, or else where the config of --config says. Without
both flags, it is where the Caddyfile of the current directory says, or else at
Caddy's default address.
`

// usageError is an error of whoever typed the command.
type usageError struct{ error }

// configureCommand adds the subcommands of `caddy fsbroker`.
func configureCommand(parent *cobra.Command) {
	parent.Args = noArguments
	parent.RunE = withExitCode(func(caddycmd.Flags) error {
		return usageError{errors.New("say what to do: caddy fsbroker nodes, cache, purge, harvest or give-up")}
	})
	parent.SetFlagErrorFunc(usageFailure)
	parent.AddCommand(
		adminCommand(&cobra.Command{
			Use:   "nodes",
			Short: "Shows the state of nodes and brokers",
			Long: `
Shows the state of all nodes and brokers. Each is asked for its system
information at that moment.
`,
		}, show("/fsbroker/nodes", "fsbroker_task", nodesTable)),
		adminCommand(&cobra.Command{
			Use:   "cache",
			Short: "Shows the memory and the storage queue of each namespace",
			Long: `
Shows how much memory the reports of each namespace use, and what is queued for
its storage.
`,
		}, show("/fsbroker/cache", "fsbroker_task", cacheTable)),
		purgeCommand(),
		adminCommand(&cobra.Command{
			Use:   "harvest",
			Short: "Shows what is followed until its report is finished",
			Long: `
Shows the submissions and tasks that are followed, by namespace and client, the
oldest first. Each is "accepted" until an upstream has known it, then
"unfinished", and "finished" while its report is being stored.
`,
		}, show("/fsbroker/harvest", "fsbroker_task with harvest", pendingTable)),
		giveUpCommand(),
	)
}

// parameterFlag is a flag that becomes a parameter of the admin API.
type parameterFlag struct{ name, parameter, usage string }

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
	}, runPurge)
	for _, f := range purgeFlags {
		cmd.Flags().String(f.name, "", f.usage)
	}
	cmd.Flags().Bool("all", false, "Purge everything")
	return cmd
}

// giveUpFlags are the flags that say what to give up.
var giveUpFlags = []parameterFlag{
	{"submit-id", "submitID", "Give up this submission"},
	{"app-server-id", "appServerID", "With --task-id: give up a task of this node"},
	{"task-id", "taskID", "With --app-server-id: give up this task"},
}

func giveUpCommand() *cobra.Command {
	cmd := adminCommand(&cobra.Command{
		Use:   "give-up {--submit-id <value> | --app-server-id <value> --task-id <value>}",
		Short: "Ends the following of a submission or a task",
		Long: `
Ends the following of a submission or a task, in all namespaces. Its report is
not fetched any longer unless somebody asks for it.
`,
		Example: `  caddy fsbroker give-up --submit-id 7f6c5a0e
  caddy fsbroker give-up --app-server-id node-1 --task-id 42`,
	}, runGiveUp)
	for _, f := range giveUpFlags {
		cmd.Flags().String(f.name, "", f.usage)
	}
	return cmd
}

// runGiveUp is `caddy fsbroker give-up`.
func runGiveUp(c *invocation) error {
	query, err := parameters(c.Flags, giveUpFlags, "give it a value")
	if err != nil {
		return err
	}
	var done givenUp
	body, err := c.request(http.MethodDelete, "/fsbroker/harvest?"+query.Encode(), &done)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		_, err = c.out.Write(body)
		return err
	}
	_, err = fmt.Fprintln(c.out, "given up")
	return err
}

// invocation is one run of a subcommand.
type invocation struct {
	caddycmd.Flags
	address     string // of the admin API
	out, errOut io.Writer
}

// adminCommand completes a subcommand that uses the admin API.
func adminCommand(cmd *cobra.Command, run func(*invocation) error) *cobra.Command {
	cmd.Long += addressHelp + exitCodesHelp
	cmd.Args = noArguments
	cmd.Flags().StringP("config", "c", "", "Configuration file that says where the admin API is")
	cmd.Flags().StringP("adapter", "a", "", "Name of config adapter to apply")
	cmd.Flags().String("address", "", "Address of the administration listener, if different from config")
	cmd.Flags().Bool("json", false, "Print the answer in JSON format, as the admin API returns it")
	cmd.RunE = withExitCode(func(fl caddycmd.Flags) error {
		address, err := adminAddress(fl)
		if err != nil {
			return usageError{err}
		}
		return run(&invocation{fl, address, cmd.OutOrStdout(), cmd.ErrOrStderr()})
	})
	return cmd
}

// withExitCode returns what runs as a command: errors are logged like those of Caddy's own commands.
func withExitCode(run func(caddycmd.Flags) error) func(*cobra.Command, []string) error {
	return caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		err := run(fl)
		if _, ok := errors.AsType[usageError](err); ok {
			return exitUsage, err
		}
		if err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		return caddy.ExitCodeSuccess, nil
	})
}

// usageFailure ends a command whose flags or arguments are wrong.
func usageFailure(cmd *cobra.Command, err error) error {
	return withExitCode(func(caddycmd.Flags) error {
		return usageError{fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())}
	})(cmd, nil)
}

// noArguments refuses arguments. It does not repeat them, since one may be a secret.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usageFailure(cmd, errors.New("there is an unknown command or an argument without a flag"))
}

// adminAddress returns the address of the admin API, which it finds as `caddy reload` does.
func adminAddress(fl caddycmd.Flags) (string, error) {
	if address := fl.String("address"); address != "" {
		if strings.Contains(address, "://") {
			return "", errors.New("--address is not a URL: give a host and a port, or the path of a socket as unix//path")
		}
		return address, nil
	}
	config, file, _, err := caddycmd.LoadConfig(fl.String("config"), fl.String("adapter"))
	if err != nil {
		return "", fmt.Errorf("finding the admin API: %w: correct the config, or give --address", err)
	}
	var settings struct {
		Admin caddy.AdminConfig `json:"admin"`
	}
	if err := json.Unmarshal(config, &settings); len(config) > 0 && err == nil && settings.Admin.Disabled {
		return "", fmt.Errorf("the config %s turns the admin API off: turn it on, or give --address if Caddy runs with another config", file)
	}
	return caddycmd.DetermineAdminAPIAddress("", config, file, fl.String("adapter"))
}

// request sends a request to the admin API, and decodes the JSON of the answer into value.
func (c *invocation) request(method, uri string, value any) (body []byte, err error) {
	resp, err := caddycmd.AdminAPIRequest(c.address, method, uri, nil, nil)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		return nil, fmt.Errorf("the admin API at %s broke off its answer: %w: run the command again", c.address, err)
	}
	if json.Unmarshal(body, value) != nil {
		return nil, fmt.Errorf("what answers at %s is not Caddy's admin API, or its fsbroker_task has another version: check --address", c.address)
	}
	return body, nil
}

// adminFailure matches how AdminAPIRequest tells the status and the body of an answer that is an error.
var adminFailure = regexp.MustCompile(`(?s)^caddy responded with error: HTTP (\d+): (.*)$`)

// explain adds to an error of AdminAPIRequest what to do.
func (c *invocation) explain(err error) error {
	match := adminFailure.FindStringSubmatch(err.Error())
	if strings.HasPrefix(err.Error(), "invalid admin address") {
		return usageError{fmt.Errorf("%w: give a host and a port, or the path of a socket as unix//path", err)}
	}
	if match == nil {
		return fmt.Errorf("the admin API cannot be reached at %s: is Caddy running, is its admin API on, and is it there? If it is elsewhere, give --address or --config: %w",
			c.address, err)
	}
	status, _ := strconv.Atoi(match[1])
	var refusal caddy.APIError
	isJSON := json.Unmarshal([]byte(match[2]), &refusal) == nil && refusal.Message != ""
	switch {
	case !isJSON && status == http.StatusNotFound:
		return fmt.Errorf("what answers at %s has no fsbroker_task: build Caddy with this plugin and restart it, or check --address", c.address)
	case !isJSON:
		return fmt.Errorf("what answers at %s is not Caddy's admin API, its status is %d: check --address", c.address, status)
	case status == http.StatusBadRequest:
		return usageError{errors.New(refusal.Message)}
	case status == http.StatusForbidden:
		return fmt.Errorf("the admin API at %s refuses this address: %s: give the address as the config has it, or add it to the admin option `origins`", c.address, refusal.Message)
	}
	return fmt.Errorf("the admin API at %s: %s", c.address, refusal.Message)
}

// errNotLoaded is the error if the admin API works, but knows no handler of a kind.
func (c *invocation) errNotLoaded(handler string) error {
	return fmt.Errorf("no %s is loaded in Caddy at %s: load a config that has one, or give the --address of another Caddy", handler, c.address)
}

// show returns a subcommand that shows what an endpoint returns, as a table or as JSON. The first row of the table is the
// header. The table is nil if there is no handler of a kind.
func show[T any](path, handler string, table func(T) [][]string) func(*invocation) error {
	return func(c *invocation) error {
		var value T
		body, err := c.request(http.MethodGet, path, &value)
		if err != nil {
			return err
		}
		rows := table(value)
		if rows == nil {
			return c.errNotLoaded(handler)
		}
		if c.Bool("json") {
			_, err = c.out.Write(body)
			return err
		}
		return writeTable(c.out, rows)
	}
}

// writeTable writes rows with aligned columns.
func writeTable(w io.Writer, rows [][]string) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			cells[i] = printable(cell)
		}
		if _, err := fmt.Fprintln(table, strings.Join(cells, "\t")); err != nil {
			return err
		}
	}
	return table.Flush()
}

// printable returns text for a terminal: upstreams sent some of it. What is empty becomes a dash, so that each row has all
// columns.
func printable(text string) string {
	if text == "" {
		return "-"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

func nodesTable(nodes []nodeState) [][]string {
	if len(nodes) == 0 {
		return nil
	}
	rows := [][]string{{"NAMESPACE", "ROLE", "NODE", "ADDRESS", "STATE", "REQUESTS", "VERSION", "ACTIVE", "QUEUED", "COMPLETED", "DISK FREE", "PROBLEM"}}
	for _, n := range nodes {
		info := systemInfo{}
		if n.SystemInfo != nil {
			info = *n.SystemInfo
		}
		rows = append(rows, []string{
			n.Namespace, n.Role, n.Node, n.Address, n.State, strconv.FormatInt(n.Questions, 10), info.Version,
			optionalNumber(info.Queue.Active, ""), optionalNumber(info.Queue.Queued, ""), optionalNumber(info.Queue.Completed, ""),
			optionalNumber(info.FreeDiskSpaceMB, " MB"), n.problems(),
		})
	}
	return rows
}

// problems returns the problem that a node has now, and its last problem if the code differs.
func (s *nodeState) problems() string {
	var problems []string
	if s.SystemInfoProblem != "" {
		problems = append(problems, s.SystemInfoProblem+" now")
	}
	if s.LastProblem != nil && s.LastProblem.Code != s.SystemInfoProblem {
		problems = append(problems, fmt.Sprintf("%s %s ago", s.LastProblem.Code, time.Since(s.LastProblem.At).Round(time.Second)))
	}
	return strings.Join(problems, ", ")
}

// optionalNumber returns a number with its unit, or nothing if it is not known.
func optionalNumber(n *int64, unit string) string {
	if n == nil {
		return ""
	}
	return strconv.FormatInt(*n, 10) + unit
}

func cacheTable(caches map[string]cacheStats) [][]string {
	if len(caches) == 0 {
		return nil
	}
	rows := [][]string{{"NAMESPACE", "MEMORY", "LIMIT", "ENTRIES", "EVICTIONS", "WAITING", "STORAGE", "QUEUED", "QUEUE SIZE", "PROBLEM"}}
	for _, namespace := range slices.Sorted(maps.Keys(caches)) {
		cache := caches[namespace]
		row := []string{
			namespace, bytesText(cache.Bytes), bytesText(cache.Limit), strconv.Itoa(cache.Entries),
			strconv.FormatUint(cache.Evictions, 10), strconv.FormatInt(cache.Waiters, 10), "", "", "", "",
		}
		if storage := cache.Storage; storage != nil {
			state := "works"
			if storage.Failing {
				state = "fails"
			}
			row = append(row[:6], storage.Module+" "+state, strconv.Itoa(storage.Queued), bytesText(int64(storage.QueuedBytes)), storage.Error)
		}
		rows = append(rows, row)
	}
	return rows
}

func pendingTable(all map[string][]pendingReport) [][]string {
	if len(all) == 0 {
		return nil
	}
	rows := [][]string{{"NAMESPACE", "CLIENT", "SUBMISSION", "NODE", "TASK", "AGE", "STATE", "QUESTIONS", "NOTED", "PROBLEM", "FILE"}}
	for _, namespace := range slices.Sorted(maps.Keys(all)) {
		for _, p := range all[namespace] {
			noted := "no"
			if p.Noted {
				noted = "yes"
			}
			rows = append(rows, []string{
				namespace, p.Client, p.SubmitID, p.Node, p.TaskID, (time.Duration(p.AgeSeconds) * time.Second).String(),
				p.State, strconv.Itoa(p.Questions), noted, p.LastProblem, p.Name,
			})
		}
	}
	return rows
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

// runPurge is `caddy fsbroker purge`.
func runPurge(c *invocation) error {
	query, err := purgeQuery(c.Flags)
	if err != nil {
		return err
	}
	var caches map[string]cacheStats
	if _, err := c.request(http.MethodGet, "/fsbroker/cache", &caches); err != nil {
		return err
	}
	if len(caches) == 0 {
		return c.errNotLoaded("fsbroker_task")
	}
	removed, err := c.purge(query)
	if err != nil && removed != (purged{}) {
		err = fmt.Errorf("%w (before that, %s)", err, removed)
	}
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return json.NewEncoder(c.out).Encode(removed)
	}
	_, err = fmt.Fprintln(c.out, removed)
	return err
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

// parameters returns the flags that are given as parameters of the admin API. An empty one is an error, which says what to do
// instead.
func parameters(fl caddycmd.Flags, flags []parameterFlag, instead string) (url.Values, error) {
	query := make(url.Values)
	for _, f := range flags {
		if !fl.Changed(f.name) {
			continue
		}
		value := fl.String(f.name)
		if value == "" {
			return nil, usageError{fmt.Errorf("--%s is empty: %s", f.name, instead)}
		}
		query.Set(f.parameter, value)
	}
	return query, nil
}

// String tells what was removed.
func (p purged) String() string {
	return fmt.Sprintf("removed %d from memory, %d from the queue, %d from the storage", p.Memory, p.Queue, p.Storage)
}

// purge purges step by step, and returns what was removed, even if a step fails.
func (c *invocation) purge(query url.Values) (sum purged, err error) {
	bar := newProgress(c.errOut)
	defer bar.end()
	for from := 0; ; {
		var step purged
		if _, err := c.request(http.MethodDelete, "/fsbroker/cache?"+query.Encode(), &step); err != nil {
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
	if !ok {
		return &progress{w: w}
	}
	info, err := file.Stat()
	return &progress{w: w, terminal: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

// show shows that a part of the whole is done. What cannot be shown does not end the purge.
func (p *progress) show(part float64, sum purged) {
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
