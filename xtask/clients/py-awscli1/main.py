"""Runs the real `aws sts get-caller-identity` against a tiny STS on 127.0.0.1 and prints one line of JSON; then again for
every line that comes in.

The CLI does not print its credentials: the access key id is the one that its request was signed with.
"""

import http.server
import json
import pathlib
import re
import subprocess
import sys
import threading
import time

import awscli

BODY = b"""<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:sts::111122223333:assumed-role/r/s</Arn><UserId>A:s</UserId><Account>111122223333</Account>
</GetCallerIdentityResult><ResponseMetadata><RequestId>0</RequestId></ResponseMetadata></GetCallerIdentityResponse>"""
signed = []


class Sts(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        signed.extend(re.findall(r"Credential=([A-Z0-9]+)/", self.headers.get("authorization", "")))
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Sts)
threading.Thread(target=server.serve_forever, daemon=True).start()
aws = pathlib.Path(sys.executable).with_name("aws")
endpoint = f"http://127.0.0.1:{server.server_address[1]}"
command = [aws, "sts", "get-caller-identity", "--region", "us-east-1", "--endpoint-url", endpoint]

while True:
    line = {"version": f"awscli {awscli.__version__}"}
    signed.clear()
    began = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    line["ms"] = round((time.monotonic() - began) * 1000)
    if signed:
        line |= {"access_key_id": signed[0], "expires": None, "source": "a signed STS request"}
    else:
        line["error"] = done.stderr.strip() or f"exit status {done.returncode}"
    print(json.dumps(line), flush=True)
    if not sys.stdin.readline():
        break
