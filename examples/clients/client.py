"""Embed texts, classify a picture and search: `pip install ./client`, then `python client.py bus.png`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ratchet_client import Client

URL = os.environ.get("RATCHET_CLIENT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("RATCHET_CLIENT_KEY")  # a server on another machine wants a key: ratchet keys create
PICTURE = Path(sys.argv[1])
LABELS = ["bus", "dragon", "red circle"]

with Client(URL, KEY) as client:
    bus, dragon = client.embed(["a photo of a bus", "a red dragon"])
    similarity = sum(x * y for x, y in zip(bus, dragon, strict=True))
    print(f"{len(bus)} dimensions, similarity {similarity:.2f}")

    [best] = client.classify([PICTURE.read_bytes()], LABELS, templates=["a photo of a {}."])
    share = best["probabilities"][best["label"]]
    print(f"{PICTURE.name}: {best['label']} ({share:.0%}), release {client.live()}")
    for hit in client.search("a red circle", k=3):
        print(f"{hit['score']:.2f} {hit['text']}")
