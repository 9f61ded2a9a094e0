"""Resolves credentials through botocore's default chain and prints one line of JSON; then again for every line that
comes in, by a new session, or with the argument `keep` by the same one.
"""

import collections
import collections.abc
import json
import sys
import time

# botocore before 1.20 brings libraries that look for these names in `collections`, which Python 3.10 has dropped.
for name in ("Mapping", "MutableMapping", "Callable", "Sequence", "Set"):
    if not hasattr(collections, name):
        setattr(collections, name, getattr(collections.abc, name))

import boto3
import botocore

VERSION = f"boto3 {boto3.__version__}, botocore {botocore.__version__}"
KEEP = "keep" in sys.argv
kept = None


def resolve():
    global kept
    if kept is None or not KEEP:
        kept = boto3.session.Session().get_credentials()
    if kept is None:
        raise RuntimeError("no credentials in the default chain")
    frozen = kept.get_frozen_credentials()
    expires = getattr(kept, "_expiry_time", None)
    return {
        "access_key_id": frozen.access_key,
        "expires": expires.isoformat() if expires else None,
        "source": kept.method,
    }


while True:
    line = {"version": VERSION}
    began = time.monotonic()
    try:
        line |= resolve()
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"
    line["ms"] = round((time.monotonic() - began) * 1000)
    print(json.dumps(line), flush=True)
    if not sys.stdin.readline():
        break
