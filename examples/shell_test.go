package examples_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// shell runs commands of the READMEs.
type shell struct {
	t         *testing.T
	bin, home string   // folders
	env       []string // additional environment variables
}

// newShell returns a shell in which this test binary is caddy.
func newShell(t *testing.T, env ...string) shell {
	t.Helper()
	s := shell{t, t.TempDir(), t.TempDir(), env}
	s.add("caddy", fmt.Sprintf(`%s=1 exec '%s' "$@"`, beCaddy, self(t)))
	return s
}

// add adds a program.
func (s shell) add(name, script string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		s.t.Fatal(err)
	}
}

// run runs commands, which must succeed, and returns their output.
func (s shell) run(commands string) (output string) {
	s.t.Helper()
	command := programCommand(s.t, "sh", "-euc", commands)
	command.Dir = s.home
	path := "PATH=" + s.bin + string(os.PathListSeparator) + os.Getenv("PATH")
	command.Env = slices.Concat([]string{path}, testenv.Home(s.home), s.env)
	return string(outputOf(s.t, command))
}
