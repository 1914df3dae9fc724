#!/usr/bin/env bash
# jsontext (the base of encoding/json/v2): skipping a string of 60 MiB takes 256 MiB of memory.
#
# What one expects: a Decoder on an io.Reader works in a small buffer. SkipValue keeps nothing of a value, however long it is.
#
# What happens: it is so for an array: one of 60 MiB is skipped in less than 1 MiB. But a string is read into the buffer as a
# whole, even by SkipValue, and the buffer doubles until the string fits.
#
# Why it matters: reports hold files as base64. A service that reads a few fields of a large document token by token, to save
# memory, needs up to four times the length of its longest string, for each document that it reads at the same time. It takes a
# reader in front that shortens long strings.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

cd "$tmp"
cat >main.go <<'GO'
package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

const mib = 1 << 20

// endless reads a text again and again.
type endless string

func (e endless) Read(b []byte) (n int, err error) {
	for len(b)-n >= len(e) {
		n += copy(b[n:], e)
	}
	return n, nil
}

// skip skips a value that begins and ends with these, and has 60 MiB of a text in between. It returns the MiB of memory that the
// program got from the system for that.
func skip(begin, text, end string) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d := jsontext.NewDecoder(io.MultiReader(strings.NewReader(begin), io.LimitReader(endless(text), 60*mib), strings.NewReader(end)))
	if err := d.SkipValue(); err != nil {
		panic(err)
	}
	runtime.ReadMemStats(&after)
	return (after.Sys - before.Sys) / mib
}

func main() {
	array := skip("[", "10, ", "0]")
	fmt.Println("MiB of memory to skip an array of 60 MiB: ", array)
	text := skip(`"`, "AAAA", `"`)
	fmt.Println("MiB of memory to skip a string of 60 MiB: ", text)
	if array > 10 || text < 180 {
		fmt.Println("this is not what the script states")
		os.Exit(1)
	}
}
GO
go mod init finding 2>/dev/null
go get github.com/go-json-experiment/json@v1.27.2 2>/dev/null
go build -mod=mod -o finding .

go version
go list -m github.com/go-json-experiment/json
timeout 60 ./finding
