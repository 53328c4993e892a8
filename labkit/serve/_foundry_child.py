"""Runs in the interpreter that has foundry-local-sdk: one manager, the models registered with it, one command a line.

Reads JSON commands from standard input and answers each with one JSON line, a stream with several; what the native
library prints goes to standard error. Knows nothing of labkit, which need not be installed there. It ends, and frees
everything, when standard input ends. Telemetry that is not essential is switched off.
"""

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path

from foundry_local_sdk import (
    CatalogType,
    ChatSession,
    Configuration,
    FinishReason,
    FoundryLocalManager,
    MessageItem,
    ModelInfoBuilder,
    Request,
    RequestOptions,
    SearchOptions,
)

ALL = -1  # cancels whatever runs


class Host:
    """One method a command; each returns what its answer holds."""

    def __init__(self, folder: str, say, cancelled: set):
        places = {name: str(Path(folder, name)) for name in ("data", "models", "logs")}
        FoundryLocalManager.initialize(Configuration(
            app_name="labkit", app_data_dir=places["data"], model_cache_dir=places["models"], logs_dir=places["logs"],
            disable_nonessential_telemetry=True,
        ))  # fmt: skip
        self.manager, self.say, self.cancelled, self.number = FoundryLocalManager.instance, say, cancelled, 0
        self.catalog = self.manager.get_catalog(CatalogType.LOCAL)
        self.models = {}

    def register(self, folder: str, name: str, about: dict) -> dict:
        with ModelInfoBuilder() as builder:
            for key, value in about.items():
                (builder.set_int_property if isinstance(value, int) else builder.set_string_property)(key, value)
            model = self.catalog.register_model(folder, name, builder)
        self.models[model.id] = model
        return {"id": model.id, "context": model.context_length}

    def unregister(self, model: str) -> dict:
        self.catalog.unregister_model(model)
        self.models.pop(model, None)
        return {}

    def list(self) -> dict:
        return {"models": [{"id": one.id, "loaded": one.is_loaded} for one in self.catalog.list_models()]}

    def load(self, model: str) -> dict:
        begin = time.perf_counter()
        self._model(model).load()
        return {"seconds": time.perf_counter() - begin}

    def unload(self, model: str) -> dict:
        self._model(model).unload()
        return {}

    def budget(self, model: str, messages: list, search: dict) -> dict:
        with self._session(model, search) as session, self._request(messages) as request:
            told = session.preflight_request(request)
        return {"prompt_tokens": told.prompt_tokens, "reserved": told.output_reserve_tokens, "context": told.context_limit_tokens, "fits": told.fits}

    def chat(self, model: str, messages: list, search: dict) -> dict:
        begin = time.perf_counter()
        with self._session(model, search) as session, self._request(messages) as request, session.process_request(request) as reply:
            text = "".join(item.get_simple_text() for item in reply if isinstance(item, MessageItem))
            return {"text": text, **self._ended(reply, begin), "first_seconds": None}

    def stream(self, model: str, messages: list, search: dict) -> dict:
        begin, first, text = time.perf_counter(), None, ""
        with self._session(model, search) as session:
            session.set_streaming(True)
            with self._request(messages) as request, session.process_streaming_request(request) as stream:
                for item in stream:
                    if self.cancelled & {self.number, ALL}:  # leaving the loop cancels the request
                        return {"text": text, "reason": "cancelled", "seconds": time.perf_counter() - begin, "first_seconds": first}
                    first = first or time.perf_counter() - begin
                    text += item.text
                    self.say({"piece": item.text})
                with stream.final_response as reply:
                    return {"text": text, **self._ended(reply, begin), "first_seconds": first}

    def _model(self, name: str):
        if name not in self.models:
            raise KeyError(f"no model {name} is registered here")
        return self.models[name]

    def _session(self, model: str, search: dict) -> ChatSession:
        return ChatSession(self._model(model)).set_options(RequestOptions(search=SearchOptions(**search)))

    def _request(self, messages: list) -> Request:
        request = Request()
        for one in messages:
            request.add_item(getattr(MessageItem, one["role"])(one["content"]))
        return request

    def _ended(self, reply, begin: float) -> dict:
        usage = reply.get_usage()
        names = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
        return {"reason": names.get(reply.finish_reason, reply.finish_reason.name.lower()), "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens, "seconds": time.perf_counter() - begin}  # fmt: skip


def main(folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    commands: queue.Queue = queue.Queue()
    cancelled: set = set()

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    def listen() -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["what"] == "cancel":
                cancelled.add(command["number"])
            else:
                commands.put(command)
        cancelled.add(ALL)
        commands.put(None)

    host = Host(folder, say, cancelled)
    threading.Thread(target=listen, daemon=True).start()
    say({"done": True})
    while (command := commands.get()) is not None:
        host.number = command["number"]
        try:
            answer = getattr(host, command["what"])(**command["given"])
        except Exception as error:  # the runtime's refusal is the answer
            answer = {"error": str(error.args[0]) if error.args else type(error).__name__}
        say({"done": True, **answer})
    host.manager.close()


if __name__ == "__main__":
    main(sys.argv[1])
