package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

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

// invocation is one run of a subcommand.
type invocation struct {
	caddycmd.Flags
	address     string // of the admin API
	out, errOut io.Writer
}

// adminCommand completes a subcommand that uses the admin API, with the flags that it has besides those of all.
func adminCommand(cmd *cobra.Command, run func(*invocation) error, flags ...parameterFlag) *cobra.Command {
	cmd.Long += addressHelp + exitCodesHelp
	cmd.Args = noArguments
	cmd.Flags().StringP("config", "c", "", "Configuration file that says where the admin API is")
	cmd.Flags().StringP("adapter", "a", "", "Name of config adapter to apply")
	cmd.Flags().String("address", "", "Address of the administration listener, if different from config")
	cmd.Flags().Bool("json", false, "Print the answer in JSON format, as the admin API returns it")
	for _, f := range flags {
		cmd.Flags().String(f.name, "", f.usage)
	}
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

// parameterFlag is a flag that becomes a parameter of the admin API.
type parameterFlag struct{ name, parameter, usage string }

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

// state is what an endpoint returns. It is empty if there is no handler of a kind.
type state interface {
	[]Node | map[string]Cache | map[string][]Pending
}

// get requests what an endpoint returns. It is an error if there is no handler of a kind.
func get[T state](c *invocation, path, handler string) (value T, body []byte, err error) {
	body, err = c.request(http.MethodGet, path, &value)
	if err == nil && len(value) == 0 {
		err = fmt.Errorf("no %s is loaded in Caddy at %s: load a config that has one, or give the --address of another Caddy", handler, c.address)
	}
	return value, body, err
}

// print prints an answer: the JSON with --json, or else the text.
func (c *invocation) print(body []byte, text string) error {
	if c.Bool("json") {
		text = string(body)
	}
	_, err := io.WriteString(c.out, text)
	return err
}
