"""Tasks through lm-eval: the embedded model's accuracy, local task files, and what is refused."""

import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.checkpoints import Checkpoint, load_checkpoint
from trimfit.demo.run import model_path
from trimfit.errors import InputError, RunError
from trimfit.evaluate import Tasks, TaskScore, evaluate_tasks, tasks
from trimfit.evaluate.continuation import Example, continuation_examples

LIMIT = 16
ANSWERS = [("two plus two is", [" four", " a", " the", " cheese"], 0)] * 3


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return load_checkpoint(str(model_path()))


@pytest.fixture(scope="module")
def demo(embedded: Checkpoint) -> TaskScore:
    return evaluate_tasks(embedded.model, embedded.tokenizer, ["demo"], limit=LIMIT)[0]


def likelihoods(checkpoint: Checkpoint, example: Example) -> list[float]:
    """Log-likelihood of each choice, one forward pass each, without lm-eval, batches or padding."""
    encode: Any = checkpoint.tokenizer
    before = encode(example["context"])["input_ids"]
    values: list[float] = []
    for choice in example["choices"]:
        ids = encode(example["context"] + choice)["input_ids"]
        assert ids[: len(before)] == before
        with torch.inference_mode():
            logits = checkpoint.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        values.append(sum(logits[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    return values


def test_accuracy_is_that_of_plain_forward_passes(embedded: Checkpoint, demo: TaskScore) -> None:
    right: list[bool] = []
    right_by_length: list[bool] = []
    for example in continuation_examples(read_modules(EVALUATION))[:LIMIT]:
        scores = likelihoods(embedded, example)
        by_length = [score / len(choice) for score, choice in zip(scores, example["choices"], strict=True)]
        right.append(scores.index(max(scores)) == example["answer"])
        right_by_length.append(by_length.index(max(by_length)) == example["answer"])
    assert (demo.name, demo.metric, demo.examples) == ("demo", "acc_norm", LIMIT)
    for name, each in (("acc", right), ("acc_norm", right_by_length)):
        error = statistics.stdev(map(float, each)) / LIMIT**0.5
        assert demo.metrics[name] == pytest.approx((statistics.mean(map(float, each)), error))
    assert demo.metrics["acc_norm"] == (demo.value, demo.standard_error)


def test_the_embedded_model_is_far_above_chance(demo: TaskScore) -> None:
    assert 0.45 < demo.value < 0.95


def test_batches_change_nothing(embedded: Checkpoint, demo: TaskScore) -> None:
    alone = evaluate_tasks(embedded.model, embedded.tokenizer, ["demo"], limit=4, batch_size=1)
    together = evaluate_tasks(embedded.model, embedded.tokenizer, ["demo"], limit=4, batch_size=16)
    assert alone == together


def test_a_damaged_model_falls_to_chance(demo: TaskScore) -> None:
    checkpoint = load_checkpoint(str(model_path()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in checkpoint.model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(torch.rand(weight.shape, generator=generator) < 0.05)
    damaged = evaluate_tasks(checkpoint.model, checkpoint.tokenizer, ["demo"], limit=LIMIT)[0]
    assert damaged.value < demo.value - 0.1


def test_everything_is_given_back_as_it_was(embedded: Checkpoint) -> None:
    model, tokenizer = embedded.model, embedded.tokenizer
    model.train()
    pad, states = tokenizer.pad_token_id, (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        evaluate_tasks(model, tokenizer, ["demo"], limit=1, seed=7)
        assert model.training
    finally:
        model.eval()
    assert tokenizer.pad_token_id == pad
    assert not model._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_nothing_is_printed(embedded: Checkpoint, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate_tasks(embedded.model, embedded.tokenizer, ["demo"], limit=1)
    assert capfd.readouterr() == ("", "")


def test_a_text_of_the_users(embedded: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("<|endoftext|>\n".join(f"{document}\n" for document in read_modules(EVALUATION[-3:])))
    asked = f"continuation:{text}"
    score = evaluate_tasks(embedded.model, embedded.tokenizer, [asked], limit=5)[0]
    assert (score.name, score.examples) == (asked, 5)


@pytest.fixture
def task_file(tmp_path: Path) -> Iterator[Path]:
    """A task file as lm-eval's documentation has it, with its data beside it."""
    rows = [{"question": q, "options": options, "label": label} for q, options, label in ANSWERS]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    directory = tmp_path / "tasks"
    directory.mkdir()
    file = directory / "sums.yaml"
    file.write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: options
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    yield file


def test_local_task_file_and_its_directory(embedded: Checkpoint, task_file: Path) -> None:
    by_file = evaluate_tasks(embedded.model, embedded.tokenizer, [str(task_file)])
    by_directory = evaluate_tasks(embedded.model, embedded.tokenizer, [str(task_file.parent)])
    question, options, _ = ANSWERS[0]
    scores = likelihoods(embedded, {"context": question, "choices": options, "answer": 0})
    expected = 1.0 if scores.index(max(scores)) == 0 else 0.0
    assert by_file == by_directory == [TaskScore("sums", "acc", expected, 0.0, 3, {"acc": (expected, 0.0)})]


@pytest.fixture
def small_index(task_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of lm-eval with two tasks: reading the whole one takes many seconds."""
    from lm_eval.tasks import TaskManager

    (task_file.parent / "arc_easy.yaml").write_text("task: arc_easy\ndataset_path: /nowhere/arc\ntest_split: test\n")
    manager = TaskManager(include_path=task_file.parent, include_defaults=False)
    monkeypatch.setattr(tasks, "_index", lambda: manager)


@pytest.mark.usefixtures("small_index")
def test_tasks_of_lm_eval_go_by_name_in_the_order_asked_for(embedded: Checkpoint) -> None:
    scores = evaluate_tasks(embedded.model, embedded.tokenizer, ["sums", "demo", "sums"], limit=2)
    assert [(score.name, score.examples) for score in scores] == [("sums", 2), ("demo", 2)]


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("arc_esay", "no task 'arc_esay'; did you mean arc_easy?"),
        ("zzz", "no task 'zzz'; name one of lm-eval, a task file, or demo"),
        ("arc_easy", "arc_easy cannot be loaded .* hub, so the network"),
        ("./missing.yaml", "no task file or directory ./missing.yaml"),
        ("continuation:./missing.txt", "no such file: ./missing.txt"),
        ("continuation:", "write continuation:my-text.txt"),
    ],
)
def test_what_cannot_be_evaluated_is_named(embedded: Checkpoint, asked: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_tasks(embedded.model, embedded.tokenizer, [asked])


@pytest.mark.usefixtures("small_index")
def test_a_directory_with_the_data_of_a_task_does_not_hide_it(
    embedded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "test.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert evaluate_tasks(embedded.model, embedded.tokenizer, ["sums"], limit=1)[0].name == "sums"


def test_a_fingerprint_is_of_the_questions_and_of_how_they_are_asked(task_file: Path) -> None:
    first = Tasks([str(task_file)]).fingerprint()
    assert Tasks([str(task_file)]).fingerprint() == first
    data, text = task_file.parent.parent / "data.jsonl", task_file.read_text()
    task_file.write_text(text.replace("{{question}}", "Q: {{question}}"))
    assert Tasks([str(task_file)]).fingerprint() != first
    task_file.write_text(text)
    data.write_text(data.read_text().replace(" cheese", " bread"))
    assert Tasks([str(task_file)]).fingerprint() != first


def test_loaded_tasks_ask_every_model_the_same(embedded: Checkpoint, demo: TaskScore) -> None:
    tasks = Tasks(["demo"])
    for _ in range(2):
        assert tasks.evaluate(embedded.model, embedded.tokenizer, limit=LIMIT) == [demo]


@pytest.mark.usefixtures("small_index")
def test_one_task_under_two_names_is_refused(embedded: Checkpoint, task_file: Path) -> None:
    with pytest.raises(InputError, match="sums is asked for twice"):
        evaluate_tasks(embedded.model, embedded.tokenizer, ["sums", str(task_file)])


@pytest.mark.parametrize("wrong", ["- a list", "task: sums\noutput_type: nonsense\n", "{"])
def test_a_wrong_task_file_is_named(embedded: Checkpoint, task_file: Path, wrong: str) -> None:
    task_file.write_text(wrong)
    with pytest.raises(InputError, match=r"sums\.yaml cannot be used"):
        evaluate_tasks(embedded.model, embedded.tokenizer, [str(task_file)])


def test_code_of_the_model_is_not_run(embedded: Checkpoint, task_file: Path) -> None:
    task_file.write_text(task_file.read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match="sums runs code"):
        evaluate_tasks(embedded.model, embedded.tokenizer, [str(task_file)])


def test_an_empty_directory_is_refused(embedded: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task file"):
        evaluate_tasks(embedded.model, embedded.tokenizer, [str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit of 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tasks": []}, "no task is named"),
        ({"tasks": "demo"}, "a list of names, but it is the text 'demo'"),
    ],
)
def test_numbers_out_of_range(embedded: Checkpoint, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_tasks(embedded.model, embedded.tokenizer, **{"tasks": ["demo"], **options})


def test_without_lm_eval_the_sentence_says_what_to_install(
    embedded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails as if it were not there
    with pytest.raises(InputError, match=r'pip install "trimfit\[eval\]"'):
        evaluate_tasks(embedded.model, embedded.tokenizer, ["demo"])


def test_nan_is_no_accuracy() -> None:
    checkpoint = load_checkpoint(str(model_path()))
    with torch.no_grad():
        next(checkpoint.model.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="NaN"):
        evaluate_tasks(checkpoint.model, checkpoint.tokenizer, ["demo"], limit=1)
