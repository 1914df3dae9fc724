"""Uploads zeros to a site again and again, each time over a new connection, and prints the statuses.

Arguments: host, port, secret, how the length is given (length or chunked), bytes, and the number of uploads.
"""

import collections
import http.client
import sys

host, port, secret, framing, size, uploads = sys.argv[1:]
statuses = collections.Counter()
for _ in range(int(uploads)):
    connection = http.client.HTTPConnection(host, int(port))
    headers = {"Authorization": "Bearer " + secret}
    body = bytes(int(size))
    if framing == "chunked":
        body = (bytes(1 << 16) for _ in range(int(size) >> 16))
    try:
        connection.request("POST", "/submit", body, headers, encode_chunked=framing == "chunked")
        response = connection.getresponse()
        response.read()
        statuses[response.status] += 1
    except OSError as error:
        statuses[type(error).__name__] += 1
    connection.close()
print(" ".join(f"{status}:{count}" for status, count in sorted(statuses.items(), key=str)))
