#!/usr/bin/env bash
# caddy-storage-redis 1.8.1: Load says that a value does not exist when Redis is away, or when the caller's context has ended.
#
# What one expects: certmagic's Storage says that Load returns fs.ErrNotExist if the key does not exist. If the server cannot be
# asked, it is another error, which the caller may retry. List of this module does so.
#
# What happens: Load and Stat return fs.ErrNotExist for every failure, such as a refused connection. The value is found again
# when Redis is back.
#
# Why it matters: to callers, fs.ErrNotExist means "make a new one". A cache of reports says that there is none, or asks for it
# again, and what keeps keys there makes new ones. A caller that has to tell the two apart can only call List too, which fails.
set -euo pipefail

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$tmp"' EXIT
command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -qq -y redis-server; } >&2

cd "$tmp"
cat >main.go <<'GO'
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/pberkel/caddy-storage-redis"
)

func main() {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	module := storageredis.New()
	module.Address = []string{"127.0.0.1:" + os.Args[1]}
	err := module.Provision(ctx)
	if err == nil {
		err = module.Store(ctx, "reports/1", []byte("a report"))
	}
	seen := err == nil
	// load reports whether the value is said not to exist.
	load := func(ctx context.Context, when string) bool {
		value, err := module.Load(ctx, "reports/1")
		fmt.Printf("Load %-25s %q, error: %v\n", when+":", value, err)
		return errors.Is(err, fs.ErrNotExist)
	}

	seen = seen && !load(ctx, "while Redis is there")
	ended, end := context.WithCancel(ctx)
	end()
	seen = seen && load(ended, "with an ended context")

	_ = exec.Command("redis-cli", "-p", os.Args[1], "shutdown").Run()
	seen = seen && load(ctx, "while Redis is away")
	_, err = module.List(ctx, "reports", true)
	fmt.Println("List while Redis is away: error:", err)
	seen = seen && err != nil && !errors.Is(err, fs.ErrNotExist)

	again := exec.Command("redis-server", "--port", os.Args[1], "--bind", "127.0.0.1") // in the folder with what was stored
	err = again.Start()
	for exec.Command("redis-cli", "-p", os.Args[1], "ping").Run() != nil && err == nil {
		time.Sleep(100 * time.Millisecond)
	}
	seen = seen && err == nil && !load(ctx, "when Redis is back")
	_ = exec.Command("redis-cli", "-p", os.Args[1], "shutdown", "nosave").Run()
	_ = again.Wait()
	if !seen {
		fmt.Println("this is not what the script states")
		os.Exit(1)
	}
}
GO
go mod init finding 2>/dev/null
go get github.com/pberkel/caddy-storage-redis@v1.8.1 github.com/caddyserver/caddy/v2@v2.11.9 2>/dev/null
go build -mod=mod -o finding .

port=$((11000 + RANDOM % 11000)) # clients get ports from 32768 on
redis-server --port "$port" --bind 127.0.0.1 --save 3600 1 --dir "$tmp" >redis.log &
timeout 20 bash -c "until redis-cli -p $port ping 2>/dev/null; do sleep 0.1; done" >/dev/null

go list -m github.com/pberkel/caddy-storage-redis github.com/caddyserver/caddy/v2
redis-server --version
timeout 60 ./finding "$port" 2>/dev/null
