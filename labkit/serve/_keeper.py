"""Runs one command and never outlives its parent: the program between a supervisor and a server.

The parent holds the other end of standard input. When that end closes, for whatever reason (also SIGKILL), the command is
ended, first politely, then for sure. Started by path with `-I -S`, so it imports nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    grace, command = float(sys.argv[1]), sys.argv[2:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    if os.name == "posix":  # the group gets these too: stay until the command has ended
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, lambda *_: None)

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock, held here, would stop the interpreter's end
            pass
        child.terminate()
        try:
            child.wait(grace)
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
