// Package cli is the command `caddy fsbroker`, a client of the module's endpoints of Caddy's admin API. It has their JSON
// types, which the module uses as well. The command is registered when the package is imported.
package cli

import (
	"errors"

	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
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
		}, show(NodesPath, "fsbroker_task", nodesTable)),
		adminCommand(&cobra.Command{
			Use:   "cache",
			Short: "Shows the memory and the storage queue of each namespace",
			Long: `
Shows how much memory the reports of each namespace use, and what is queued for
its storage.
`,
		}, show(CachePath, "fsbroker_task", cacheTable)),
		purgeCommand(),
		adminCommand(&cobra.Command{
			Use:   "harvest",
			Short: "Shows what is followed until its report is finished",
			Long: `
Shows the submissions and tasks that are followed, by namespace and client, the
oldest first. Each is "accepted" until an upstream has known it, then
"unfinished", and "finished" while its report is being stored.
`,
		}, show(HarvestPath, "fsbroker_task with harvest", pendingTable)),
		giveUpCommand(),
	)
}
