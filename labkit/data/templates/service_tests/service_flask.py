"""The same service in Flask; run it with a production server. `python service_flask.py PORT` is Flask's own, for trying."""

import sys

from flask import Flask, jsonify, request
from service import MOST_BYTES, answer

app = Flask("commands")


@app.get("/health")
def health():
    return jsonify(status="ok")


@app.post("/command")
def command():
    status, reply = answer(request.stream.read(MOST_BYTES + 1))
    return jsonify(reply), status, {"Retry-After": "1"} if status == 503 else {}


if __name__ == "__main__":
    app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
