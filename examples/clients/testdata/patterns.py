"""Get a report in one of the ways that Python programs do. The arguments are the way, the site and the submission's ID."""

import os
import sys

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

pattern, site, submit_id = sys.argv[1:]
params = {"submitID": submit_id}
session = requests.Session()
session.headers["X-Api-Key"] = os.environ["FSBROKER_SECRET"]


def retry(total, *statuses):
    session.mount(site, HTTPAdapter(max_retries=Retry(total=total, status_forcelist=statuses, backoff_factor=0.1)))


def get():
    return session.get(f"{site}/task", params=params, timeout=60)


def assert_200():
    response = get()
    assert response.status_code == 200, response.status_code
    return response


def plain():
    return assert_200()


def raise_for_status():
    response = get()
    response.raise_for_status()
    response.json()
    return response


def retry_errors():
    retry(3, 429, 500, 502, 503, 504)
    return assert_200()


def retry_204():
    retry(2, 204)
    return assert_200()


def until_success():
    retry(20, 204)
    while True:
        response = assert_200()
        if response.json()["result"]["taskReference"]["state"] == "SUCCESS":
            return response


def wait():
    params["wait"] = 30
    return assert_200()


def retry_errors_and_wait():
    params["wait"] = 30
    retry(20, 502, 503, 504)
    return assert_200()


try:
    response = globals()[pattern]()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
else:
    print(response.json()["result"]["taskReference"]["state"], [attempt.status for attempt in response.raw.retries.history])
