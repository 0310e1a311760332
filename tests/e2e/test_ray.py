"""vLLM's Ray executor and the example's pool of actors, on a Ray of this test's own.

It listens on loopback only, keeps its files to itself, and nothing of it outlives the tests: what
belongs to it is known by its session, so a Ray that runs for someone else is not touched.
"""

import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import two_processes
from helpers import MODEL, ROOT, CacheReference, tokenizer, usual_spans

from vllm_sepllm.oracle.dense_mask import masked_logits, sepllm_mask

pytestmark = pytest.mark.e2e

SECONDS = 300  # for one step of a start; only ever waited for when something is wrong
NEW_TOKENS = 12


class Command:
    """A command in a session of its own, in which everything that it starts can be found."""

    def __init__(self, *command, env, log):
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=env,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Ask it to end; then whatever is left is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for pid in self.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self.wait_until(lambda: not self.living(), "end of all its processes")

    @property
    def output(self):
        return self.log.read_text()

    def living(self):
        """Process ids of the session, without those that only wait to be collected."""
        found = []
        for process in psutil.process_iter():
            try:
                of_session = os.getsid(process.pid) == self.process.pid
                if of_session and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def wait_for(self, pattern):
        """The first match of ``pattern`` in what the command shows."""
        return self.wait_until(
            lambda: re.search(pattern, self.output), f"{pattern!r} in its output"
        )

    def wait(self):
        code = self.process.wait(SECONDS)
        assert code == 0, self.output[-5000:]

    def wait_until(self, probe, what):
        """What ``probe`` returns, as soon as that is something."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ended = not self.living()  # before the probe, which then sees the last output
            found = probe()
            if found:
                return found
            if ended:
                break
            time.sleep(0.1)
        raise AssertionError(f"no {what}; living {self.living()}\n{self.output[-5000:]}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(folder):
    """Of a user's shell, with a Ray that can neither find nor be found by another one."""
    unset = ("VLLM_ENABLE_V1_MULTIPROCESSING", "RAY_ADDRESS")
    return {
        **{key: value for key, value in os.environ.items() if key not in unset},
        "RAY_TMPDIR": folder,
        # Ray runs whatever it is sent, and other users reach loopback too.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Named for the systems it was made for: a Ray of one node, which binds to 127.0.0.1. An
        # explicit --node-ip-address=127.0.0.1 is replaced by the address of a network card.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",  # else workers wait for all that runs beside the tests
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def short_folder():
    """Ray's sockets lie 65 characters below it and Unix allows 107: pytest's own are too deep."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield name


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of a process that joins a Ray of four CPUs and two logical GPUs."""
    log = tmp_path_factory.mktemp("cluster") / "log.txt"
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:
        env = environment(name)
        command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--port=0"]
        # Otherwise 10001 and up, the same for every Ray of the machine.
        command += [f"--ray-client-server-port={free_port()}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false"]
        command += ["--num-cpus=4", "--num-gpus=2", f"--object-store-memory={200 * 2**20}"]
        command += [f"--temp-dir={name}", "--disable-usage-stats"]
        for attempt in range(3):
            with Command(*command, env=env, log=log) as ray:
                try:
                    ray.wait_for("Ray runtime started")
                except AssertionError:
                    # Ray gives a node 30 seconds, whatever else a machine is busy with.
                    if attempt < 2 and "timed out during startup" in ray.output:
                        continue
                    raise
                written = Path(name, "ray_current_cluster")  # a moment after the line
                ray.wait_until(written.exists, "address of the cluster")
                address = written.read_text()
                assert address.startswith("127.0.0.1:")
                yield {**env, "RAY_ADDRESS": address}
                return


def test_two_ranks(cluster, book, reference_model, separator_ids, tmp_path):
    """Kept sets, and places in the cache, are the same in every Ray worker."""
    prompts = [book[:1100], book[100:102], book[3000:3342]]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    ray = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}
    spans, after = usual_spans()
    sepllm = {"position_mode": "cache", "max_separator_tokens": 20, **spans}
    options = json.dumps({**ray, "enforce_eager": True, "sepllm": sepllm})
    command = [sys.executable, two_processes.__file__, path, options]
    env = {**cluster, "VLLM_LOGGING_LEVEL": "INFO"}
    with Command(*command, env=env, log=tmp_path / "log.txt") as run:
        run.wait()
        shown = run.output

    reference = CacheReference(reference_model, separator_ids, 4, 64, bound=20, after=after)
    two_processes.check(shown, prompts, reference.check)
    assert "(RayWorkerProc pid=" in shown
    assert "each of the 2 workers takes one logical GPU" in shown


def batch(output, *options, env, log):
    command = [sys.executable, "examples/ray_batch.py", "--output", output, "--dtype", "float32"]
    command += ["--model", MODEL, "--window", 64]
    command += ["--chapters", 6, "--max-tokens", NEW_TOKENS, *options]
    return Command(*command, env=env, log=log)


def records(output):
    data = output.read_bytes()
    assert data.endswith(b"\n")
    return {record["chapter"]: record for record in map(json.loads, data.splitlines())}


def greedy_text(model, separators, prompt):
    """The reference's own continuation, a whole forward pass per token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        mask = sepllm_mask(ids, separators, 4, 64)
        ids.append(int(masked_logits(model, ids, mask)[-1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)


def test_batch_outlives_its_processes(
    cluster, short_folder, example, reference_model, separator_ids, tmp_path
):
    """The script is killed, then an actor of the next run: every chapter is there, once."""
    output = tmp_path / "continuations.jsonl"
    own = environment(short_folder)
    with batch(output, "--actors", 1, env=own, log=tmp_path / "killed.txt") as run:
        actor = int(run.wait_for(r"ready: pid (\d+) on").group(1))
        run.wait_for(r"1/6 CHAPTER I: ")
        assert actor in run.living()
        run.process.kill()
        run.wait_until(lambda: actor not in run.living(), "end of the actor")
    before = output.read_bytes()
    assert 1 <= len(records(output)) < 6

    with output.open("ab") as file:
        file.write(b'{"chapter": 6, "title": "CHAP')
    with batch(output, "--actors", 2, env=cluster, log=tmp_path / "continued.txt") as run:
        pid = int(run.wait_for(r"ready: pid (\d+) on").group(1))
        os.kill(pid, signal.SIGKILL)
        run.wait()
        shown = run.output
    assert "dropping a last line that was cut off" in shown
    lost = re.search(rf"lost pid {pid} on \S+, which had (CHAPTER \w+); starting another", shown)
    after = output.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 6
    assert sorted(records(output)) == [1, 2, 3, 4, 5, 6]

    with batch(output, env=own, log=tmp_path / "again.txt") as run:
        run.wait()
        assert run.output == f"6 of 6 chapters are in {output}\n"
    assert output.read_bytes() == after

    chapter = next(c for c in example.chapters() if c.title == lost.group(1))
    ids = tokenizer().encode(chapter.text, add_special_tokens=False)
    pages = [ids[i : i + example.PAGE] for i in range(0, len(ids), example.PAGE)]
    expected = [greedy_text(reference_model, separator_ids, page) for page in pages]
    assert records(output)[chapter.number]["continuations"] == expected


@pytest.fixture(scope="module")
def example():
    """``examples/ray_batch.py`` as a module."""
    spec = importlib.util.spec_from_file_location("ray_batch", ROOT / "examples/ray_batch.py")
    module = sys.modules["ray_batch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ray_batch"]


def test_batch_chapters(example):
    """All of the book's, numbered in order: two of them are called XVIII."""
    chapters = example.chapters()
    assert [chapter.number for chapter in chapters] == list(range(1, 31))
    assert [chapter.title for chapter in chapters].count("CHAPTER XVIII") == 2
    assert chapters[0].text.startswith("Even in college Alfred Hardy")
    assert chapters[-1].text.rstrip("* \n").endswith("by Margaret Mayo")


def test_each_actor_has_a_gpu_of_its_own(example, monkeypatch):
    """Ray hides no GPU from an actor that asks for none, so all would take the first."""
    asked = []

    class Remote:
        def options(self, **options):
            asked.append(options)
            raise KeyboardInterrupt

    monkeypatch.setattr(example.ray, "remote", lambda kind: Remote())
    for cpu_build, gpus in ((False, 1), (True, 0)):
        monkeypatch.setattr(example, "is_cpu_build", lambda found=cpu_build: found)
        monkeypatch.setattr(sys, "argv", ["ray_batch.py", "--model", "a/name"])
        with pytest.raises(KeyboardInterrupt):
            example.work(example.deque(example.chapters()), 30, None, example.parse())
        assert asked.pop() == {"num_cpus": 1, "num_gpus": gpus}


def test_batch_refuses_what_it_cannot_continue(example, tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    settings = {"model": "m", "max_tokens": 3}
    output = example.Output(path, settings)
    chapter = example.Chapter(7, "CHAPTER VII", "text")
    output.add(chapter, ["ü", "\n"])
    with pytest.raises(SystemExit, match=r"another run writes to it"):
        example.Output(path, settings)
    output.file.close()

    output = example.Output(path, settings)
    assert output.done == {7}
    output.file.close()
    with pytest.raises(SystemExit, match=r"line 1: made with .*3.*, this run has .*4"):
        example.Output(path, {**settings, "max_tokens": 4})
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(SystemExit, match=r"line 2: not a line of this script"):
        example.Output(path, settings)
    for foreign in (b'{"a": 1, "precious": true}', b"\x00\n\x01", b"two\nlines"):
        path.write_bytes(foreign)
        with pytest.raises(SystemExit, match=r"not (a line )?of this script; move the file away"):
            example.Output(path, settings)
        assert path.read_bytes() == foreign


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--actors=0", "--actors=0: must be at least 1"),
        ("--max-tokens=513", "--max-tokens=513: must be at most 512"),
        ("--model=/no/such", "--model=/no/such: no such folder"),
    ],
)
def test_batch_refuses_bad_options(example, monkeypatch, capsys, option, sentence):
    monkeypatch.setattr(sys, "argv", ["ray_batch.py", option])
    with pytest.raises(SystemExit):
        example.main()
    assert sentence in capsys.readouterr().err
