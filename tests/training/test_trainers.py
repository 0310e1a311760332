"""Trainer, PEFT and TRL train under the rule as plain loops do."""

import json
from types import SimpleNamespace

import pytest
import torch
from small_models import SEPARATORS, VOCABULARY, bias_of, make_ids, make_model

from vllm_sepllm.config import ConfigError
from vllm_sepllm.oracle.dense_mask import sepllm_mask
from vllm_sepllm.training import apply

pytestmark = pytest.mark.training

OPTIONS = {"num_sink_tokens": 2, "window_size": 16, "separator_token_ids": SEPARATORS}


def rows(count=4, length=64):
    return [
        {"input_ids": ids, "labels": ids, "attention_mask": [1] * length}
        for ids in make_ids(*[length] * count)
    ]


def arguments(folder, kind=None, **options):
    import transformers

    usual = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return (kind or transformers.TrainingArguments)(**{**usual, **options})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model, batches, autocast=False):
    """The losses of the same steps in a plain loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []
    for batch in batches:
        given = torch.tensor([row["input_ids"] for row in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=given, labels=given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


class Collator:
    """Notes what a Trainer asks for."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        import transformers

        self.batches.append(batch)
        return transformers.default_data_collator(batch)


def test_trainer_in_bfloat16(tmp_path):
    """The same losses as a loop's under autocast, and others than in float32."""
    import transformers

    model, other, exact = (make_model().float() for _ in range(3))
    for each in (model, other, exact):
        apply(each, OPTIONS)
    collator = Collator()
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, bf16=True),
        train_dataset=rows(),
        data_collator=collator,
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(by_hand(other, collator.batches, True), abs=1e-4)
    assert losses(trainer) != pytest.approx(by_hand(exact, collator.batches), abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    import transformers

    model, other = make_model(), make_model()
    apply(model, OPTIONS)
    apply(other, OPTIONS)
    collator = Collator()
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, gradient_checkpointing=checkpointing),
        train_dataset=rows(),
        data_collator=collator,
    )
    trainer.train()
    assert len(collator.batches) == 2
    assert losses(trainer) == pytest.approx(by_hand(other, collator.batches), abs=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/config.json").read_text())["sepllm"]["window_size"] == 16


def lora(**options):
    import peft

    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )


@pytest.mark.parametrize("first", ["the rule", "the adapter"])
def test_peft(tmp_path, first):
    """The adapter alone is trained, and has the rule beside its weights."""
    import peft

    base = make_model()
    if first == "the rule":
        attached = apply(base, OPTIONS)
        model = peft.get_peft_model(base, lora())
    else:
        model = peft.get_peft_model(base, lora())
        attached = apply(model, OPTIONS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    given = torch.tensor([rows(1)[0]["input_ids"]])
    found = []
    for _ in range(3):
        loss = model(input_ids=given, labels=given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    assert found[2] < found[0]
    model.save_pretrained(tmp_path / "adapter")
    carried = json.loads((tmp_path / "adapter/sepllm.json").read_text())
    assert carried == {**OPTIONS, "separator_token_ids": list(SEPARATORS)}
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    apply(loaded, attached.config)
    with torch.no_grad():
        difference = loaded(input_ids=given).logits - model(input_ids=given).logits
        assert difference.abs().max() < 1e-9
        merged = model.merge_and_unload()
        assert (merged(input_ids=given).logits - loaded(input_ids=given).logits).abs().max() < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["sepllm"] == carried


def test_several_adapters_have_it_where_each_is_loaded_from(tmp_path):
    import peft

    model = peft.get_peft_model(make_model(), lora(), adapter_name="math")
    apply(model, OPTIONS)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("sepllm.json"))
    model.save_pretrained(tmp_path)
    assert [path.parent.name for path in tmp_path.rglob("sepllm.json")] == ["math"]
    model.add_adapter("other", lora())
    with pytest.warns(UserWarning, match=r"not with other: copy the sepllm\.json"):
        model.save_pretrained(tmp_path / "selected", True, ["other"])  # by position
    assert not list((tmp_path / "selected").rglob("sepllm.json"))


def test_an_adapter_of_transformers_has_it(tmp_path, monkeypatch):
    """``add_adapter`` puts layers of PEFT into the model, which saves and uploads itself."""
    model = make_model()
    apply(model, OPTIONS)
    model.config.sepllm, rule = None, model.config.sepllm
    model.save_pretrained(tmp_path / "none")  # as before, if someone took it out
    model.config.sepllm = rule
    model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole/sepllm.json").exists()
    model.add_adapter(lora())
    uploaded = []
    hub = SimpleNamespace(
        create_repo=lambda name, **options: SimpleNamespace(repo_id=name),
        create_commit=lambda **given: uploaded.extend(
            each.path_in_repo for each in given["operations"]
        ),
    )
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(
        "transformers.modeling_utils.create_and_tag_model_card", lambda *given, **more: card
    )
    model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    assert {"adapter_config.json", "sepllm.json"} <= set(uploaded)
    carried = json.loads((tmp_path / "adapter/sepllm.json").read_text())
    assert carried == {**OPTIONS, "separator_token_ids": list(SEPARATORS)}


def test_an_adapter_may_have_another_rule_than_its_base(tmp_path):
    import peft

    base = make_model()
    apply(base, OPTIONS)
    model = peft.get_peft_model(base, lora())
    with pytest.raises(ConfigError, match=r"may have been trained.*'window_size': 16"):
        apply(model)
    with pytest.raises(ConfigError, match="may have been trained"):
        apply(base)
    assert apply(model, base.config.sepllm).config.window_size == 16


def test_an_adapter_without_a_rule_has_no_file(tmp_path):
    import peft

    apply(make_model(), OPTIONS)  # of another model
    base = make_model()
    base.config.sepllm = {"window_size": 16}  # what the base was trained under
    peft.get_peft_model(base, lora()).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "sepllm.json").exists()


def test_virtual_tokens_are_refused():
    import peft

    model = peft.get_peft_model(
        make_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    apply(model, OPTIONS)
    with pytest.raises(ValueError, match="virtual tokens"):
        model(input_ids=torch.tensor([rows(1)[0]["input_ids"]]))


def test_evaluate(tmp_path):
    """The loss that a Trainer reports is that of the explicit mask."""
    import transformers

    model, data = make_model(), rows(3)
    wanted = []
    with torch.no_grad():
        for row in data:
            ids = row["input_ids"]
            bias = bias_of(sepllm_mask(ids, SEPARATORS, 2, 16))
            logits = model(input_ids=torch.tensor([ids]), attention_mask=bias).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
            wanted.append(float(loss))
    apply(model, OPTIONS)
    settings = arguments(tmp_path, per_device_eval_batch_size=1)
    trainer = transformers.Trainer(
        model=model,
        args=settings,
        eval_dataset=data,
        data_collator=transformers.default_data_collator,
    )
    # A Trainer adds losses up in float32.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(wanted) / 3, rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing):
    """TRL's, whose packed rows hold several texts, that must not see each other."""
    import datasets
    import trl

    texts = make_ids(30, 25, 40, 20, seed=3)
    data = datasets.Dataset.from_list([{"input_ids": ids} for ids in texts])
    model = make_model()
    apply(model, {**OPTIONS, "window_size": 8})
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    options = {"packing": packing, "max_length": 64, "max_steps": 1, "eos_token": None}
    settings = arguments(tmp_path, trl.SFTConfig, dataset_num_proc=None, **options)
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=data, processing_class=tokenizer()
    )
    trainer.train()
    hook.remove()
    step = seen[0]["sepllm_step"]
    found = [ids.tolist() for ids in step.texts.token_ids]
    assert found
    assert all(ids in texts for ids in found), "texts were joined"
    if packing:
        assert len(found) > len(step.texts.is_token), "no row held two texts"


def tokenizer():
    """With a token for each id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")),
        pad_token="w0",
        eos_token="w1",
        unk_token="w0",
    )


def test_an_adapter_that_is_not_trained_keeps_its_own_rule(tmp_path):
    """Only active ones are saved with the model's."""
    import peft

    model = peft.get_peft_model(make_model(), lora(), adapter_name="first")
    apply(model, OPTIONS)
    model.save_pretrained(tmp_path / "before")
    model.add_adapter("second", lora())
    model.set_adapter("second")
    apply(model, {**OPTIONS, "window_size": 5})
    with pytest.warns(UserWarning, match="not with first: copy the sepllm.json"):
        model.save_pretrained(tmp_path / "after")
    assert [path.parent.name for path in (tmp_path / "after").rglob("sepllm.json")] == ["second"]
