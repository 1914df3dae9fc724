package examples_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
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
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s.add("caddy", fmt.Sprintf(`%s=1 exec '%s' "$@"`, beCaddy, self))
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
	command := exec.CommandContext(s.t.Context(), "sh", "-euc", commands)
	command.Dir = s.home
	command.Env = append([]string{"PATH=" + s.bin + string(os.PathListSeparator) + os.Getenv("PATH"), "HOME=" + s.home}, s.env...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.Output()
	if err != nil {
		s.t.Fatalf("%s: %v: %s", commands, err, &stderr)
	}
	return string(stdout)
}
