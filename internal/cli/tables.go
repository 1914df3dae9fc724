package cli

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/dustin/go-humanize"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/upstream"
)

// show returns a subcommand that shows what an endpoint returns, as a table or as JSON. The first row of the table is the
// header.
func show[T state](path, handler string, table func(T) [][]string) func(*invocation) error {
	return func(c *invocation) error {
		value, body, err := get[T](c, path, handler)
		if err != nil {
			return err
		}
		return c.print(body, tableText(table(value)))
	}
}

// tableText returns rows with aligned columns.
func tableText(rows [][]string) string {
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			cells[i] = printable(cell)
		}
		fmt.Fprintln(table, strings.Join(cells, "\t"))
	}
	_ = table.Flush() // nothing fails in memory
	return text.String()
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

func nodesTable(nodes []Node) [][]string {
	rows := [][]string{{"NAMESPACE", "ROLE", "NODE", "ADDRESS", "STATE", "REQUESTS", "VERSION", "ACTIVE", "QUEUED", "COMPLETED", "DISK FREE", "PROBLEM"}}
	for _, n := range nodes {
		info := cmp.Or(n.SystemInfo, new(upstream.SystemInfo))
		rows = append(rows, []string{
			n.Namespace, n.Role, n.Node, n.Address, n.State, strconv.FormatInt(n.Questions, 10), info.Version,
			optionalNumber(info.Queue.Active, ""), optionalNumber(info.Queue.Queued, ""), optionalNumber(info.Queue.Completed, ""),
			optionalNumber(info.FreeDiskSpaceMB, " MB"), n.problems(),
		})
	}
	return rows
}

// problems returns the problem that a node has now, and its last problem if the code differs.
func (s *Node) problems() string {
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

func cacheTable(caches map[string]Cache) [][]string {
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
			row = append(row[:6], storage.Module+" "+state, strconv.Itoa(storage.Queued), bytesText(int64(storage.QueuedBytes)),
				cmp.Or(storage.Error, strings.Join(storage.Warnings, "; ")))
		}
		rows = append(rows, row)
	}
	return rows
}

func pendingTable(all map[string][]Pending) [][]string {
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
