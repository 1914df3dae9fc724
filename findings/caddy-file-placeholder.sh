#!/usr/bin/env bash
# Caddy 2.11.9: the placeholder {file.…} ends after 1 MiB, and the response is a complete 200.
#
# What one expects: `respond "{file./path/report.json}"` sends the whole file, as `file_server` does. If a placeholder cannot be
# that long, the request fails, or the log says so.
#
# What happens: the first 1,048,576 bytes are sent with status 200 and a proper end. Nothing is logged, not even at DEBUG.
#
# Why it matters: a report below 1 MiB is right in each test, and a larger one is JSON that ends in the middle. The client sees no
# error until it parses it, and a cache in front keeps it. file_server has no limit, nor has readFile in a template.
set -euo pipefail

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$tmp"' EXIT
command -v curl >/dev/null || { apt-get update -qq && apt-get install -qq -y curl; } >&2

cd "$tmp"
export XDG_CONFIG_HOME=$tmp XDG_DATA_HOME=$tmp
GOBIN=$tmp go install github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.9 2>/dev/null
head -c 3M /dev/zero >report
echo '{{readFile "report"}}' >template.html
cat >Caddyfile <<CADDY
{
	admin off
	debug
}
http:// {
	bind unix/$tmp/site.sock
	root $tmp
	respond /respond "{file.$tmp/report}"
	templates
	file_server
}
CADDY
./caddy run --config Caddyfile >log 2>&1 &
for _ in {1..100}; do [[ -S site.sock ]] && break || sleep 0.1; done

# get PATH WANTED requests a path, and prints its status, its size, and how curl ends.
get() {
	local result=0 seen
	curl --silent --max-time 20 --unix-socket site.sock --output body \
		--write-out '%{http_code}' "http://localhost/$1" >status || result=$?
	seen="$(<status), $(wc -c <body) bytes, curl ends with $result"
	echo "$1: $seen"
	[[ $seen == "$2" ]] || { echo "this is not what the script states"; exit 1; }
}

go version -m caddy | grep -w mod
get report '200, 3145728 bytes, curl ends with 0'
get template.html '200, 3145729 bytes, curl ends with 0'
grep -q '"filename":"[^"]*/report"' log || { echo "the log is not at level DEBUG"; exit 1; }
before=$(grep -c /report log)
get respond '200, 1048576 bytes, curl ends with 0'
after=$(grep -c /report log)
echo "lines in the log about the file: $before before, $after after"
[[ $before == "$after" ]] || { echo "this is not what the script states"; exit 1; }
