#!/bin/sh
# One question to an OpenAI-style server: sh chat.sh URL BODY. BODY is the JSON to send: a shell cannot quote it safely by itself.
# -f: an HTTP error is a failure; -sS: no progress bar, but errors are shown; @-: the body comes from standard input.
printf '%s' "$2" | curl -fsS --max-time 60 -H 'Content-Type: application/json' --data-binary @- "$1/v1/chat/completions"
