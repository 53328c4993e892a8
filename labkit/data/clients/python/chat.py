"""One question to an OpenAI-style server: python chat.py URL QUESTION. Needs nothing but Python."""

import json
import sys
import urllib.request

url, question = sys.argv[1:3]
body = {"model": "edgehome", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}
request = urllib.request.Request(
    url + "/v1/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
)
with urllib.request.urlopen(request, timeout=60) as reply:
    print(json.load(reply)["choices"][0]["message"]["content"])
