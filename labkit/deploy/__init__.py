"""From measurements to deployment files, and the checks that they must pass.

`sizing` says what a server needs and refuses what cannot work; `render` fills the templates of `labkit/data/templates`; `check` runs the
rules of `dockerfile`, `compose`, `kubernetes`, `arguments` and `pipeline` over a folder; `dashboards` writes Grafana's JSON; `readiness`
is a checklist that runs; `attack` tries to break a live gateway, and `careless` is a server that it does break.
"""
