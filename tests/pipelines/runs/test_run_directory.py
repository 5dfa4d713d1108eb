"""What is finished of a prune survives, is used when it is whole and its own, and never otherwise."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import FAMILIES, LENGTH, windows
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from trimfit import CalibrationConfig, InputError, PruneConfig, PruneReport, RunError, prune_checkpoint
from trimfit.checkpoints.patch import PatchedShards
from trimfit.checkpoints.shards import read_spans
from trimfit.pipelines import resume
from trimfit.pipelines.pruning import prune as pruning_module
from trimfit.pipelines.pruning.records import LayerRecord
from trimfit.pipelines.runs import directory as runs_directory
from trimfit.pipelines.runs.directory import RunDirectory
from trimfit.pipelines.runs.journal import Journal

CPU = torch.device("cpu")
CONFIG = PruneConfig(selector="wanda", held_out=0.25)
LAYERS, GROUPS = 2 * 7, 2 * 4
NEVER = 10**6


class _Killed(BaseException):
    """Ends a run as nothing in it expects."""


class _Killer:
    """Ends the run after so many layers; counts those that were worked on."""

    def __init__(self, after: int = NEVER) -> None:
        self.after, self.seen = after, 0

    def stage(self, text: str) -> None:
        pass

    def layer(self, record: LayerRecord, done: float) -> None:
        self.seen += 1
        if self.seen > self.after:
            raise _Killed


@pytest.fixture
def source(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "model", max_shard_size=20_000)
    word_tokenizer.save_pretrained(tmp_path / "model")
    numpy.save(tmp_path / "tokens.npy", windows(12).numpy())
    return tmp_path / "model"


def start(source: Path, name: str = "out", after: int = NEVER, **options: Any) -> PruneReport:
    calibration = CalibrationConfig(
        source=str(source.parent / "tokens.npy"),
        samples=12,
        own_samples=options.pop("own_samples", 0),
        sequence_length=LENGTH,
    )
    config = options.pop("config", CONFIG)
    observer = options.pop("observer", None) or _Killer(after)
    return prune_checkpoint(
        str(source), source.parent / name, config, calibration, device=CPU, observer=observer, **options
    )


@pytest.fixture
def run(source: Path) -> Iterator[Path]:
    """A run that was ended after the first block, o and, half, gate and up of the second."""
    with pytest.raises(_Killed) as caught:
        start(source, after=7 + 4 + 1)
    run = source.parent / "out.run"
    assert caught.value.__notes__ == [
        f"what is finished is in {run}: the same command, or trimfit resume {source.parent / 'out'}, goes on"
    ]
    assert len(list(run.glob("part-*.safetensors"))) == 4 + 2
    yield run


def assert_as_if_nothing_had_happened(source: Path) -> None:
    start(source, "plain")
    out, plain = source.parent / "out", source.parent / "plain"
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (plain / name).read_bytes() for name in names - {"trimfit.json"})
    records = [json.loads((directory / "trimfit.json").read_text())["layers"] for directory in (out, plain)]
    for record in (*records[0], *records[1]):
        del record["seconds"], record["peak_memory"]
    assert records[0] == records[1]
    assert not (source.parent / "out.run").exists()


@pytest.mark.parametrize("offload", [False, True])
def test_the_same_call_goes_on(source: Path, run: Path, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another way, if need be; what is finished is not done again."""
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("part-*")}
    made: list[str] = []
    monkeypatch.setattr(pruning_module, "prune_layer", counted(made))
    with pytest.raises(_Killed):
        start(source, offload=offload, after=LAYERS - 1)
    if offload:  # the first block is in the result now
        before = {
            name: time for name, time in before.items() if name not in {f"part-0000{i}.safetensors" for i in range(4)}
        }
        assert any((run / "result").glob("*.safetensors"))
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("part-*") if path.name in before} == before
    start(source, offload=offload)
    assert sorted(name for name in made if name.startswith("model.layers.0")) == []
    assert len(made) == 7 - 4 + 1  # down twice: it was killed before it was kept
    assert_as_if_nothing_had_happened(source)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_was_offloaded_goes_on_in_memory(
    source: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And does a block again that is damaged in the result."""
    with pytest.raises(_Killed):
        start(source, offload=True, after=LAYERS - 3)
    assert not any((source.parent / "out.run").glob("part-0000[0-3]*"))
    if damaged:
        flip_in_result(source, "model.layers.0.self_attn.v_proj.weight")
    made: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(pruning_module, "prune_layer", counted(made))
        start(source)
    assert len([name for name in made if ".0." in name]) == (7 if damaged else 0)
    assert (f"{source.parent / 'out.run' / 'result'} is damaged: it is done again" in caplog.text) == damaged
    assert_as_if_nothing_had_happened(source)


@pytest.mark.parametrize("split", [20_000, 10**9])
def test_a_file_of_the_result_that_was_cut_off_is_copied_again(
    source: Path, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all blocks that it held done again, and no others."""
    for file in source.glob("model*"):
        file.unlink()
    FAMILIES["llama"].build(num_hidden_layers=3).save_pretrained(source, max_shard_size=split)
    with pytest.raises(_Killed):
        start(source, offload=True, after=20)  # two blocks are in the result
    cut = source.parent / "out.run" / "result" / "model.safetensors"
    if split < 10**9:
        cut = cut.with_name(weight_map(source)["model.layers.1.mlp.up_proj.weight"])
    cut.write_bytes(cut.read_bytes()[:-1000])
    made: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(pruning_module, "prune_layer", counted(made))
        start(source, offload=True)
    assert any(".0." in name for name in made) == (split == 10**9)
    assert len([name for name in made if ".1." in name]) == 7
    assert_as_if_nothing_had_happened(source)


def test_a_run_begun_again_takes_nothing_of_the_one_before(source: Path) -> None:
    """Its journal is removed, as the refusal says; its result, here of another model, must go as well."""
    with pytest.raises(_Killed):
        start(source, offload=True, after=LAYERS - 3)
    FAMILIES["llama"].build(seed=1).save_pretrained(source, max_shard_size=20_000)
    with pytest.raises(InputError, match=r"journal\.jsonl is of another run, .*, or remove it to begin again"):
        start(source, offload=True)
    (source.parent / "out.run" / "journal.jsonl").unlink()
    start(source, offload=True)
    assert_as_if_nothing_had_happened(source)


def flip_in_result(source: Path, name: str) -> None:
    """Flips a bit of a tensor in the files of the result."""
    file = source.parent / "out.run" / "result" / weight_map(source)[name]
    data = bytearray(file.read_bytes())
    data[read_spans(file)[name][0] + 5] ^= 16
    file.write_bytes(data)


def weight_map(source: Path) -> dict[str, str]:
    return json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]


def test_killed_while_the_new_output_takes_the_place_of_the_old(source: Path, run: Path) -> None:
    """The old one is in the run directory then, and out comes back from there, whole, whatever happens next."""
    out = source.parent / "out"
    (out / "sub").mkdir(parents=True)
    (out / "trimfit.json").write_text("{}")
    out.rename(run / "result.old")
    with pytest.raises(InputError, match="exists already"):
        start(source)
    assert (out / "trimfit.json").read_text() == "{}" and run.exists()
    out.rename(run / "result.old")
    start(source, overwrite=True)
    assert_as_if_nothing_had_happened(source)


def test_killed_when_the_new_output_had_taken_the_place_of_the_old(source: Path) -> None:
    with pytest.raises(_Killed):
        start(source, after=LAYERS - 1)
    asked = json.loads((source.parent / "out.run" / "run.json").read_text())
    report, run = start(source), source.parent / "out.run"
    (run / "result.old").mkdir(parents=True)
    (run / "result.old" / "trimfit.json").write_text("{}")
    finished = json.loads((source.parent / "out" / "trimfit.json").read_text())
    (run / "run.json").write_text(json.dumps({**asked, "run": finished["run"]}))
    assert resume(source.parent / "out").report == report
    assert_as_if_nothing_had_happened(source)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_the_new_output_and_the_end(
    source: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The same command finds everything done, and does nothing again; another one is not taken for it."""
    with monkeypatch.context() as patch:
        patch.setattr(runs_directory, "_remove", lambda path: None)
        report, run = start(source, overwrite=overwrite), source.parent / "out.run"
    assert run.exists()
    killer = _Killer()
    assert start(source, overwrite=overwrite, observer=killer) == report
    assert killer.seen == 0
    assert_as_if_nothing_had_happened(source)
    with monkeypatch.context() as patch:
        patch.setattr(runs_directory, "_remove", lambda path: None)
        start(source, overwrite=True)
    other = PruneConfig(selector="magnitude", held_out=0.25)
    with pytest.raises(InputError, match="exists already"):
        start(source, config=other)
    assert start(source, config=other, overwrite=True).config == other


def test_computes_with_as_many_threads_as_it_began_with(source: Path) -> None:
    class Threads(_Killer):
        seen_with: set[int]

        def layer(self, record: LayerRecord, done: float) -> None:
            self.seen_with = {torch.get_num_threads()}
            super().layer(record, done)

    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        with pytest.raises(_Killed):
            start(source, after=LAYERS - 3)
    finally:
        torch.set_num_threads(1)
    watching = Threads()
    start(source, observer=watching)
    assert watching.seen_with == {2}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_what_changed_in_the_result_is_never_used(source: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pruned or not: it is seen before the result is given its name, and the next run mends it."""
    finish = PatchedShards.finish

    def damaged(*arguments: Any) -> None:
        flip_in_result(source, name)
        finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PatchedShards, "finish", damaged)
        with pytest.raises(RunError, match=rf"{name} in .* has changed since it was written; run again to go on"):
            start(source, offload=True)
    assert not (source.parent / "out").exists()
    start(source, offload=True)
    assert_as_if_nothing_had_happened(source)


def test_a_block_takes_no_disk_twice(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of finished blocks are in the files of the result alone."""
    most = 0
    move = RunDirectory.move

    def measured(run: RunDirectory, *arguments: Any) -> None:
        nonlocal most
        most = max(most, len(list(run.path.glob("part-*"))))
        move(run, *arguments)
        assert not list(run.path.glob("part-*"))

    monkeypatch.setattr(RunDirectory, "move", measured)
    start(source, offload=True)
    assert most == GROUPS // 2


def counted(made: list[str]) -> Any:
    prune_layer = pruning_module.prune_layer

    def count(layer: Any, *arguments: Any) -> LayerRecord:
        made.append(layer.name)
        return prune_layer(layer, *arguments)

    return count


@pytest.mark.parametrize("damage", ["flip a bit", "cut off", "remove"])
def test_a_damaged_part_is_done_again(source: Path, run: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    part = run / "part-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "remove":
        part.unlink()
    else:
        part.write_bytes(data if damage == "flip a bit" else data[:-3])
    resume(source.parent / "out")
    assert f"{part} is damaged: it is done again, and what came after it" in caplog.text
    assert_as_if_nothing_had_happened(source)


def test_a_damaged_journal_is_refused(source: Path, run: Path) -> None:
    journal = run / "journal.jsonl"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 16
    journal.write_bytes(data)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(InputError, match=r"journal.jsonl, line \d, is damaged; remove"):
        start(source)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_what_differs_is_named_and_nothing_is_touched(source: Path, run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(InputError, match=r"differs in config\.selector \(was wanda, is magnitude\)"):
        start(source, config=CONFIG.model_copy(update={"selector": "magnitude"}))
    numpy.save(source.parent / "tokens.npy", windows(12, seed=5).numpy())
    with pytest.raises(
        InputError, match=r"the calibration windows are not those with which the run in .* began"
    ) as other:
        resume(source.parent / "out")
    assert not hasattr(other.value, "__notes__")  # the same command does not go on
    FAMILIES["llama"].build(seed=1).save_pretrained(source, max_shard_size=20_000)
    with pytest.raises(InputError, match=r"differs in model \(was"):
        start(source)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_own_windows_are_kept_but_the_text_is_not(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(source, "plain", own_samples=3)
    with pytest.raises(_Killed):
        start(source, after=9, own_samples=3)
    kept = load_file(source.parent / "out.run" / "windows.safetensors")["windows"]
    assert kept.shape == (3, LENGTH)
    monkeypatch.setattr("trimfit.calibration.config.sample_from_model", lambda *a, **k: pytest.fail("it wrote again"))
    text = source.parent / "tokens.npy"
    before = text.read_bytes()
    numpy.save(text, windows(12, seed=5).numpy())
    with pytest.raises(InputError, match="the calibration windows are not those with which"):
        resume(source.parent / "out")
    text.write_bytes(before)
    resume(source.parent / "out")
    plain = {path.name: path.read_bytes() for path in (source.parent / "plain").iterdir()}
    assert "calibration.npy" in plain
    for name in plain.keys() - {"trimfit.json"}:
        assert (source.parent / "out" / name).read_bytes() == plain[name]


def test_a_second_process_is_refused(source: Path, run: Path) -> None:
    held = RunDirectory(source.parent / "out", {})
    held.__enter__()
    for again in (lambda: start(source), lambda: resume(source.parent / "out")):
        with pytest.raises(InputError, match=r"another process is at work in .*out\.run"):
            again()
    held.__exit__(_Killed, _Killed(), None)
    resume(source.parent / "out")
    assert_as_if_nothing_had_happened(source)


def test_nothing_stays_of_a_run_that_came_to_nothing(source: Path) -> None:
    with pytest.raises(_Killed):
        start(source, after=1)
    assert not (source.parent / "out.run").exists()


@pytest.mark.parametrize("kept", [{"costly": True}, {"costly": False}, None], ids=["costly", "cheap", "part"])
def test_a_signal_right_after_the_journal_has_it_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: dict[str, bool] | None
) -> None:
    append = Journal.append

    def interrupted(journal: Journal, record: dict[str, Any]) -> None:
        append(journal, record)
        if "note" in record or "part" in record:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path / "out", {}) as run:
        run.open({"command": "test"})
        if kept is None:
            run.keep(["layer"], {"weight": torch.ones(2)}, {}, 1.0)
        else:
            run.note("allocation", 1, **kept)
    assert run.path.exists() == (kept is None or kept["costly"])


def test_a_run_killed_at_once_leaves_nothing_to_a_refused_one(source: Path) -> None:
    run = source.parent / "out.run"
    run.mkdir()
    (run / "journal.lock").touch()
    with pytest.raises(InputError, match=r"out\.run does not tell what to do; give the command of the run again"):
        resume(source.parent / "out")
    with pytest.raises(InputError, match="matches no linear layer"):
        start(source, config=CONFIG.model_copy(update={"ignore": ("nothing",)}))
    assert not run.exists()


def test_something_else_in_the_way(source: Path) -> None:
    other = source.parent / "out.run"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out\.run is in the way: it is not the directory of a run"):
        start(source)
    assert (other / "thesis.txt").read_text() == "mine"


def test_there_is_nothing_to_resume(source: Path) -> None:
    with pytest.raises(InputError, match="there is no run to go on with"):
        resume(source.parent / "out")
    report = start(source)
    assert resume(source.parent / "out").report == report  # what is there already


def test_resume_by_the_name_of_the_run_directory(source: Path, run: Path) -> None:
    assert resume(run).out == source.parent / "out"
    assert_as_if_nothing_had_happened(source)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "x"}', "null"])
def test_a_request_that_is_not_ours(source: Path, run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json is damaged; give the command of the run again, which goes on"):
        resume(source.parent / "out")
    if text == "{}":
        start(source)
        assert_as_if_nothing_had_happened(source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would go on there")
def test_a_device_that_is_not_there_any_more(source: Path, run: Path) -> None:
    asked = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**asked, "device": "cuda"}))
    with pytest.raises(InputError, match=r"the run began on the device 'cuda', which is not available here; .* cpu"):
        resume(source.parent / "out")
    resume(source.parent / "out", device=CPU)
    assert_as_if_nothing_had_happened(source)


def test_a_model_that_was_moved(source: Path, run: Path) -> None:
    moved = source.rename(source.parent / "moved")
    with pytest.raises(InputError, match=r"began with the model in .*model, which is not there any more; put it back"):
        resume(run)
    moved.rename(source)
    resume(run)
    assert_as_if_nothing_had_happened(source)


def test_an_old_output_stays_until_the_new_is_whole(source: Path) -> None:
    start(source, config=CONFIG.model_copy(update={"sparsity": 0.25}))
    old = {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()}
    with pytest.raises(_Killed):
        start(source, after=10, overwrite=True)
    assert {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()} == old
    resume(source.parent / "out")
    assert_as_if_nothing_had_happened(source)


@pytest.mark.parametrize("name", ["run.json", "journal.jsonl", "journal.lock", "result"])
def test_what_others_have_put_there_is_left_alone(source: Path, name: str) -> None:
    """Though some of it is called as in a run."""
    folder = source.parent / "out.run"
    (folder / "inner").mkdir(parents=True)
    files = {folder / name: "{}", folder / "precious.txt": "x", folder / "inner" / "more": "y"}
    for file, text in files.items():
        file.write_text(text)
    with pytest.raises(InputError, match=r"out\.run is in the way: it is not the directory of a run"):
        start(source)
    assert {file: file.read_text() for file in folder.rglob("*") if file.is_file()} == files


def test_what_is_put_there_meanwhile_is_left_alone(source: Path, run: Path) -> None:
    finish = RunDirectory.__exit__

    def leave(self: RunDirectory, *arguments: Any) -> None:
        (run / "notes.txt").write_text("mine")
        finish(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "__exit__", leave)
        start(source)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    shutil.rmtree(run)
    assert_as_if_nothing_had_happened(source)


def test_what_a_killed_run_has_left_is_removed(source: Path, run: Path) -> None:
    """Hidden states and half-written files, before disk is needed for more of them."""
    left = [run / name for name in ("states-ab12", "part-00009.safetensors.tmp", ".tmpAb12Cd")]
    for path in left:
        path.write_text("x" * 1000)
    with pytest.raises(_Killed):
        start(source, after=LAYERS - 1)
    assert not any(path.exists() for path in left)


def test_a_run_killed_while_a_part_is_written_is_known_as_one(source: Path) -> None:
    """Whatever name the part has while it is written, which is for safetensors to say."""
    out = source.parent / "out"
    tensor = torch.zeros(2**25)
    folder = source.parent / "out.run"
    with RunDirectory(out, {}) as run:
        run.open({})
        before = set(folder.iterdir())
        keeping = threading.Thread(target=run.keep, args=(["part"], {"tensor": tensor}, None, 0.0))
        keeping.start()
        meanwhile: set[Path] = set()
        while keeping.is_alive():
            meanwhile |= set(folder.iterdir()) - before
        keeping.join()
    assert len(meanwhile) > 1
    folder.mkdir()
    for path in meanwhile:
        path.write_text("x")
    start(source)
    assert_as_if_nothing_had_happened(source)


def test_resumed_from_elsewhere(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that were relative are taken from where the run was begun."""
    monkeypatch.chdir(source.parent)
    calibration = CalibrationConfig(source="tokens.npy", samples=12, sequence_length=LENGTH)

    def prune(name: str, after: int = NEVER) -> None:
        prune_checkpoint("model", Path(name), CONFIG, calibration, device=CPU, observer=_Killer(after))

    prune("undisturbed")
    with pytest.raises(_Killed):
        prune("out", after=LAYERS - 3)
    (source.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    (source.parent / "out.run").rename("moved.run")  # with the directory that it is in, say
    assert resume(Path("moved.run")).out == source.parent / "elsewhere" / "moved"
    assert Path.cwd() == source.parent / "elsewhere"
    found, expected = Path("moved"), source.parent / "undisturbed"
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    assert all((found / name).read_bytes() == (expected / name).read_bytes() for name in names - {"trimfit.json"})
    for nothing in (Path("/"), Path("elsewhere")):
        with pytest.raises(InputError, match=r"cannot be the output of a run|there is no run to go on with"):
            resume(nothing)
