"""Submit a file, and print its finished report. The arguments are the site and the file."""

import os
import sys
import time

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

site, name = sys.argv[1:]

session = requests.Session()
session.headers["X-Api-Key"] = os.environ["FSBROKER_SECRET"]
# Retry sleeps for as long as Retry-After says. It repeats only GET here, so no file is submitted twice.
retry = Retry(total=60, backoff_factor=0.5, backoff_max=30, status_forcelist=[204, 502, 503, 504])
session.mount(site, HTTPAdapter(max_retries=retry))

with open(name, "rb") as file:
    response = session.post(f"{site}/submit", files={"file": file}, timeout=60)
assert response.status_code == 200, response.text
submit_id = response.json()["acceptedFiles"][0]["ID"]

deadline = time.monotonic() + 600
while True:
    # The timeout must be longer than the wait.
    response = session.get(f"{site}/task", params={"submitID": submit_id, "wait": 30}, timeout=60)
    assert response.status_code == 200, response.text
    if response.headers["Cache-Control"] != "no-store":
        break  # the report is finished
    assert time.monotonic() < deadline, "the report is not finished"
    time.sleep(int(response.headers.get("Retry-After", 2)))
print(response.text)
