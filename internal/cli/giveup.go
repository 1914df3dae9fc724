package cli

import (
	"net/http"

	"github.com/spf13/cobra"
)

// giveUpFlags are the flags that say what to give up.
var giveUpFlags = []parameterFlag{
	{"submit-id", "submitID", "Give up this submission"},
	{"app-server-id", "appServerID", "With --task-id: give up a task of this node"},
	{"task-id", "taskID", "With --app-server-id: give up this task"},
}

func giveUpCommand() *cobra.Command {
	return adminCommand(&cobra.Command{
		Use:   "give-up {--submit-id <value> | --app-server-id <value> --task-id <value>}",
		Short: "Ends the following of a submission or a task",
		Long: `
Ends the following of a submission or a task, in all namespaces. Its report is
not fetched any longer unless somebody asks for it.
`,
		Example: `  caddy fsbroker give-up --submit-id 7f6c5a0e
  caddy fsbroker give-up --app-server-id node-1 --task-id 42`,
	}, runGiveUp, giveUpFlags...)
}

// runGiveUp is `caddy fsbroker give-up`.
func runGiveUp(c *invocation) error {
	query, err := parameters(c.Flags, giveUpFlags, "give it a value")
	if err != nil {
		return err
	}
	var done GivenUp
	body, err := c.request(http.MethodDelete, HarvestPath+"?"+query.Encode(), &done)
	if err != nil {
		return err
	}
	return c.print(body, "given up\n")
}
