#!/usr/bin/env bash
# PostgreSQL with pgx: DETACH PARTITION … CONCURRENTLY as the first statement of a batch survives a later failure, half done.
#
# What one expects: PostgreSQL refuses the statement inside a transaction, and the statements of a pgx.Batch are one implicit
# transaction: if one fails, all are undone. So the statement is refused in a batch, as it is after BEGIN, or it is undone.
#
# What happens: it is refused anywhere in a batch but in first place. There it commits its first half, and the second half is
# undone with the batch: the partition is "pending detach". Its rows are gone from the parent table, the table still belongs to
# it, and no other partition can be detached concurrently until this one is, with FINALIZE. The error is that of the other
# statement.
#
# Why it matters: a job that detaches an old partition and records that in one batch loses sight of reports when only the second
# statement fails, and fails each time from then on. The statement must be executed alone, and the job must finish first what
# pg_inherits.inhdetachpending shows.
set -euo pipefail

tmp=$(mktemp -d)
bin=/usr/lib/postgresql/15/bin
[[ -x $bin/initdb ]] || { apt-get update -qq && apt-get install -qq -y postgresql-15; } >&2
server() { "$@"; }
if [[ $(id -u) == 0 ]]; then # which PostgreSQL refuses to run as
	server() { runuser -u postgres -- "$@"; }
	chown postgres "$tmp"
fi
trap 'server $bin/pg_ctl -D "$tmp/data" -m immediate stop >/dev/null || true; rm -rf "$tmp"' EXIT

cd "$tmp"
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/jackc/pgx/v5"
)

func main() {
	ctx := context.Background()
	c, err := pgx.Connect(ctx, os.Args[1])
	if err != nil {
		panic(err)
	}
	// exec executes statements in one batch.
	exec := func(statements ...string) error {
		var batch pgx.Batch
		for _, s := range statements {
			batch.Queue(s)
		}
		err := c.SendBatch(ctx, &batch).Close()
		fmt.Printf("%q: %v\n", statements, err)
		return err
	}
	count := func(what string) (n int) {
		if err := c.QueryRow(ctx, "SELECT count(*) FROM "+what).Scan(&n); err != nil {
			panic(err)
		}
		fmt.Println(n, "in", what)
		return n
	}
	const pending = "pg_inherits WHERE inhdetachpending"
	_, err = c.Exec(ctx, `
		CREATE TABLE reports (month int) PARTITION BY LIST (month);
		CREATE TABLE january PARTITION OF reports FOR VALUES IN (1);
		CREATE TABLE february PARTITION OF reports FOR VALUES IN (2);
		INSERT INTO reports VALUES (1), (2)`)
	const january, february = "ALTER TABLE reports DETACH PARTITION january ", "ALTER TABLE reports DETACH PARTITION february "

	seen := err == nil && exec("SELECT 1", january+"CONCURRENTLY") != nil && count("reports") == 2 && count(pending) == 0
	seen = seen && exec(january+"CONCURRENTLY", "SELECT 1 / 0") != nil && count("reports") == 1 && count(pending) == 1
	seen = seen && exec(february+"CONCURRENTLY") != nil
	seen = seen && exec(january+"FINALIZE") == nil && exec(february+"CONCURRENTLY") == nil
	if !seen {
		fmt.Println("this is not what the script states")
		os.Exit(1)
	}
}
GO
go mod init finding 2>/dev/null
go get github.com/jackc/pgx/v5@v5.13.0 2>/dev/null
go build -mod=mod -o finding .

server $bin/initdb -D "$tmp/data" -U postgres --auth trust >initdb.log
server $bin/pg_ctl -D "$tmp/data" -l "$tmp/data/log" -w -t 60 -o "-c listen_addresses= -k $tmp" start >start.log

go list -m github.com/jackc/pgx/v5
$bin/postgres --version
timeout 60 ./finding "host=$tmp user=postgres"
