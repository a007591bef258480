"""Embed texts, classify a picture and search: `pip install openai httpx`, then `python client.py bus.png`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx
from openai import OpenAI

URL = os.environ.get("RATCHET_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("RATCHET_KEY", "none")  # a server on another machine wants a key: ratchet keys create
PICTURE = Path(sys.argv[1])
LABELS = ("bus", "dragon", "red circle")

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
vectors = client.embeddings.create(model="clip", input=["a photo of a bus", "a red dragon"]).data
similarity = sum(x * y for x, y in zip(vectors[0].embedding, vectors[1].embedding, strict=True))
print(f"{len(vectors[0].embedding)} dimensions, similarity {similarity:.2f}")

# What OpenAI has no call for is plain HTTP. A picture is sent as it is, or as a data URI.
with httpx.Client(base_url=URL, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as http:
    form = {"labels": LABELS, "templates": "a photo of a {}."}
    answer = http.post("/v1/classify", data=form, files={"images": PICTURE.read_bytes()}).raise_for_status()
    [best] = answer.json()["data"]
    share = best["probabilities"][best["label"]]
    print(f"{PICTURE.name}: {best['label']} ({share:.0%}), release {answer.headers['x-ratchet-release']}")
    for hit in http.post("/v1/search", json={"text": "a red circle", "k": 3}).raise_for_status().json()["data"]:
        print(f"{hit['score']:.2f} {hit['text']}")
