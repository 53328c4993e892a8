"""Servers in front of an artifact: the gateway over any engine's runner, Ollama's interface, llama.cpp's own server, a supervisor.

One file a subject: `sampling`, `text` and `worker` make an answer; `served`, `openai_api`, `ollama_api` and `gateway` speak HTTP;
`guard`, `audit` and `manifest` keep it safe; `metrics` counts; `supervisor` starts and stops; `modelfile` reads and writes Modelfiles.
"""
