#!/bin/sh
# Submit a file, and print its finished report. The arguments are the site and the file.
set -eu
site=$1 file=$2
report=$(mktemp)
trap 'rm -f "$report"' EXIT

call() {
	curl -sS -H "Authorization: Bearer $FSBROKER_SECRET" "$@"
}

id=$(call --fail -F "file=@$file" "$site/submit" | sed 's/.*"ID":"\([^"]*\)".*/\1/')
deadline=$(($(date +%s) + 600))
while [ "$(date +%s)" -lt "$deadline" ]; do
	got=$(call -o "$report" -w '%{http_code} %header{cache-control}' "$site/task?submitID=$id&wait=30")
	case $got in
	"200 private"*) cat "$report" && exit ;;     # the report is finished
	200* | 204* | 502* | 503* | 504*) sleep 2 ;; # not yet
	*) cat "$report" >&2 && exit 1 ;;            # a problem
	esac
done
echo "the report is not finished" >&2
exit 1
