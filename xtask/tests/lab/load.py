"""A steady load from a pod: requests on connections of their own, begun on time whatever becomes of the others.

Arguments: host, requests a second, and the path of the credentials; without a path they are asked for as by IMDSv2.
Ends when its standard input does. Prints a JSON list: for each request when it was due (seconds since the first), how long
it took from then (milliseconds), and what came of it.
"""

import json
import select
import socket
import sys
import threading
import time

host, rate = sys.argv[1], float(sys.argv[2])
ROLES = "/latest/meta-data/iam/security-credentials/"
results = []


def ask(method, path, headers):
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection((host, 80), timeout=10) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{head}\r\n".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split(" ")[1]) if head else 0, body


def one(due, path, headers):
    try:
        status, body = ask("GET", path, headers)
        outcome = json.loads(body)["AccessKeyId"] if status == 200 else f"status {status}: {body[:200]}"
    except OSError as error:
        outcome = f"error {error.errno}: {error}"
    results.append((due - began, (time.monotonic() - due) * 1000, outcome))


if len(sys.argv) > 3:
    path, headers = sys.argv[3], {}
else:
    _, token = ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"})
    headers = {"X-aws-ec2-metadata-token": token}
    path = ROLES + ask("GET", ROLES, headers)[1]
began = time.monotonic()
threads = []
while True:
    due = began + len(threads) / rate
    if select.select([sys.stdin], [], [], max(0, due - time.monotonic()))[0]:
        break
    threads.append(threading.Thread(target=one, args=(due, path, headers)))
    threads[-1].start()
for thread in threads:
    thread.join()
print(json.dumps(results))
