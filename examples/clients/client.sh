#!/usr/bin/env bash
# Embed texts, classify a picture and search, with curl: `bash client.sh bus.png`.
set -euo pipefail
url="${RATCHET_CLIENT_URL:-http://127.0.0.1:8000}"
key="${RATCHET_CLIENT_KEY:-none}" # a server on another machine wants a key: ratchet keys create
picture="$1"

call() { # a status of 400 or more ends this, with the server's message
  curl -sS --fail-with-body -H "authorization: Bearer $key" "$@"
  echo
}

call "$url/v1/embeddings" -H 'content-type: application/json' \
  -d '{"model": "clip", "input": ["a photo of a bus", "a red dragon"], "encoding_format": "base64"}'
call "$url/v1/classify" -F "images=@$picture" -F labels=bus -F labels=dragon -F 'labels=red circle' \
  -F 'templates=a photo of a {}.'
call "$url/v1/search" -H 'content-type: application/json' -d '{"text": "a red circle", "k": 3}'
