"""Resolves credentials through the default chain of aws-c-auth, the C library below the C++ SDK and others, and prints one
line of JSON; then again for every line that comes in, by a new chain.
"""

import importlib.metadata
import json
import sys
import time

from awscrt.auth import AwsCredentialsProvider

VERSION = f"awscrt {importlib.metadata.version('awscrt')}"

while True:
    line = {"version": VERSION}
    began = time.monotonic()
    try:
        found = AwsCredentialsProvider.new_default_chain().get_credentials().result(60)
        line |= {
            "access_key_id": found.access_key_id,
            "expires": found.expiration.isoformat() if found.expiration else None,
            "source": "default chain",
        }
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"
    line["ms"] = round((time.monotonic() - began) * 1000)
    print(json.dumps(line), flush=True)
    if not sys.stdin.readline():
        break
