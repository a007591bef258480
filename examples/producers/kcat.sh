#!/usr/bin/env bash
# Send a picture with its caption, with kcat: `bash kcat.sh bus.png "a red bus"`.
set -euo pipefail
broker="${RATCHET_KAFKA__BOOTSTRAP:-127.0.0.1:19092}"
topic="${RATCHET_KAFKA__TOPIC:-ratchet.samples}"

# A record as JSON needs no header. Quotes and backslashes in the caption are escaped.
caption="${2//\\/\\\\}"
printf '{"image": "%s", "text": "%s", "domain": "examples"}\n' "$(base64 -w0 "$1")" "${caption//\"/\\\"}" |
  kcat -P -b "$broker" -t "$topic"
# The bytes as they are, a third smaller, with the caption in a header.
kcat -P -b "$broker" -t "$topic" -H content-type=image/png -H "ratchet_text=$2, as it is" -H ratchet_domain=examples "$1"
