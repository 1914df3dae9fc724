"""Submit a file, and print its finished report. The arguments are the site and the file."""

import os
import sys
import time

import requests

site, name = sys.argv[1:]

session = requests.Session()
session.headers["X-Api-Key"] = os.environ["FSBROKER_SECRET"]

with open(name, "rb") as file:
    response = session.post(f"{site}/submit", files={"file": file}, timeout=60)
assert response.status_code == 200, response.text
submit_id = response.json()["acceptedFiles"][0]["ID"]

deadline = time.monotonic() + 600
while True:
    # The timeout must be longer than the wait.
    response = session.get(f"{site}/task", params={"submitID": submit_id, "wait": 30}, timeout=60)
    seconds = response.headers.get("Retry-After")
    if seconds is None:
        break
    assert time.monotonic() < deadline, "the report is not finished"
    time.sleep(int(seconds))
assert response.status_code == 200, response.text  # a problem that does not pass
print(response.content.decode())
