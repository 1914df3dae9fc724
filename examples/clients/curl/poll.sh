#!/bin/sh
# Submit a file, and print its finished report. The arguments are the site and the file.
set -eu
site=$1 file=$2
report=$(mktemp)
trap 'rm -f "$report"' EXIT

call() {
	curl -sS -H "Authorization: Bearer $FSBROKER_SECRET" "$@"
}

status=$(call -o "$report" -w '%{http_code}' -F "file=@$file" "$site/submit")
test "$status" = 200 || { cat "$report" >&2 && exit 1; }
id=$(sed -n 's/.*"ID" *: *"\([^"]*\)".*/\1/p' "$report")

deadline=$(($(date +%s) + 600))
while [ "$(date +%s)" -lt "$deadline" ]; do
	got=$(call -o "$report" -w '%{http_code} %header{retry-after}' "$site/task?submitID=$id&wait=30")
	case $got in
	*" "[0-9]*) sleep "${got#* }" ;;  # not yet: Retry-After says when to try again
	"200 ") cat "$report" && exit ;;  # the report is finished
	*) cat "$report" >&2 && exit 1 ;; # a problem
	esac
done
echo "the report is not finished" >&2
exit 1
