#!/usr/bin/env bash
# go-redis: Set with a time to live that is over already keeps the value for ever.
#
# What one expects: a value that is to live until a moment that has passed is not stored, or expires at once. Or Redis refuses
# it, as it refuses `SET key value PX -1`.
#
# What happens: Set leaves a negative time to live out of the command. There is no error, and the value never expires. The
# client's other methods do something else with the same duration: Redis refuses what SetNX sends, and Expire deletes the value.
#
# Why it matters: the usual code is Set(ctx, key, report, time.Until(deadline)). It is right for all reports but those whose
# retention ends while they wait to be stored. These stay when all others are gone, and nothing ever deletes them. A caller
# must look at the duration itself, and store nothing if it is not positive.
set -euo pipefail

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$tmp"' EXIT
command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -qq -y redis-server; } >&2

cd "$tmp"
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/redis/go-redis/v9"
)

func main() {
	ctx := context.Background()
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: os.Args[1]})
	over := time.Until(time.Now().Add(-time.Minute)).Round(time.Second)

	setErr := c.Set(ctx, "set", "report", over).Err()
	left := c.PTTL(ctx, "set").Val() // -1: for ever, -2: there is no value
	fmt.Printf("Set for %s:    error %v, then PTTL is %d\n", over, setErr, left)

	setNXErr := c.SetNX(ctx, "setnx", "report", over).Err()
	refused := c.Exists(ctx, "setnx").Val() == 0
	fmt.Printf("SetNX for %s:  error %v, then there is no value: %v\n", over, setNXErr, refused)

	expireErr := c.Expire(ctx, "set", over).Err()
	deleted := c.Exists(ctx, "set").Val() == 0
	fmt.Printf("Expire in %s:  error %v, then there is no value: %v\n", over, expireErr, deleted)

	if setErr != nil || left != -1 || setNXErr == nil || !refused || expireErr != nil || !deleted {
		fmt.Println("this is not what the script states")
		os.Exit(1)
	}
}
GO
go mod init finding 2>/dev/null
go get github.com/redis/go-redis/v9@v9.23.0 2>/dev/null
go build -mod=mod -o finding .

redis-server --port 0 --unixsocket "$tmp/redis.sock" --save '' --dir "$tmp" >redis.log &
for _ in {1..100}; do [[ -S redis.sock ]] && break || sleep 0.1; done

go list -m github.com/redis/go-redis/v9
redis-server --version
timeout 60 ./finding "$tmp/redis.sock"
