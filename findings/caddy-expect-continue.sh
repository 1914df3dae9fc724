#!/usr/bin/env bash
# Caddy 2.11.9: a client that asks before it uploads (Expect: 100-continue) gets no answer, neither "go on" nor the refusal.
#
# What one expects: Go's server answers at once when a handler refuses a request without reading its body. It never asks for the
# body, so the client sends nothing. That is what Expect is for (RFC 9110 section 10.1.1).
#
# What happens: Caddy replaces the request's body by a reader with an idle timeout, which is on by default. Go's server does not
# know that reader, so it takes the body for one that is under way, and reads up to 256 KiB of it before it sends the response.
# The client waits for the server and the server for the client, for up to a minute. curl and Go's client give up waiting after a
# second and upload. `read_body_idle -1s` turns the reader off, and the refusal comes at once.
#
# Why it matters: an upload service refuses with 401, 403 or 413 before it reads anything, and clients send Expect with large
# files because of that. Those that wait for an answer seem to hang, and the others upload what is thrown away. A handler that
# is to refuse at once must be tested inside Caddy.
set -euo pipefail

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$tmp"' EXIT
command -v curl >/dev/null || { apt-get update -qq && apt-get install -qq -y curl; } >&2

unlike_stated() {
	echo "this is not what the script states"
	exit 1
}

cd "$tmp"
export XDG_CONFIG_HOME=$tmp XDG_DATA_HOME=$tmp
GOBIN=$tmp go install github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.9 2>/dev/null
head -c 1M /dev/zero >report
wait=3 # how many seconds curl waits for an answer before it uploads

# start NAME OPTIONS starts a Caddy that refuses everything.
start() {
	cat >"$1.Caddyfile" <<-CADDY
		{
			admin off
			servers {
				timeouts {
					$2
				}
			}
		}
		http:// {
			bind unix/$tmp/$1.sock
			respond 413
		}
	CADDY
	./caddy run --config "$1.Caddyfile" >"$1.log" 2>&1 &
	for _ in {1..100}; do [[ -S $1.sock ]] && break || sleep 0.1; done
}

# upload NAME SECONDS uploads the report to a Caddy and prints the status, the bytes that were sent, and the whole seconds.
upload() {
	curl --silent --max-time 60 --unix-socket "$1.sock" --header 'Expect: 100-continue' \
		--expect100-timeout "$2" --upload-file report --output /dev/null \
		--write-out '%{http_code} %{size_upload} %{time_total}\n' http://localhost/ | cut -d . -f 1
}

start default ""
start off "read_body_idle -1s"
go version -m caddy | grep -w mod
curl --version | head -n 1
read -r status sent seconds < <(upload off $wait)
echo "without the idle timeout: status $status, $sent bytes sent, after $seconds s"
[[ $status == 413 && $sent == 0 ]] || unlike_stated
read -r status sent seconds < <(upload default $wait)
echo "with it, as by default:   status $status, $sent bytes sent, after $seconds s"
[[ $status == 413 && $sent -gt 262144 && $seconds -ge $wait ]] || unlike_stated
