"""Resolves credentials through boto3's default chain and prints one line of JSON.

With the argument `wait` it says `ready` first and begins when a line comes in, so that several clients can begin
at the same instant.
"""

import json
import sys
import time

import boto3

if "wait" in sys.argv:
    print("ready", flush=True)
    sys.stdin.readline()

answer = {"version": f"boto3 {boto3.__version__}"}
began = time.monotonic()
try:
    credentials = boto3.session.Session().get_credentials()
    if credentials is None:
        answer["error"] = "no credentials in the default chain"
    else:
        answer["access_key_id"] = credentials.get_frozen_credentials().access_key
        answer["source"] = credentials.method
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}"
answer["milliseconds"] = round((time.monotonic() - began) * 1000, 1)
print(json.dumps(answer))
