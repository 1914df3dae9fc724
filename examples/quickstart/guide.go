package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// guide prints what happens, and the commands to paste next. Each command is one line with double quotes, without
// variables or other substitutions. So it means the same in POSIX shells, in PowerShell and in cmd.exe.
type guide struct {
	out             io.Writer
	dir             string
	site, authority string // the site's URL, and the certificate of its authority
	curl            string // the beginning of each command
}

// newGuide returns a guide whose commands read their options from a file in dir. That keeps the commands short, and the
// secret out of the shell's history.
func newGuide(out io.Writer, dir string, port int, secret string) (*guide, error) {
	g := &guide{
		out: out, dir: dir,
		site:      fmt.Sprintf("https://localhost:%d", port),
		authority: filepath.Join(dir, "pki", "authorities", "local", "root.crt"),
	}
	config := filepath.Join(dir, "curl.conf")
	g.curl = fmt.Sprintf(`curl -K "%s"`, config)
	if runtime.GOOS == "windows" {
		g.curl = fmt.Sprintf(`curl.exe -K "%s"`, config) // curl is another program in PowerShell
	}
	// The authority publishes no list of revoked certificates. Without ssl-no-revoke, curl on Windows insists on one.
	return g, os.WriteFile(config, fmt.Appendf(nil, `silent
show-error
cacert = "%s"
ssl-no-revoke
noproxy = "localhost"
write-out = "\n"
header = "Authorization: Bearer %s"
`, filepath.ToSlash(g.authority), secret), 0o600)
}

// started prints the command that submits a file.
func (g *guide) started(file string) {
	fmt.Fprintf(g.out, `
Caddy serves %[1]s/ in front of an example broker and two example nodes. Open it in a browser to see what there
is: the browser warns of the certificate, which comes from an authority that exists only for this run.
The access log is %[2]s. Press Ctrl-C to stop.

Submit a file, this one or another. Paste the command into another shell:

%[3]s -F "file=@%[4]s" "%[1]s/submit"

`, g.site, filepath.Join(g.dir, "access.log"), g.curl, file)
}

// dispatched prints the command that waits for the report of a submission.
func (g *guide) dispatched(submitID string, analysis, forget time.Duration) {
	fmt.Fprintf(g.out, `A node analyzes submission %[1]s, which takes %[2]s. Wait for its report, 60 seconds at most. Or do nothing:
the report is kept all the same.

%[3]s -i "%[4]s/task?submitID=%[1]s&wait=60"

The verdict is always UNKNOWN: the example nodes do not look for malware. The node deletes the task %[5]s after the analysis.

`, submitID, analysis, g.curl, g.site, forget)
}

// deleted prints the commands that ask for the report of a task that the node has deleted.
func (g *guide) deleted(submitID string) {
	fmt.Fprintf(g.out, `The node has deleted the task of submission %[1]s. Its report is kept, whether you have asked for it or not
("Cache-Status: fsbroker; hit"). With nocache=true, the request bypasses the cache, and the response is 404:

%[2]s -i "%[3]s/task?submitID=%[1]s"
%[2]s -i "%[3]s/task?submitID=%[1]s&nocache=true"

`, submitID, g.curl, g.site)
}

// sample returns the path of a file to submit: a common program if there is one, or else the Caddyfile.
func sample(dir string) (string, error) {
	for _, name := range []string{"/bin/ls", os.Getenv("ComSpec")} {
		//nolint:gosec // the user who sets the variable also runs this program
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			return name, nil
		}
	}
	name := filepath.Join(dir, "Caddyfile")
	return name, os.WriteFile(name, caddyfile, 0o600)
}
