#!/usr/bin/env bash
# Caddy 2.11.9: `intercept` with `respond` sends the new body with the Content-Length of the response that it replaces.
#
# What one expects: handle_response of `intercept` replaces a response, as handle_response of `reverse_proxy` does. Its examples
# are for this: the 404 of another handler becomes a text of one's own.
#
# What happens: the header of the first response is kept, with its Content-Length. If the new body is longer, not one byte of it
# is sent. If it is shorter, the client waits for the rest, and the connection is closed. The same lines in `reverse_proxy` do
# what one expects. With `header -Content-Length` beside `respond`, `intercept` does as well.
#
# Why it matters: the status is right, and a test whose first response has no Content-Length passes. Behind another server, which
# sends one, a client gets an error of its connection in place of the text that was to help it.
set -euo pipefail

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$tmp"' EXIT
command -v curl >/dev/null || { apt-get update -qq && apt-get install -qq -y curl; } >&2

cd "$tmp"
export XDG_CONFIG_HOME=$tmp XDG_DATA_HOME=$tmp
GOBIN=$tmp go install github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.9 2>/dev/null
cat >Caddyfile <<CADDY
{
	admin off
}
(replace) {
	@missing status 404
	handle_response @missing {
		{block}
		respond "{args[0]}" 404
	}
}
http:// {
	bind unix/$tmp/site.sock
	handle /longer {
		intercept {
			import replace "There is no such report."
		}
		reverse_proxy unix/$tmp/backend.sock
	}
	handle /shorter {
		intercept {
			import replace "No."
		}
		reverse_proxy unix/$tmp/backend.sock
	}
	handle /mended {
		intercept {
			import replace "There is no such report." {
				header -Content-Length
			}
		}
		reverse_proxy unix/$tmp/backend.sock
	}
	handle /proxy {
		reverse_proxy unix/$tmp/backend.sock {
			import replace "There is no such report."
		}
	}
}
http:// {
	bind unix/$tmp/backend.sock
	respond "Not found" 404
}
CADDY
./caddy run --config Caddyfile >log 2>&1 &
for _ in {1..100}; do [[ -S site.sock && -S backend.sock ]] && break || sleep 0.1; done

# get PATH WANTED requests a path, and prints what comes.
get() {
	local result=0 seen
	: >body
	curl --silent --max-time 20 --unix-socket site.sock --output body \
		--write-out '%{http_code}, Content-Length %header{content-length}' "http://localhost/$1" >head || result=$?
	seen="$(<head), body \"$(<body)\", curl ends with $result"
	echo "$1: $seen"
	[[ $seen == "$2" ]] || { echo "this is not what the script states"; exit 1; }
}

go version -m caddy | grep -w mod
get longer '404, Content-Length 9, body "", curl ends with 18'
get shorter '404, Content-Length 9, body "No.", curl ends with 18'
get mended '404, Content-Length 24, body "There is no such report.", curl ends with 0'
get proxy '404, Content-Length 24, body "There is no such report.", curl ends with 0'
