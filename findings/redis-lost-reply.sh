#!/usr/bin/env bash
# go-redis: a command whose reply was lost is sent again, so it is carried out twice, and the caller gets no error.
#
# What one expects: if the connection ends after a command was sent, the caller gets an error. Or the client repeats only what
# is safe to repeat, such as GET.
#
# What happens: the client also repeats commands that write, up to 3 times, and returns the reply to the last. INCR counts twice.
# SETNX says false, although this very call has set the key. Transactions are not repeated, and return EOF, although Redis has
# carried them out.
#
# Why it matters: SETNX takes locks. Here, the instance that holds the lock is told that another one does, so no instance does
# the work until the lock expires. With MaxRetries: -1 (0 means 3), the caller gets the error. If the value is one that only this
# caller can have written, reading it shows whether the lock is its own.
set -euo pipefail

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$tmp"' EXIT
command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -qq -y redis-server; } >&2

cd "$tmp"
cat >main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"

	"github.com/redis/go-redis/v9"
)

var losing atomic.Bool // whether the reply to the next command that names "key" is lost

// pass passes on what is sent between a client and Redis, until a reply is lost.
func pass(client, server net.Conn) {
	var lost atomic.Bool
	copy := func(to, from net.Conn, isRequest bool) {
		defer client.Close()
		defer server.Close()
		for b := make([]byte, 1<<16); ; {
			n, err := from.Read(b)
			if isRequest && bytes.Contains(b[:n], []byte("key")) && losing.CompareAndSwap(true, false) {
				lost.Store(true)
			}
			if err != nil || !isRequest && lost.Load() {
				return
			}
			_, _ = to.Write(b[:n])
		}
	}
	go copy(server, client, true)
	go copy(client, server, false)
}

func main() {
	ctx := context.Background()
	direct := redis.NewClient(&redis.Options{Network: "unix", Addr: os.Args[1]})
	c := redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) {
		server, err := net.Dial("unix", os.Args[1])
		client, proxied := net.Pipe()
		if err == nil {
			pass(proxied, server)
		}
		return client, err
	}})

	losing.Store(true)
	n, incrErr := c.Incr(ctx, "key").Result()
	fmt.Println("INCR of 0:          ", n, incrErr)

	direct.Del(ctx, "key")
	losing.Store(true)
	ok, setErr := c.SetNX(ctx, "key", "mine", 0).Result()
	value := direct.Get(ctx, "key").Val()
	fmt.Println("SETNX of a new key: ", ok, setErr, "- its value is", value)

	direct.Del(ctx, "key")
	losing.Store(true)
	_, txErr := c.TxPipelined(ctx, func(p redis.Pipeliner) error { return p.Incr(ctx, "key").Err() })
	counted := direct.Get(ctx, "key").Val()
	fmt.Println("INCR in MULTI, EXEC:", txErr, "- its value is", counted)

	if n != 2 || incrErr != nil || ok || setErr != nil || value != "mine" || !errors.Is(txErr, io.EOF) || counted != "1" {
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
