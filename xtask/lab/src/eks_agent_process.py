"""the EKS Pod Identity Agent as clients and podgate see it: listeners, refusals, its probe of itself. Argument: an access key.

Ends when it cannot listen, or when what answers its probe is not itself.
"""

import base64
import http.client
import http.server
import json
import os
import socket
import socketserver
import sys
import threading
import time

HOSTS = ["169.254.170.23", "fd00:ec2::23"]
NAME = "eks-agent"
PROBE_EVERY = 0.5


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = NAME
    timeout = 30

    def do_GET(self):
        host = self.headers.get("Host", "").removesuffix(":80").strip("[]")
        token = self.headers.get("Authorization", "")
        if self.path != "/v1/credentials":
            return self.answer(404, "404 page not found\n")
        if host not in HOSTS:
            return self.answer(403, f"Access Denied. Called agent through invalid address, please use either "
                                    f"[{' '.join(HOSTS)}] address not {host}\n")
        if not token:
            return self.answer(400, "Service account token cannot be empty\n")
        if token.count(".") != 2:
            return self.answer(400, "Service account token cannot be parsed: token is malformed: token contains an "
                                    "invalid number of segments\n")
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        if claims["exp"] <= time.time():
            return self.answer(400, "Service account token failed basic claim validations: token is expired\n")
        expiration = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 6 * 3600))
        self.answer(200, json.dumps({
            "AccessKeyId": sys.argv[1],
            "SecretAccessKey": "eks-agent",
            "Token": claims["sub"],
            "AccountId": "111122223333",
            "Expiration": expiration,
        }), "application/json")

    def answer(self, status, body, content_type="text/plain; charset=utf-8"):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingTCPServer):
    # As Go's listeners have it, and no SO_REUSEPORT: nobody else may listen there.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 80), Handler)

    def handle_error(self, *_):
        pass


def probe():
    for host in HOSTS:
        connection = http.client.HTTPConnection(host, 80, timeout=5)
        connection.request("GET", "/")
        answer = connection.getresponse()
        if answer.status != 404 or not answer.headers.get("Server", "").startswith(NAME):
            raise RuntimeError(f"its probe of {host} has reached somebody else: {answer.status} {answer.headers}")
        connection.close()


servers = [Server(host) for host in HOSTS]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
probe()
print("serving", flush=True)
while True:
    time.sleep(PROBE_EVERY)
    try:
        probe()
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
