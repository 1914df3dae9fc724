#!/usr/bin/env bash
# go-redis, a cluster: DBSIZE asks all masters, but KEYS, SCAN and FLUSHDB only reach one of them.
#
# What one expects: either the client hides that there are several masters, or it does not. It sends DBSIZE to all of them and
# returns the sum, so FLUSHDB empties all of them. Redis itself says so: the request policy of both is "all_shards".
#
# What happens: ClusterClient sends KEYS, SCAN and FLUSHDB to one master, not always the same. There is no error. With three
# masters, KEYS and SCAN find a third of the keys, and FLUSHDB deletes a third. In a pipeline, DBSIZE also counts one master only.
#
# Why it matters: "delete everything" succeeds and leaves two thirds of the reports. A check with SCAN may ask the one master that
# is empty. Use ForEachMaster for all of these.
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

	"github.com/redis/go-redis/v9"
)

const keys = 300

func main() {
	ctx := context.Background()
	c := redis.NewClusterClient(&redis.ClusterOptions{Addrs: os.Args[1:]})
	for i := range keys {
		if err := c.Set(ctx, fmt.Sprint("report-", i), "x", 0).Err(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	seen := true
	check := func(what string, got int64, all bool, err error) {
		fmt.Printf("%-24s %3d of %d keys, error %v\n", what, got, keys, err)
		seen = seen && err == nil && (got == keys) == all && got > 0
	}

	n, err := c.DBSize(ctx).Result()
	check("DBSIZE counts", n, true, err)
	found, err := c.Keys(ctx, "*").Result()
	check("KEYS finds", int64(len(found)), false, err)
	var scanned int64
	all := c.Scan(ctx, 0, "*", 1000).Iterator()
	for all.Next(ctx) {
		scanned++
	}
	check("SCAN finds", scanned, false, all.Err())
	var size *redis.IntCmd
	_, err = c.Pipelined(ctx, func(p redis.Pipeliner) error { size = p.DBSize(ctx); return nil })
	check("pipelined DBSIZE counts", size.Val(), false, err)
	err = c.FlushDB(ctx).Err()
	left := c.DBSize(ctx).Val()
	check("FLUSHDB leaves", left, false, err)

	if !seen {
		fmt.Println("this is not what the script states")
		os.Exit(1)
	}
}
GO
go mod init finding 2>/dev/null
go get github.com/redis/go-redis/v9@v9.23.0 2>/dev/null
go build -mod=mod -o finding .

# A node of a cluster also listens on its port + 10000. Clients get ports from 32768 on.
first=$((11000 + RANDOM % 11000))
nodes=()
for port in $first $((first + 1)) $((first + 2)); do
	mkdir "$port"
	redis-server --port "$port" --bind 127.0.0.1 --cluster-enabled yes --save '' --dir "$tmp/$port" >"$port/log" &
	nodes+=("127.0.0.1:$port")
	timeout 20 bash -c "until redis-cli -p $port ping 2>/dev/null; do sleep 0.1; done" >/dev/null
done
redis-cli --cluster create "${nodes[@]}" --cluster-yes >create.log
for node in "${nodes[@]}"; do
	timeout 30 bash -c "until redis-cli -p ${node#*:} cluster info | grep -q cluster_state:ok; do sleep 0.1; done"
done

go list -m github.com/redis/go-redis/v9
redis-server --version
for command in dbsize keys flushdb; do
	echo "Redis about $command: $(redis-cli -p "$first" command info "$command" | grep request_policy)"
done
timeout 60 ./finding "${nodes[@]}"
