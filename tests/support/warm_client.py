"""Takes the place of `python`: python -I -S warm_client.py SOCKET PROGRAM [FLAGS], or -m MODULE.

A fork of a process that has imported everything (warm_python.py) runs the program, with this one's environment, folder and files.
Signals are passed on; the program's exit code is this one's, and it dies if this one does.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

path, *words = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as server:
    server.connect(path)
    wish = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [len(wish).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(wish)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    answer = server.recv(1)
sys.exit(answer[0] if answer else 70)  # EX_SOFTWARE: the server is gone
