# .venv/bin/python examples/ray_batch.py --output continuations.jsonl     (the same again to go on)
"""A book on a pool of Ray actors: every page is continued greedily, a chapter is one batch.

Each actor holds an engine with SepLLM attention. A finished chapter becomes one line of the
output, so nothing is lost or done twice when an actor dies or the whole script is killed: an
actor is replaced and its chapter queued again, and a new run starts where the last one ended.

With RAY_ADDRESS set it joins that cluster, whose nodes need this package and the model; without,
it starts a Ray of its own that ends with it.
"""

import argparse
import fcntl
import json
import os
import re
import sys
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from vllm_sepllm.engine.compat import is_cpu_build

HERE = Path(__file__).resolve().parent
BOOK = HERE / "data" / "860.txt"
CONTEXT = 1024  # tokens of a page and of what continues it
PAGE = 512  # tokens
ATTEMPTS = 3
LINE_START = b'{"chapter": '  # of the output


@dataclass(frozen=True)
class Chapter:
    number: int  # titles will not do: this book has two chapters XVIII
    title: str
    text: str


def chapters() -> list[Chapter]:
    _, *parts = re.split(r"^(CHAPTER [IVXL]+)$", BOOK.read_text(encoding="utf-8"), flags=re.M)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Chapter(i, title, text.strip()) for i, (title, text) in enumerate(pairs, 1)]


class Output:
    """One JSON line per chapter. Only this process writes, and only whole lines count."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{path}: another run writes to it; wait for that or choose another --output")
        self.done = self._read()

    def _read(self) -> set[int]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        done = {self._chapter(i, line) for i, line in enumerate(whole.splitlines(), 1)}
        rest = data[len(whole) :]
        if rest:
            if not (rest.startswith(LINE_START) or LINE_START.startswith(rest)):
                sys.exit(f"{self.path}: its last line is not of this script; move the file away")
            print(f"{self.path}: dropping a last line that was cut off", flush=True)
            self.file.truncate(len(whole))
        return done

    def _chapter(self, number: int, line: bytes) -> int:
        try:
            record = json.loads(line)
            found = {key: record[key] for key in self.settings}
            chapter: int = record["chapter"]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{self.path}, line {number}: not a line of this script; move the file away")
        if found != self.settings:
            sys.exit(
                f"{self.path}, line {number}: made with {found}, this run has {self.settings}; "
                "choose another --output"
            )
        return chapter

    def add(self, chapter: Chapter, continuations: list[str]) -> None:
        record = {"chapter": chapter.number, "title": chapter.title, **self.settings}
        line = json.dumps({**record, "continuations": continuations}, ensure_ascii=False)
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


class Reader:
    """An engine in the actor's own process: nothing of it outlives the actor."""

    def __init__(self, model: str, dtype: str, window: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if Path(model).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM

        self.llm = LLM(
            model,
            attention_backend="sepllm",
            additional_config={"sepllm": {"window_size": window}},
            dtype=dtype,
            max_model_len=CONTEXT,
            kv_cache_memory_bytes=2**28,
            enforce_eager=True,  # for a small model compiling does not pay
        )

    def name(self) -> str:
        return f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    def read(self, text: str, max_tokens: int) -> list[str]:
        from vllm import SamplingParams

        ids = self.llm.get_tokenizer().encode(text, add_special_tokens=False)
        pages = [{"prompt_token_ids": ids[i : i + PAGE]} for i in range(0, len(ids), PAGE)]
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        outputs = self.llm.generate(pages, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


@dataclass
class Task:
    actor: Any
    name: str
    chapter: Chapter | None = None  # none: the actor is starting


def work(queue: deque[Chapter], total: int, output: Output, args: argparse.Namespace) -> None:
    """Give chapters to actors that are ready, until all of the queue have been written."""
    failures: Counter[Chapter | None] = Counter()
    tasks: dict[Any, Task] = {}  # by what the actor will answer
    left = len(queue)

    def hire() -> None:
        remote = ray.remote(Reader).options(num_cpus=args.cpus, num_gpus=args.gpus)
        actor = remote.remote(args.model, args.dtype, args.window)
        tasks[actor.name.remote()] = Task(actor, "actor that was starting")

    for _ in range(min(args.actors, len(queue))):
        hire()
    while left:
        [answer], _ = ray.wait(list(tasks), num_returns=1)
        task = tasks.pop(answer)
        title = task.chapter.title if task.chapter else "no chapter"
        try:
            result = ray.get(answer)
        except (RayActorError, OutOfMemoryError) as error:
            failures[task.chapter] += 1
            if failures[task.chapter] == ATTEMPTS:
                sys.exit(f"{error}\ngiving up: {title}, lost {ATTEMPTS} times. Run again to go on")
            print(f"lost {task.name}, which had {title}; starting another")
            if task.chapter:
                queue.appendleft(task.chapter)
            hire()
            continue
        if task.chapter:
            output.add(task.chapter, result)
            left -= 1
            print(f"{total - left}/{total} {title}: {len(result)} pages, {task.name}")
        else:
            task.name = result
            failures[None] = 0
            print(f"ready: {task.name}")
        if queue:
            task.chapter = queue.popleft()
            tasks[task.actor.read.remote(task.chapter.text, args.max_tokens)] = task
        else:
            ray.kill(task.actor)  # should another be lost, its replacement needs cores


def start_ray(args: argparse.Namespace) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        cpus, store = args.actors * args.cpus, 200 * 2**20
        local: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": store}
        ray.init("local", include_dashboard=False, **local, **quiet)
    for option, kind in ("cpus", "CPU"), ("gpus", "GPU"):
        wanted, found = getattr(args, option), ray.cluster_resources().get(kind, 0)
        if found < wanted:
            sys.exit(f"--{option}={wanted}: Ray has {found:.0f}; see `ray status`")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("continuations.jsonl"))
    parser.add_argument("--model", default=str(HERE.parent / "build/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--window", type=int, default=256, help="tokens of SepLLM's window")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="cores, and threads, of each actor")
    parser.add_argument("--gpus", type=int, help="of each actor; 1 where vLLM is built for GPUs")
    parser.add_argument("--chapters", type=int, help="only the first so many; default: all")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens per page")
    args = parser.parse_args()
    if args.gpus is not None and args.gpus < 0:
        parser.error(f"--gpus={args.gpus}: must be at least 0")
    for name in ("actors", "cpus", "chapters", "max_tokens", "window"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value}: must be at least 1")
    if args.max_tokens > CONTEXT - PAGE:
        parser.error(
            f"--max-tokens={args.max_tokens}: must be at most {CONTEXT - PAGE}, "
            f"what a page of {PAGE} tokens leaves of {CONTEXT}"
        )
    if args.gpus is None:
        args.gpus = 0 if is_cpu_build() else 1
    if args.model.startswith((".", "/")) and not Path(args.model).is_dir():
        parser.error(f"--model={args.model}: no such folder; `make model` fetches the usual one")
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())  # actors run in another directory
    return args


def main() -> None:
    args = parse()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    names = ("model", "dtype", "max_tokens", "window")
    output = Output(args.output, {name: getattr(args, name) for name in names})
    wanted = chapters()[: args.chapters]
    queue = deque(chapter for chapter in wanted if chapter.number not in output.done)
    print(f"{len(wanted) - len(queue)} of {len(wanted)} chapters are in {args.output}")
    if queue:
        start_ray(args)
        work(queue, len(wanted), output, args)


if __name__ == "__main__":
    main()
