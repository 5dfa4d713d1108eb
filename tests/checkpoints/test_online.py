"""Models with online transformations: what is loaded computes what was quantized, and nothing else takes it."""

import copy
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERYTHING, VOCABULARY, windows
from refusals import edit_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from trimfit.checkpoints import load_checkpoint
from trimfit.checkpoints.load import load
from trimfit.checkpoints.online import InputTransform, TransformedLinear
from trimfit.cli.main import run
from trimfit.errors import InputError
from trimfit.evaluate import score_text
from trimfit.models import find_blocks
from trimfit.pipelines import QuantizeConfig, quantize, quantize_checkpoint

NAMES = ("llama", "llama-tied", "qwen2", "gemma2", "phi3", "opt")
ONLINE = QuantizeConfig(transform="online", bits=4, group_size=8, block_size=8, rounding="nearest")
PACKED = QuantizeConfig(transform="none", bits=4, group_size=8, rounding="nearest")
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Made:
    """A directory that trimfit wrote, and the model quantized in memory. Neither is to be changed."""

    directory: Path
    model: PreTrainedModel


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Made]:
    """Makes one of a family, once."""
    done: dict[tuple[object, ...], Made] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, config: QuantizeConfig = ONLINE) -> Made:
        if (name, dtype, config) not in done:
            directory = tmp_path_factory.mktemp(name)
            model = EVERYTHING[name].build(dtype=dtype)
            spread_columns(model)
            model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=40)
            model.save_pretrained(directory / "model")
            word_tokenizer.save_pretrained(directory / "model")
            quantize_checkpoint(str(directory / "model"), directory / "out", config, device=torch.device("cpu"))
            quantize(model, config)
            done[name, dtype, config] = Made(directory / "out", model)
        return done[name, dtype, config]

    return make


@torch.no_grad()
def spread_columns(model: PreTrainedModel) -> None:
    """Makes columns of all sizes, so that a transformation is found for every group of layers."""
    generator = torch.Generator().manual_seed(0)
    for layer in (layer for block in find_blocks(model) for layer in block.layers):
        layer.write(layer.weight * torch.randn(layer.weight.shape[1], generator=generator).mul_(0.7).exp_())


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=windows(2)).logits.float()


def distance(found: PreTrainedModel, expected: PreTrainedModel) -> float:
    """‖difference‖ / ‖logits‖."""
    return ((logits(found) - logits(expected)).norm() / logits(expected).norm()).item()


def transformed(model: nn.Module) -> dict[str, TransformedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TransformedLinear)}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_when_merged(make: Callable[..., Made], name: str):
    made = make(name)
    merged = load(made.directory, merged=True)
    state = merged.state_dict()
    assert state.keys() == made.model.state_dict().keys()
    for key, tensor in made.model.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6)
    assert not transformed(merged) and not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_the_same_logits(make: Callable[..., Made], name: str, dtype: torch.dtype, bound: float):
    """In bfloat16 both sides round: one the weights, the other T⁻¹ and T⁻¹ x."""
    made = make(name, dtype)
    loaded = load(str(made.directory))
    assert transformed(loaded) and loaded.dtype == dtype and not loaded.training
    assert all(p.dtype == dtype for layer in transformed(loaded).values() for p in layer.state_dict().values())
    assert distance(loaded, made.model) < bound
    assert loaded.generation_config.max_length == 40
    tied = made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight
    assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)


def test_without_transformations_it_is_another_model(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch):
    made = make()
    loaded = load(made.directory)
    monkeypatch.setattr(InputTransform, "apply_blocks", lambda self, x: x)
    assert distance(loaded, made.model) > 0.3


@pytest.mark.parametrize(("group", "symmetric", "grids"), [(20, True, 2), (None, False, 1)])
def test_grids(make: Callable[..., Made], group: int | None, symmetric: bool, grids: int):
    """Groups of 20 give layers of two widths two grids."""
    made = make(config=ONLINE.model_copy(update={"symmetric": symmetric, "group_size": group, "bits": 3}))
    packed = json.loads((made.directory / "config.json").read_text())["quantization_config"]["packed"]
    assert len(packed["config_groups"]) == grids
    assert distance(load(made.directory), made.model) < 2e-5


def test_some_layers_only(make: Callable[..., Made]):
    made = make("llama", config=ONLINE.model_copy(update={"ignore": ("k_proj", "model.layers.0.*")}))
    loaded = load(made.directory)
    names = {name for name in EVERYTHING["llama"].layers if name != "self_attn.k_proj"}
    assert transformed(loaded).keys() == {f"model.layers.1.{name}" for name in names}
    assert distance(loaded, made.model) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_once_for_each_group(make: Callable[..., Made], name: str, monkeypatch: pytest.MonkeyPatch):
    loaded = load(make(name).directory)
    calls: Counter[InputTransform] = Counter()
    compute = InputTransform.apply_blocks

    def counted(self: InputTransform, x: Tensor) -> Tensor:
        calls[self] += 1
        return compute(self, x)

    monkeypatch.setattr(InputTransform, "apply_blocks", counted)
    logits(loaded)
    blocks = len(find_blocks(EVERYTHING[name].build()))
    assert len(calls) == blocks * len(EVERYTHING[name].groups) and set(calls.values()) == {1}
    readers = Counter(layer.input_transform for layer in transformed(loaded).values())
    assert all(transform.readers == count for transform, count in readers.items())
    assert sum(readers.values()) == blocks * len(EVERYTHING[name].layers)
    assert all(transform._last is None for transform in calls), "activations were kept"
    logits(loaded)
    assert set(calls.values()) == {2}


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_the_cache_changes_nothing(make: Callable[..., Made], name: str):
    made = make(name)
    loaded = load(made.directory)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "max_length": None}
    mask = torch.ones(2, 9, dtype=torch.long)
    found, expected = (
        model.generate(windows(2, 9), attention_mask=mask, use_cache=cache, **options)
        for model, cache in ((loaded, True), (loaded, False))
    )
    assert torch.equal(found, expected) and found.shape == (2, 21)
    assert torch.equal(found, made.model.generate(windows(2, 9), attention_mask=mask, **options))


@pytest.fixture
def shared() -> InputTransform:
    return InputTransform(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)), readers=3)


def test_blocks_of_the_input_are_multiplied(shared: InputTransform):
    x = torch.randn(2, 5, 32)
    expected = x @ torch.block_diag(*shared.inverse).T
    torch.testing.assert_close(shared(x), expected)
    torch.testing.assert_close(shared(x[0]), expected[0])
    torch.testing.assert_close(shared(x[0, 0]), expected[0, 0])
    assert shared(x[:, :0]).shape == (2, 0, 32)


def test_the_result_is_kept_while_the_input_lives(shared: InputTransform):
    x, other = torch.randn(5, 32), torch.randn(5, 32)
    result = shared(x)
    assert shared(x) is result
    shared(other)
    del x
    assert shared._last is not None, "the death of an input must not end what is kept of another"
    del other
    assert shared._last is None


def test_a_modified_input_is_another(shared: InputTransform):
    x = torch.randn(5, 32)
    before = shared(x).clone()
    x.mul_(2)
    torch.testing.assert_close(shared(x), 2 * before)
    x[0].zero_()  # through a view
    assert not shared(x)[0].any()


@torch.inference_mode()
def test_a_modified_input_is_another_in_inference_mode(shared: InputTransform):
    """Where tensors have no version."""
    x = torch.randn(5, 32)
    before = shared(x)
    x.mul_(2)
    torch.testing.assert_close(shared(x), 2 * before)


def test_gradients_go_through(shared: InputTransform):
    x = torch.randn(5, 32)
    with torch.no_grad():
        shared(x)
    x.requires_grad_()
    with torch.no_grad():
        assert not shared(x).requires_grad
    first, second = shared(x), shared(x)
    assert first is second and first.requires_grad
    (first.sum() + 2 * second.sum()).backward()
    expected = 3 * torch.block_diag(*shared.inverse).sum(0).expand(5, 32)
    torch.testing.assert_close(x.grad, expected)


def test_gradients_of_a_model_are_those_of_the_merged_one(make: Callable[..., Made]):
    made = make()
    gradients: list[Tensor] = []
    for merged in (False, True):
        model = load(made.directory, merged=merged)
        model(input_ids=windows(2), labels=windows(2)).loss.backward()
        gradients.append(model.get_input_embeddings().get_parameter("weight").grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_threads_may_share_a_model(make: Callable[..., Made]):
    loaded = load(make().directory)
    texts = [windows(1, length, seed) for seed, length in enumerate((5, 24, 11, 17) * 10)]
    with torch.no_grad():
        expected = [loaded(input_ids=text).logits for text in texts]

    def compute(text: Tensor) -> Tensor:
        with torch.no_grad():
            return loaded(input_ids=text).logits

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(compute, texts), expected, strict=True))


def test_copies_and_pickles(make: Callable[..., Made], shared: InputTransform):
    x = torch.randn(5, 32, requires_grad=True)
    result = shared(x)  # kept, with a gradient
    file = io.BytesIO()
    torch.save(shared, file)
    file.seek(0)
    for other in (copy.deepcopy(shared), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), result) and other(x) is not result
    loaded = load(make().directory)
    twin = copy.deepcopy(loaded)
    assert torch.equal(logits(twin), logits(loaded))
    attention = twin.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.input_transform is attention.v_proj.input_transform
    with pytest.raises(InputError, match="cannot be saved"):
        twin.save_pretrained("nowhere")


def test_other_dtypes(make: Callable[..., Made]):
    loaded = load(make().directory)
    expected = logits(loaded)
    moved = loaded.to(torch.float64)
    assert moved.get_submodule(UP).input_transform.inverse.dtype == torch.float64
    torch.testing.assert_close(logits(moved), expected, rtol=1e-4, atol=1e-4)


def test_compilers_see_one_graph(make: Callable[..., Made]):
    mlp = load(make().directory).get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        compiled = torch.compile(mlp, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))


def split(directory: Path) -> None:
    """Two shards, between which the parts of every layer are divided."""
    tensors = load_file(directory / "trimfit.safetensors")
    (directory / "trimfit.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"trimfit-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "trimfit.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def broken(make: Callable[..., Made], tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(make().directory, tmp_path / "broken")


@pytest.mark.parametrize("shards", [1, 2])
def test_plain_transformers_refuses(make: Callable[..., Made], broken: Path, shards: int):
    if shards == 2:
        split(broken)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(broken)
    assert distance(load(broken), make().model) < 2e-5
    assert len(AutoTokenizer.from_pretrained(broken)) == VOCABULARY


def test_it_cannot_be_saved_but_merged_it_can(make: Callable[..., Made], tmp_path: Path):
    made = make("llama-tied", torch.bfloat16)
    loaded = load(made.directory)
    with pytest.raises(InputError, match="cannot be saved as a plain checkpoint; copy the directory"):
        loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    merged = load(made.directory, merged=True)
    merged.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(plain), logits(merged))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(loaded.state_dict())


def test_it_is_no_model_to_start_from(make: Callable[..., Made]):
    made = make()
    with pytest.raises(InputError, match="LlamaForCausalLM is already quantized; start from the full model"):
        find_blocks(load(made.directory))
    with pytest.raises(InputError, match="out is quantized already; start from the full-precision model"):
        load_checkpoint(str(made.directory))
    assert find_blocks(load(made.directory, merged=True))


def test_one_verb_for_all(make: Callable[..., Made], tmp_path: Path):
    packed = make(config=PACKED)
    assert (packed.directory / "model.safetensors").is_file()
    assert torch.equal(logits(load(packed.directory)), logits(packed.model))
    packed.model.save_pretrained(tmp_path / "dense")
    for merged in (False, True):
        dense = load(tmp_path / "dense", merged=merged)
        assert torch.equal(logits(dense), logits(packed.model)) and not dense.training


def message(directory: Path) -> str:
    """Of the error, without the directory's own name."""
    with pytest.raises(InputError) as error:
        load(directory)
    text = str(error.value)
    assert "\n" not in text
    return text.replace(str(directory), "MODEL")


def change(directory: Path, tensors: dict[str, Tensor | None]) -> None:
    """Replaces tensors, or leaves them out."""
    file = directory / "trimfit.safetensors"
    kept = {name: tensor for name, tensor in (load_file(file) | tensors).items() if tensor is not None}
    save_file(kept, file)


def test_no_weights(broken: Path):
    (broken / "trimfit.safetensors").rename(broken / "model.safetensors")
    assert message(broken) == (
        "MODEL has no weights (trimfit.safetensors or trimfit.safetensors.index.json): "
        "the download is incomplete, fetch it again"
    )


def test_a_truncated_file(broken: Path):
    file = broken / "trimfit.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert message(broken).startswith("MODEL/trimfit.safetensors is truncated or damaged (")


def test_a_missing_shard(broken: Path):
    split(broken)
    (broken / "trimfit-00002-of-00002.safetensors").unlink()
    assert message(broken) == (
        "MODEL lacks the shard trimfit-00002-of-00002.safetensors: the download is incomplete, fetch it again"
    )


@pytest.mark.parametrize("part", ["input_transform", "weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_part(broken: Path, part: str):
    change(broken, {f"{DOWN}.{part}": None})
    assert message(broken) == f"MODEL lacks {DOWN}.{part}: the checkpoint is incomplete, copy it again"


def test_a_missing_weight(broken: Path):
    change(broken, {"model.norm.weight": None})
    assert message(broken) == (
        "the checkpoint MODEL lacks 1 weights, model.norm.weight first: the download is incomplete or config.json "
        "belongs to another model"
    )


def test_unknown_weights_are_told_of(broken: Path, caplog: pytest.LogCaptureFixture):
    change(broken, {"extra": torch.zeros(3)})
    load(broken)
    assert "1 weights of" in caplog.text and "unknown to the model and left out, extra first" in caplog.text


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_part_of_another_shape(broken: Path, part: str):
    tensor = load_file(broken / "trimfit.safetensors")[f"{DOWN}.{part}"]
    change(broken, {f"{DOWN}.{part}": tensor[:, 1:].clone()})
    wrong = (len(tensor), tensor.shape[1] - 1)
    assert message(broken) == (
        f"{DOWN}.{part} of MODEL is {wrong} instead of {tuple(tensor.shape)}: the checkpoint is damaged, "
        "quantize the model again"
    )


@pytest.mark.parametrize("shape", [(5, 8, 8), (6, 8, 4), (48,)])
def test_a_transformation_of_another_shape(broken: Path, shape: tuple[int, ...]):
    change(broken, {f"{DOWN}.input_transform": torch.zeros(shape)})
    assert message(broken) == (
        f"{DOWN}.input_transform of MODEL is {shape}, which are no square blocks for 48 inputs: the checkpoint is "
        "damaged, quantize the model again"
    )


@pytest.mark.parametrize("form", ["online", "packed"])
def test_a_config_of_another_model(make: Callable[..., Made], broken: Path, form: str):
    if form == "packed":
        shutil.copytree(make(config=PACKED).directory, broken, dirs_exist_ok=True)
    edit_config(broken, intermediate_size=40)
    text = message(broken)
    assert text.startswith("weights of MODEL have other shapes than config.json says, model.layers.")
    assert text.endswith("_proj.weight first")


@pytest.mark.parametrize(
    "values",
    [
        {"packed": None},
        {"transforms": 3},
        {"packed": {"config_groups": {}}},
        {"packed": {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 9}}}}},
    ],
    ids=str,
)
def test_a_damaged_quantization_config(broken: Path, values: dict[str, Any]):
    path = broken / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))
    assert message(broken) == "the quantization_config of MODEL is damaged: quantize the model again"


def test_a_transformation_of_no_layer(broken: Path):
    path = broken / "config.json"
    config = json.loads(path.read_text())
    transforms = config["quantization_config"]["transforms"]
    transforms["model.layers.7.mlp.up_proj"] = transforms[UP]
    path.write_text(json.dumps(config))
    assert message(broken) == (
        "MODEL lacks model.layers.7.mlp.up_proj.weight_packed: the checkpoint is incomplete, copy it again"
    )


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs the command in this process: its exit status, and what it wrote."""
    log = logging.getLogger("trimfit")
    monkeypatch.setattr(log, "handlers", log.handlers)
    monkeypatch.setattr(log, "propagate", log.propagate)
    verbosity = transformers_logging.get_verbosity()

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    yield command
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("config", [ONLINE, PACKED], ids=["online", "packed"])
def test_the_command_scores_but_does_not_compress_it(
    make: Callable[..., Made], command: Callable[..., Any], tmp_path: Path, config: QuantizeConfig
):
    made = make(config=config)
    words = " ".join(f"w{token}" for token in windows(1, 200)[0].tolist())
    (tmp_path / "text.txt").write_text(words)
    status, printed, _ = command("eval", made.directory, "--text", tmp_path / "text.txt", "--window", 20, "--json")
    expected = score_text(made.model, AutoTokenizer.from_pretrained(made.directory), [words], length=20)
    assert status == 0 and json.loads(printed)["nats"] == pytest.approx(expected.nats, rel=1e-6)
    for verb in ("prune", "quantize"):
        status, printed, error = command(verb, made.directory, "-o", tmp_path / "new")
        assert (status, printed) == (2, "")
        assert error == f"error: {made.directory} is quantized already; start from the full-precision model\n"
    assert not (tmp_path / "new").exists()
