"""Models under ``apply`` against the same models under an explicit mask: logits and gradients."""

import copy
import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import tokenizers
import torch
import transformers
from small_models import ARCHITECTURES, SEPARATORS, VOCABULARY, bias_of, make_ids, make_model
from transformers import DynamicCache

from vllm_sepllm.config import ConfigError
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.oracle.dense_mask import KeptAfter, sepllm_mask
from vllm_sepllm.training import apply
from vllm_sepllm.training.attention import sepllm_attention
from vllm_sepllm.training.step import Step

pytestmark = pytest.mark.training

SINKS, WINDOW = 3, 20
SIZES = {"num_sink_tokens": SINKS, "window_size": WINDOW}
OPTIONS = {"separator_token_ids": SEPARATORS, **SIZES}
LISTED = {"keep": list(SEPARATORS), **SIZES}
EQUAL = 1e-9  # logits of order 1 in float64; models compute their norms in float32


def mask_of(ids, **options):
    return sepllm_mask(ids, SEPARATORS, SINKS, WINDOW, **options)


def attentions(model):
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]


def masked_logits(model, ids, mask, dense=()):
    """Of one text under an explicit mask; dense layers see every earlier token."""

    def see_everything(module, args, kwargs):
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        return args, {**kwargs, "attention_mask": bias_of(causal)}

    with ExitStack() as hooks:
        for layer in attentions(model):
            if layer.layer_idx in dense:
                hook = layer.register_forward_pre_hook(see_everything, with_kwargs=True)
                hooks.callback(hook.remove)
        return model(input_ids=torch.tensor([ids]), attention_mask=bias_of(mask)).logits[0]


def gradients(model, logits):
    """Of a weighted sum of logits, by parameter."""
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=rng, dtype=logits.dtype)
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(found, wanted):
    for name, grad in wanted.items():
        error = (found[name] - grad).norm() / grad.norm()
        assert error < EQUAL, name


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def plain(architecture):
    return make_model(architecture)


@pytest.fixture
def model(architecture):
    return make_model(architecture)


RULES = {
    "separators": (OPTIONS, {}),
    "a bound": ({**OPTIONS, "max_separator_tokens": 4}, {"max_separators": 4}),
    "no sinks": ({**OPTIONS, "num_sink_tokens": 0}, {}),
    "what follows them": (
        {**LISTED, "keep_after": 3, "segment_ends": [9]},
        {"after": KeptAfter(dict.fromkeys(SEPARATORS, 3), {9})},
    ),
    "an interval": (
        {
            "policy": "fixed_interval",
            "interval": 5,
            "num_sink_tokens": SINKS,
            "window_size": WINDOW,
        },
        {"interval": 5},
    ),
    "sinks and window": (
        {"policy": "streaming", "num_sink_tokens": SINKS, "window_size": WINDOW},
        {},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    options, of_mask = RULES[rule]
    plain, model = make_model(), make_model()
    apply(model, options)
    [ids] = make_ids(300)
    listed = SEPARATORS if "separator_token_ids" in options or "keep" in options else ()
    mask = sepllm_mask(ids, listed, options["num_sink_tokens"], WINDOW, **of_mask)
    wanted = masked_logits(plain, ids, mask)
    found = model(input_ids=torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < EQUAL
    assert_equal_gradients(gradients(model, found), gradients(plain, wanted))


def test_classes_by_name():
    """Kept are those of the tokenizer's words, which the test reads itself."""
    plain, model = make_model(), make_model()
    apply(model, {"keep": ["digits", "capitalized"], **SIZES}, words())
    kept = [i for i in range(VOCABULARY) if i % 5 in (1, 2)]
    [ids] = make_ids(300)
    wanted = masked_logits(plain, ids, sepllm_mask(ids, kept, SINKS, WINDOW))
    found = model(input_ids=torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < EQUAL
    assert_equal_gradients(gradients(model, found), gradients(plain, wanted))


def words():
    """A tokenizer of which one word of five is capitalized, and one is a number."""
    beginnings = "w", "N", "", "o", "l"
    texts = [str(i) if i % 5 == 2 else beginnings[i % 5] + "x" * i for i in range(VOCABULARY)]
    model = tokenizers.models.WordLevel({text: i for i, text in enumerate(texts)}, texts[0])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = sys.modules["triton"] = sys.modules["xformers"] = None  # importing them fails
import torch
from small_models import SEPARATORS, make_ids, make_model
from vllm_sepllm.training import apply
model = make_model()
apply(model, {"num_sink_tokens": 3, "window_size": 20, "separator_token_ids": SEPARATORS})
ids = torch.tensor(make_ids(200))
model(input_ids=ids, labels=ids).loss.backward()
print(float(model.get_input_embeddings().weight.grad.norm()) > 0)
"""


def test_it_needs_no_vllm():
    """Nor what vLLM brings with it."""
    command = [sys.executable, "-c", WITHOUT_VLLM]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["True"], done.stderr[-2000:]


def test_logits_and_gradients(plain, model):
    """Two texts, with and without gradient checkpointing."""
    texts = make_ids(280, 280)
    apply(model, OPTIONS)
    wanted = torch.stack([masked_logits(plain, ids, mask_of(ids)) for ids in texts])
    expected = gradients(plain, wanted)
    found = model(input_ids=torch.tensor(texts)).logits
    assert (found - wanted).abs().max() < EQUAL
    assert_equal_gradients(gradients(model, found), expected)
    model.gradient_checkpointing_enable()
    model.train()
    again = model(input_ids=torch.tensor(texts)).logits
    assert_equal_gradients(gradients(model, again), expected)


@pytest.mark.parametrize("dense", [(0,), (0, -1)], ids=["H", "H/T"])
def test_dense_layers(plain, model, dense):
    [ids] = make_ids(200)
    attached = apply(model, {**OPTIONS, "dense_layers": dense})
    wanted = masked_logits(plain, ids, mask_of(ids), attached.layers.indices)
    found = model(input_ids=torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < EQUAL
    assert_equal_gradients(gradients(model, found), gradients(plain, wanted))


@pytest.mark.parametrize("dense", [(), (1,)], ids=["kept", "one layer dense"])
def test_packed_texts(plain, model, dense):
    """Texts one behind the other in a row, which their positions tell apart."""
    texts = make_ids(90, 1, 160, 33)
    apply(model, {**OPTIONS, "dense_layers": dense})
    row = [token for ids in texts for token in ids]
    positions = [place for ids in texts for place in range(len(ids))]
    given = {"input_ids": torch.tensor([row]), "position_ids": torch.tensor([positions])}
    found = model(**given).logits[0]
    wanted = [masked_logits(plain, ids, mask_of(ids), dense) for ids in texts]
    assert (found - torch.cat(wanted)).abs().max() < EQUAL
    expected = gradients(plain, torch.cat(wanted))
    assert_equal_gradients(gradients(model, found), expected)


def padded(side, *lengths):
    """Texts in rows of the longest one's length: ids, which are tokens, and positions."""
    texts, length = make_ids(*lengths), max(lengths)
    rows = torch.zeros(len(texts), length, dtype=torch.long)
    real = torch.zeros_like(rows)
    for row, ids in enumerate(texts):
        at = slice(length - len(ids), None) if side == "left" else slice(len(ids))
        rows[row, at], real[row, at] = torch.tensor(ids), 1
    return texts, rows, real, (real.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(plain, model, side):
    """It is not seen, and the embedding of its id gets no gradient from the texts."""
    apply(model, {**OPTIONS, "dense_layers": [1]})
    texts, rows, real, positions = padded(side, 150, 220)
    output = model(input_ids=rows, attention_mask=real, position_ids=positions)
    found = output.logits[real.bool()]
    wanted = torch.cat([masked_logits(plain, ids, mask_of(ids), (1,)) for ids in texts])
    assert (found - wanted).abs().max() < EQUAL
    assert_equal_gradients(gradients(model, found), gradients(plain, wanted))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_be_no_number(side):
    """Its queries, keys and values reach nothing, and their gradients are zero."""
    _, rows, real, _ = padded(side, 150, 220)
    attached = apply(make_model(), OPTIONS)
    inputs = {"input_ids": rows, "attention_mask": real}
    step = Step.of(attached.pattern, attached.layers, 3, inputs)
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 220, 8) for heads in (6, 2, 2))
    tensors = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    is_padding = (real == 0)[:, None, :, None]
    spoilt = [t.masked_fill(is_padding, float("nan")).requires_grad_() for t in tensors]
    layer = attentions(make_model())[0]
    output, _ = sepllm_attention(layer, *spoilt, None, sepllm_step=step)
    clean, _ = sepllm_attention(layer, *tensors, None, sepllm_step=step)
    assert torch.equal(output, clean)
    output.square().sum().backward()
    for tensor in spoilt:
        at = is_padding.expand_as(tensor)
        assert not tensor.grad[at].any()
        assert tensor.grad[~at].isfinite().all()


def test_generate(plain, model):
    """Greedy tokens, of texts of unequal length, against the mask's own."""
    apply(model, {**OPTIONS, "max_separator_tokens": 5, "dense_layers": [-1]})
    texts, rows, real, _ = padded("left", 60, 100)
    options = {"attention_mask": real, "max_new_tokens": 30, "do_sample": False}
    generated = model.generate(rows, pad_token_id=0, **options)[:, 100:]
    for ids, new in zip(texts, generated.tolist(), strict=True):
        text = [*ids, *new]
        mask = mask_of(text, max_separators=5)
        best = masked_logits(plain, text, mask, (2,)).argmax(-1).tolist()
        assert new == best[len(ids) - 1 : -1]


def test_a_prompt_in_pieces(plain, model):
    """Through the cache of keys and values, whose tokens are known though it holds no ids."""
    apply(model, OPTIONS)
    [ids] = make_ids(150)
    cache, found = None, []
    for piece in (ids[:60], ids[60:61], ids[61:150]):
        output = model(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    wanted = masked_logits(plain, ids, mask_of(ids))
    assert (torch.cat(found) - wanted).abs().max() < EQUAL


def test_texts_in_a_cache_with_padding_between(plain, model):
    """A second turn of a padded batch: padding stands in the middle of a row, wherever positions
    come from. And a text that begins at the first token of a later piece sees nothing before it."""
    apply(model, OPTIONS)
    [first, second] = make_ids(60, 40)
    text = [*first, *second]
    row = torch.tensor([[*first, 0, 0, 0, *second]])
    real = torch.ones_like(row)
    real[0, 60:63] = 0
    wanted = masked_logits(plain, text, mask_of(text))[60:]
    for positions in (None, (real.cumsum(1) - 1).masked_fill(real == 0, 0)):
        own = {} if positions is None else {"position_ids": positions}
        whole = model(input_ids=row, attention_mask=real, **own).logits[0, 63:]
        if positions is not None:  # otherwise they count the padding, and angles differ
            assert (whole - wanted).abs().max() < EQUAL
        given = {name: part[:, :63] for name, part in own.items()}
        before = {"input_ids": row[:, :63], "attention_mask": real[:, :63], **given}
        cache = model(**before, use_cache=True).past_key_values
        given = {name: part[:, 63:] for name, part in own.items()}
        rest = {"input_ids": row[:, 63:], "attention_mask": real, **given}
        found = model(**rest, past_key_values=cache).logits[0]
        assert (found - whole).abs().max() < EQUAL
    cache = model(input_ids=torch.tensor([first]), use_cache=True).past_key_values
    given = {"input_ids": torch.tensor([second]), "position_ids": torch.arange(40)[None]}
    found = model(**given, past_key_values=cache).logits[0]
    assert (found - masked_logits(plain, second, mask_of(second))).abs().max() < EQUAL


def test_positional_arguments(plain, model):
    apply(model, OPTIONS)
    [ids] = make_ids(60)
    given = torch.tensor([ids])
    found = model.get_decoder()(given, torch.ones_like(given)).last_hidden_state
    wanted = model(input_ids=given, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("use_cache", [False, True])
def test_autocast(use_cache):
    """Rotary embeddings leave queries in float32 where values are in bfloat16."""
    model, other = make_model().float(), make_model().float()
    apply(model, {**OPTIONS, "window_size": 500})
    given = torch.tensor(make_ids(80, 80))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (m(input_ids=given, use_cache=use_cache).logits for m in (model, other))
        ours.sum().backward()
    exact = make_model()(input_ids=given).logits
    allowed = 2 * (theirs.double() - exact).abs().mean()
    assert (ours.double() - exact).abs().mean() <= allowed


def test_beams():
    """Beams are reordered, and the ids with them."""
    plain, model = make_model(), make_model()
    apply(model, OPTIONS)
    [ids] = make_ids(50)
    options = {"max_new_tokens": 25, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(torch.tensor([ids]), **options)
    text = found.sequences[0].tolist()
    with torch.no_grad():
        logits = masked_logits(plain, text, mask_of(text)).log_softmax(-1)
    score = sum(float(logits[place - 1, text[place]]) for place in range(len(ids), len(text)))
    assert float(found.sequences_scores[0]) == pytest.approx(score / 25, abs=1e-6)


EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32}


@pytest.mark.parametrize(("architecture", "more"), [("Qwen3", {}), ("Qwen2Moe", EXPERTS)])
def test_layers_with_a_window_of_their_own_keep_it(architecture, more):
    """Qwen2-MoE does not name it when it calls attention."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    options = {"layer_types": kinds, "sliding_window": 16, "use_sliding_window": True, **more}
    plain, model = make_model(architecture, **options), make_model(architecture, **options)
    if more:
        for each in (plain, model):
            each.set_experts_implementation("eager")  # others have no float64
    apply(model, OPTIONS)
    [ids] = make_ids(120)

    def slide(module, args, kwargs):
        return args, {**kwargs, "attention_mask": bias_of(sepllm_mask(ids, (), 0, 16))}

    hook = attentions(plain)[1].register_forward_pre_hook(slide, with_kwargs=True)
    wanted = masked_logits(plain, ids, mask_of(ids))
    hook.remove()
    found = model(input_ids=torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < EQUAL
    cache = model(input_ids=torch.tensor([ids[:70]]), use_cache=True).past_key_values
    rest = model(input_ids=torch.tensor([ids[70:]]), past_key_values=cache).logits[0]
    assert (rest - wanted[70:]).abs().max() < EQUAL


def test_compiled():
    """Around what is worked out in numpy: padding, logits and gradients."""
    plain, model = make_model(), make_model()
    for each in (plain, model):
        apply(each, OPTIONS)
    compiled = torch.compile(model, backend="eager")
    _, rows, real, _ = padded("left", 60, 100)
    for given in ({"input_ids": rows}, {"input_ids": rows, "attention_mask": real}):
        wanted, found = plain(**given).logits, compiled(**given).logits
        assert torch.equal(found, wanted)
        assert_equal_gradients(gradients(model, found), gradients(plain, wanted))


def test_a_window_over_everything_is_full_attention():
    plain, model = make_model(), make_model()
    apply(model, {**OPTIONS, "window_size": 500})
    [ids] = make_ids(300)
    given = torch.tensor([ids])
    assert (model(input_ids=given).logits - plain(input_ids=given).logits).abs().max() < EQUAL


def test_put_in_and_taken_out():
    plain, model = make_model(), make_model()
    [ids] = make_ids(100)
    given = torch.tensor([ids])
    first = apply(model, OPTIONS)
    copied = copy.deepcopy(model)
    second = apply(model, {**OPTIONS, "window_size": 5})  # in the place of the first
    assert (copied(input_ids=given).logits - model(input_ids=given).logits).abs().max() > 1e-3
    wanted = masked_logits(plain, ids, mask_of(ids))
    assert (copied(input_ids=given).logits[0] - wanted).abs().max() < EQUAL
    first.remove()  # nothing: it is out already
    second.remove()
    assert torch.equal(model(input_ids=given).logits, plain(input_ids=given).logits)


def test_the_rule_travels_with_the_model(tmp_path):
    model = make_model()
    options = {**OPTIONS, "max_separator_tokens": 7, "dense_layers": [0], "planned_kept_share": 0.3}
    apply(model, options)
    model.save_pretrained(tmp_path)
    carried = json.loads((tmp_path / "config.json").read_text())["sepllm"]
    del options["planned_kept_share"]  # of a server's memory, not of the mask
    assert carried == {**options, "separator_token_ids": list(SEPARATORS)}
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert apply(loaded).config == apply(model).config
    [ids] = make_ids(100)
    given = torch.tensor([ids])
    assert torch.equal(loaded(input_ids=given).logits, model(input_ids=given).logits)


def test_two_models_of_one_config():
    """Transformers keeps the object: a rule would be saved with the other model, too."""
    first = make_model()
    second = type(first)(first.config)
    apply(first, OPTIONS)
    with pytest.raises(ConfigError, match="shared with another model under a rule"):
        apply(second, {**OPTIONS, "window_size": 5})
    assert first.config.sepllm["window_size"] == OPTIONS["window_size"]
    [ids] = make_ids(100)
    wanted = masked_logits(make_model(), ids, mask_of(ids))
    assert (first(input_ids=torch.tensor([ids])).logits[0] - wanted).abs().max() < EQUAL


def test_a_reference_model_is_told_what_to_do():
    """TRL makes one with ``attn_implementation="sepllm"``, which it reads off the model."""
    model = make_model()
    apply(model, OPTIONS)
    reference = make_model(attn_implementation="sepllm")
    with pytest.raises(ValueError, match=r"load a reference model .* attn_implementation='sdpa'"):
        reference(input_ids=torch.tensor(make_ids(30)))


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone: that of an engine, if one lives here."""
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == 1
        yield
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_fsdp_in_a_smaller_type(one_process):
    """It hands each layer copies of what it is given, tensors in bfloat16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model().float()
    apply(model, OPTIONS)
    given = torch.tensor(make_ids(100))
    wanted = model(input_ids=given).logits
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (1,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    found = model(input_ids=given, labels=given)
    found.loss.backward()
    assert found.logits.dtype == torch.bfloat16
    agree = found.logits.argmax(-1) == wanted.argmax(-1)
    assert agree.float().mean() > 0.8
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"position_mode": "cache"}, "position_mode='cache': training uses the positions"),
        (None, "no options were given"),
        ({}, "no tokenizer"),
        ({**OPTIONS, "dense_layers": [7]}, "dense_layers holds 7"),
        ({**OPTIONS, "windowsize": 7}, "unknown SepLLM option 'windowsize'"),
        ({"separator_token_ids": [500]}, "token id 500"),
    ],
)
def test_refused_options(options, sentence):
    with pytest.raises((ConfigError, ValueError), match=sentence):
        apply(make_model(), options)


def test_refused_models():
    with pytest.raises(ConfigError, match="attention code of its own"):
        apply(make_model("GPTJ", n_embd=48, n_layer=2, n_head=6, rotary_dim=4), OPTIONS)
    kinds = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="layers of the types chunked_attention"):
        apply(make_model("Qwen3", layer_types=kinds), OPTIONS)
    with pytest.raises(ConfigError, match="Linear is no causal language model"):
        apply(torch.nn.Linear(2, 2), OPTIONS)
    with pytest.raises(ConfigError, match="have a sliding window"):
        apply(make_model("Mistral", sliding_window=16), OPTIONS)
    with pytest.raises(ConfigError, match="caps its logits"):
        apply(make_model("Gemma2", head_dim=8), OPTIONS)


def test_refused_models_are_as_they_were():

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    both_ways = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=96, intermediate_size=64, **sizes)
    )
    no_layers = transformers.ModernBertDecoderForCausalLM(
        transformers.ModernBertDecoderConfig(vocab_size=96, pad_token_id=0, **sizes)
    )
    for model, sentence in ((both_ways, "is not causal"), (no_layers, "which has no layers")):
        given = torch.tensor(make_ids(30))
        wanted = model.eval()(input_ids=given).logits
        with pytest.raises(ConfigError, match=sentence):
            apply(model, OPTIONS)
        assert torch.equal(model(input_ids=given).logits, wanted)


def test_generate_in_the_middle_of_training():
    """Gradient checkpointing keeps no cache; without it nothing has to be done."""
    model = make_model()
    apply(model, OPTIONS)
    given = torch.tensor(make_ids(40))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(given, **options)
    assert torch.equal(model.train().generate(given, **options), wanted)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"cache's 0 tokens the ids of 40 .* call model\.eval\(\)"):
        model.generate(given, **options)
    assert torch.equal(model.eval().generate(given, **options), wanted)


def test_a_cache_filled_with_padding_in_its_positions():
    """``generate`` counts tokens alone: what it goes on with is no other text."""
    model = make_model()
    apply(model, OPTIONS)
    _, rows, real, _ = padded("left", 60, 100)
    cache = model(rows[:, :-1], attention_mask=real[:, :-1], use_cache=True).past_key_values
    given = {"attention_mask": real, "past_key_values": cache, "pad_token_id": 0}
    with pytest.raises(ValueError, match="go on from 98 in the cache to 59: they rise"):
        model.generate(rows, max_new_tokens=3, **given)


def test_a_vocabulary_that_grows():
    """New tokens may be kept ones: what was found at first is not gone on with."""
    model = make_model()
    apply(model, OPTIONS)
    model.resize_token_embeddings(128)
    given = torch.tensor(make_ids(40))
    with pytest.raises(ValueError, match=r"had 96 tokens .* and has 128 now: call apply again"):
        model(input_ids=given)
    apply(model, OPTIONS)
    assert model(input_ids=given).logits.isfinite().all()


def test_layers_that_hand_nothing_on():
    model = make_model("StableLm")
    apply(model, OPTIONS)
    with pytest.raises(ValueError, match="do not hand arguments on to attention"):
        model(input_ids=torch.tensor(make_ids(30)))


def test_refused_inputs():
    """One sentence each, and the model goes on."""
    model = make_model(attention_dropout=0.1)
    apply(model, OPTIONS)
    [ids] = make_ids(40)
    given = torch.tensor([ids])
    embeddings = model.get_input_embeddings()(given)
    wanted = model(input_ids=given).logits
    four = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    for inputs, sentence in (
        ({"inputs_embeds": embeddings}, "give input_ids"),
        ({"input_ids": given, "attention_mask": four}, "attention_mask is \\[1, 1, 40, 40\\]"),
        ({"input_ids": given, "attention_mask": 0 * given}, "nothing but padding"),
        ({"input_ids": given, "position_ids": given[:, :7]}, "position_ids are \\[1, 7\\]"),
        ({"input_ids": given, "position_ids": given.repeat(3, 1)}, "position_ids are \\[3, 40\\]"),
        ({"input_ids": given, "is_causal": False}, "no token sees a later one"),
        ({"input_ids": given, "cu_seq_lens_q": torch.tensor([0, 40])}, "without position_ids"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(**inputs)
    with pytest.raises(ValueError, match=r"dropout is 0\.1.* attention_dropout=0\.0"):
        model.train()(input_ids=given)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 6, "attn_pdrop": 0.1}
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, **sizes))
    apply(other, OPTIONS)
    with pytest.raises(ValueError, match=r"dropout is 0\.1.* attn_pdrop=0\.0"):
        other.train()(input_ids=given)
    model.eval()
    cache = make_model()(input_ids=given, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the ids of 0 are known"):
        model(input_ids=given, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="attention_mask is"):
        model(input_ids=given, attention_mask=four, past_key_values=cache)
    again = model(input_ids=given, past_key_values=cache).logits
    assert torch.equal(again, wanted), "the refused call left something in the cache"
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(ValueError, match="moved off the device"):
        model(input_ids=given, past_key_values=cache)
    with pytest.raises(ValueError, match="fixed length"):
        model.generate(given, cache_implementation="static", max_new_tokens=3, pad_token_id=0)
    step = Step.of(apply(make_model(), OPTIONS).pattern, LayerPlan(), 3, {"input_ids": given})
    three = (torch.zeros(1, 6, 40, 8),) * 3
    with pytest.raises(ValueError, match="a mask of its own"):
        sepllm_attention(attentions(model)[0], *three, four, sepllm_step=step)
    with pytest.raises(ValueError, match="without the hook"):
        sepllm_attention(attentions(model)[0], *(embeddings[None],) * 3, None)
    assert torch.equal(model(input_ids=given).logits, wanted)
