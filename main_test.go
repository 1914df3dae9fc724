package fsbroker_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/certmagic"
	"go.uber.org/goleak"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/testenv"
)

// beCaddy is the environment variable that makes this test binary a Caddy with the module. Tests with more than one
// process use it.
const beCaddy = "FSBROKER_TEST_BE_CADDY"

// shards is the number of processes that run the tests. Most tests wait for a Caddy, and a process can run one.
const shards = 4

// TestMain runs the tests in several processes, unless a flag selects tests or asks for what only one process can give.
func TestMain(m *testing.M) {
	if os.Getenv(beCaddy) != "" {
		caddycmd.Main()
		return
	}
	flag.Parse()
	if inOneProcess() {
		runTests(m)
	} else if err := runShards(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// inOneProcess reports whether a flag is set that needs all tests in one process.
func inOneProcess() (needed bool) {
	flag.Visit(func(f *flag.Flag) {
		needed = needed || slices.Contains([]string{
			"run", "skip", "bench", "list", "fuzz",
			"cpuprofile", "memprofile", "blockprofile", "mutexprofile", "trace", "coverprofile", "gocoverdir",
		}, strings.TrimPrefix(f.Name, "test."))
	})
	return needed
}

// runShards runs each shard of the tests in a process with the flags of this one. It prints what a process has printed when
// that ends.
func runShards() error {
	names, err := exec.Command(os.Args[0], "-test.list", "^(Test|Fuzz|Example)").Output()
	if err != nil {
		return fmt.Errorf("listing the tests: %w", err)
	}
	tests := make([][]string, shards)
	for i, name := range slices.Sorted(strings.FieldsSeq(string(names))) {
		tests[i%shards] = append(tests[i%shards], name)
	}
	// The log of what the tests have read, for the cache of results, cannot be shared. Without it, results are not cached.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool { return strings.HasPrefix(arg, "-test.testlogfile=") })
	var mu sync.Mutex // guards failed and the output
	var failed error
	var running sync.WaitGroup
	for _, names := range tests {
		running.Go(func() {
			var output bytes.Buffer
			shard := exec.Command(os.Args[0], append([]string{"-test.run=^(" + strings.Join(names, "|") + ")$"}, args...)...)
			shard.Stdout, shard.Stderr = &output, &output
			err := shard.Run()
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = fmt.Errorf("a process of the tests: %w", err)
			}
			if err != nil || testing.Verbose() {
				_, _ = output.WriteTo(os.Stdout)
			}
		})
	}
	running.Wait()
	return failed
}

// runTests runs the tests in this process, which has its own home directory and secrets.
func runTests(m *testing.M) {
	home, err := os.MkdirTemp("", "fsbroker-test") // has the instance's name and locks
	if err != nil {
		panic(err)
	}
	for _, variable := range append(testenv.Home(home), "CALLER_SECRET="+callerSecret, "NODE_SECRET="+nodeSecret, "BROKER_SECRET="+brokerSecret) {
		name, value, _ := strings.Cut(variable, "=")
		if err := os.Setenv(name, value); err != nil {
			panic(err)
		}
	}
	// Caddy has read the environment already.
	caddy.ConfigAutosavePath = filepath.Join(home, "autosave.json")
	caddy.DefaultStorage = &certmagic.FileStorage{Path: home}
	if err := caddy.Load([]byte("{"+quiet+"}"), true); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m,
		goleak.Cleanup(func(code int) {
			_ = os.RemoveAll(home)
			os.Exit(code)
		}),
		// Caddy and its libraries start these once in a process.
		goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2.trapSignalsCrossPlatform.func1"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*Cache).maintainAssets"),
		goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
	)
}

// caddyEnv returns the environment of a process that is a Caddy whose home is a folder.
func caddyEnv(home string) []string {
	return append(append(os.Environ(), testenv.Home(home)...), beCaddy+"=1")
}

// quiet are members of a JSON configuration without the admin API and without a log, which is not kept.
const quiet = `
	"admin": {"disabled": true, "config": {"persist": false}},
	"logging": {"logs": {"default": {"writer": {"output": "discard"}}}}
`
