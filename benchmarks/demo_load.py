"""Many requests at once to the demo: is one lost, does memory stay bounded, does Stop leave anything running?

    python benchmarks/demo_load.py --requests 100 --clients 5

Starts `varkit demo` as a process of its own (Linux: its memory is read from /proc), sends all requests before the first
is answered, and checks each answer: the number of images and the seed that was asked for. Then requests are cancelled
half way, and one more must be answered. Needs the extra `app`, which brings gradio_client.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

SETTINGS = (2.5, 1.0, 0, 0.95, False)


def memory(pid: int) -> float:
    """MiB that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(model: str, port: int, folder: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "varkit", "demo", "--model", model, "--port", str(port)]
    with open(Path(folder) / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GRADIO_TEMP_DIR": folder})
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.2)
    server.terminate()
    raise SystemExit((Path(folder) / "server.log").read_text())


def watch(pid: int, seen: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.2):
        seen.append(memory(pid))


def load(url: str, model: str, requests: int, clients: int, images: int) -> tuple[int, list[float], float]:
    """Send all requests, then read all answers: how many were right, the waiting times, the whole time in seconds."""
    from gradio_client import Client

    own = [Client(url, verbose=False, httpx_kwargs={"timeout": 600}) for _ in range(clients)]
    began = time.perf_counter()
    ended: dict[int, float] = {}
    jobs = []
    for seed in range(requests):
        job = own[seed % clients].submit(model, "all", images, *SETTINGS, seed, api_name="/generate")
        job.add_done_callback(lambda _, seed=seed: ended.__setitem__(seed, time.perf_counter() - began))
        jobs.append(job)
    right = 0
    for seed, job in enumerate(jobs):
        try:
            made, _, _, command = job.result(timeout=600)
        except Exception as error:
            print(f"request {seed}: {type(error).__name__}: {error}")
            continue
        right += len(made) == images and f"--seed {seed} " in command
    return right, sorted(ended.values()), time.perf_counter() - began


def cancelled(url: str, model: str, count: int) -> tuple[int, float]:
    """Cancel requests after their first step: how many ended so, and the seconds until another is answered."""
    from gradio_client import Client

    client = Client(url, verbose=False, httpx_kwargs={"timeout": 600})
    stopped = 0
    for seed in range(count):
        job: Any = client.submit(model, 256, 2.5, seed, api_name="/evaluate")
        while len(job.outputs()) < 2:
            time.sleep(0.02)
        stopped += job.cancel()
    began = time.perf_counter()
    client.predict(model, "all", 1, *SETTINGS, 0, api_name="/generate")
    return stopped, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-var")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--images", type=int, default=4, help="of each request")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of all requests: memory must not grow from one to the next"
    )
    parser.add_argument("--cancelled", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        url = f"http://127.0.0.1:{port}/"
        server = serve(options.model, port, folder)
        lost = 0
        try:
            print(f"memory after start: {memory(server.pid):.0f} MiB")
            for number in range(options.rounds):
                seen, stop = [memory(server.pid)], threading.Event()
                watcher = threading.Thread(target=watch, args=(server.pid, seen, stop))
                watcher.start()
                right, waits, seconds = load(url, options.model, options.requests, options.clients, options.images)
                stop.set()
                watcher.join()
                lost += options.requests - right
                print(
                    f"round {number + 1}: {right} of {options.requests} requests of {options.clients} clients answered "
                    f"rightly in {seconds:.1f} s (median wait {statistics.median(waits):.1f} s, longest "
                    f"{waits[-1]:.1f} s); memory at most {max(seen):.0f} MiB, at the end {memory(server.pid):.0f} MiB"
                )
            stopped, seconds = cancelled(url, options.model, options.cancelled)
            lost += options.cancelled - stopped
            print(f"{stopped} of {options.cancelled} evaluations cancelled; the next request took {seconds:.1f} s")
        finally:
            server.terminate()
            server.wait()
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
