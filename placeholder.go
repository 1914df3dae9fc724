package fsbroker

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/caddyserver/caddy/v2"
)

// sourcePlaceholder matches the placeholder of an environment variable or of a file.
var sourcePlaceholder = regexp.MustCompile(`\{(env|file)\.([^{}]+)\}`)

// replacePlaceholders replaces the placeholders in an option. Its error tells apart why one has no value. It names the
// placeholder.
func replacePlaceholders(repl *caddy.Replacer, text string) (string, error) {
	value, err := repl.ReplaceOrErr(text, true, true)
	if err == nil {
		return value, nil
	}
	for _, match := range sourcePlaceholder.FindAllStringSubmatch(text, -1) {
		explain := explainVariable
		if match[1] == "file" {
			explain = explainFile
		}
		if why := explain(match[2]); why != nil {
			return "", fmt.Errorf("%s has no value: %w", match[0], why)
		}
	}
	return "", err
}

// explainVariable returns why an environment variable has no value, or nil if it has one.
func explainVariable(name string) error {
	switch value, ok := os.LookupEnv(name); {
	case !ok:
		return errors.New("the environment variable is not set: set it for the process that runs Caddy, as a service has an environment of its own")
	case value == "":
		return errors.New("the environment variable is set, but empty")
	}
	return nil
}

// explainFile returns why a file has no value, or nil if it has one.
func explainFile(name string) error {
	text, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if absolute, err := filepath.Abs(name); err == nil && absolute != name {
			return fmt.Errorf("there is no such file: Caddy looked for %s", absolute)
		}
		return errors.New("there is no such file")
	case errors.Is(err, fs.ErrPermission):
		return errors.New("the user that runs Caddy may not read the file")
	case err != nil:
		return err
	case len(text) == 0:
		return errors.New("the file is empty")
	case len(bytes.TrimRight(text, "\r\n")) == 0:
		return errors.New("the file has nothing but a line break")
	}
	return nil
}
