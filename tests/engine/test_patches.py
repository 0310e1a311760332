"""The changes to vLLM: what they add, and that everything else is vLLM's own."""

import asyncio
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine


def output(*samples):
    return SimpleNamespace(
        outputs=[SimpleNamespace(finish_reason=reason, stop_reason=why) for reason, why in samples]
    )


@pytest.fixture
def patched(monkeypatch):
    """AsyncLLM over a fake engine: its outputs to set, whether it was closed, the method."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_sepllm.engine.patches import tell_clients_why

    engine = SimpleNamespace(outputs=[], asked=None, closed=False)

    async def generate(self, *args, **kwargs):
        engine.asked = (self, args, kwargs)
        try:
            for item in engine.outputs:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            engine.closed = True

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    tell_clients_why()
    engine.generate = AsyncLLM.generate
    return engine


def run(engine, most=100):
    """What a client sees: its outputs and the exception that ends them."""

    async def collect():
        seen = []
        outputs = engine.generate("self", "prompt", request_id="r")
        try:
            async for item in outputs:
                seen.append(item)
                if len(seen) == most:
                    await outputs.aclose()
        except Exception as error:
            return seen, error
        return seen, None

    return asyncio.run(collect())


def test_a_reason_is_raised_as_the_clients_error(patched):
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    first, last = output((None, None)), output((None, None), ("error", "too many: shorten it"))
    patched.outputs = [first, last, output(("stop", None))]
    seen, error = run(patched)
    assert seen == [first]
    assert patched.closed  # with it vLLM aborts what is left of the request
    answer = create_error_response(error).error
    assert (answer.code, answer.message) == (400, "too many: shorten it")


@pytest.mark.parametrize(
    "sample", [("error", None), ("error", 5), ("stop", "text"), ("length", None), ("abort", None)]
)
def test_other_outputs_pass(patched, sample):
    patched.outputs = [output((None, None)), output(sample)]
    assert run(patched) == (patched.outputs, None)
    assert patched.asked == ("self", ("prompt",), {"request_id": "r"})


def test_errors_of_the_engine_and_clients_that_leave_pass(patched):
    died = RuntimeError("engine died")
    patched.outputs = [output((None, None)), died]
    assert run(patched) == (patched.outputs[:1], died)
    patched.outputs, patched.closed = [output((None, None))] * 5, False
    assert run(patched, most=2) == (patched.outputs[:2], None)
    assert patched.closed


def test_applied_once_and_only_with_sepllm(monkeypatch):
    from helpers import MODEL
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def original(self):
        yield

    monkeypatch.setattr(AsyncLLM, "generate", original)
    EngineArgs(model=MODEL, max_model_len=512).create_engine_config()
    assert AsyncLLM.generate is original
    sepllm = EngineArgs(model=MODEL, max_model_len=512, attention_backend="sepllm")
    sepllm.create_engine_config()
    once = AsyncLLM.generate
    assert once is not original
    sepllm.create_engine_config()
    assert AsyncLLM.generate is once
