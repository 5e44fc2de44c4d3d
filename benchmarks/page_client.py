"""What a browser does with the live page of a run, without drawing it: it listens, and fetches what is announced.

python benchmarks/page_client.py ADDRESS   # as `isograd serve` prints it
"""

from __future__ import annotations

import http.client
import sys
from urllib.parse import parse_qs, urlsplit


def main() -> None:
    """Follow the run until the stream ends."""
    address = urlsplit(sys.argv[1])
    token = parse_qs(address.query)["token"][0]
    run = f"/api{address.path}"

    def get(target: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        connection.request("GET", f"{target}?token={token}")
        return connection.getresponse()

    print(len(get(f"{run}/data").read()), flush=True)
    for line in get(f"{run}/events"):
        if line == b"event: data\n":
            get(f"{run}/data").read()


if __name__ == "__main__":
    main()
