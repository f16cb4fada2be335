"""The dialect of ShadowKV's authors: wording, metrics with their flaws, and the paper's table."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.cli import run
from shadowkv_cli.paper_rows import paper_comparison, paper_model, paper_rows
from shadowkv_cli.reporting import report_run
from shadowkv_cli.results import RunFolder
from shadowkv_cli.summary import score_records
from shadowkv_cli.tasks.metrics import METRICS, score
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.tasks.ruler.definitions import definitions

TASKS = [t for t in definitions() if t not in ("cwe", "niah_multikey_3")]
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def sample(references, metric):
    fields = {"id": "t-64-0", "task": "t", "index": 0, "prompt": "p", "answer_prefix": ""}
    sizes = {"length": 8, "prompt_tokens": 4, "max_new_tokens": 4, "context_length": 64}
    name = f"shadowkv_{metric}"
    return Sample(**fields, **sizes, references=references, metric=name, question_start=0)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        ("needle_score", "1234567.", ["1234567"], 1),
        ("needle_score", " 1234567890", ["1234567"], 1),
        ("needle_score", "It is 1234567", ["1234567"], 1),
        ("needle_score", "x1234567", ["1234567"], 0),
        ("needle_score", "</s>The 1234567<|eot_id|>", ["1234567"], 1),
        ("needle_score", "4ec3f970956d40e4", ["4ec3f970-956d-40e4"], 1),
        ("needle_score", "", ["1234567"], 0),
        ("multi_number", "1234567, 7654321", ["1234567", "7654321"], 1),
        ("multi_number", "1234567,7654321", ["1234567", "7654321"], 0),
        ("multi_number", "1234567 and 5", ["1234567", "7654321"], 0.5),
        ("multi_words", "ABCDE fghij", ["abcde", "FGHIJ"], 1),
        ("multi_words", "abcdef", ["abcde"], 0),
        ("multi_words", "an x-ray", ["x-ray"], 0),
        ("string_match_part", "in France", ["Spain", "France"], 1),
        ("string_match_part", "F", ["France"], 1),
        ("string_match_part", "", ["France"], 1),
        ("string_match_part", "Norway", ["France"], 0),
    ],
)
def test_the_metrics_are_the_authors_with_their_flaws(metric, prediction, references, expected):
    assert score(prediction, sample(references, metric)) == expected


@given(st.text(max_size=30), st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_scores_lie_between_0_and_1(prediction, references):
    for name in (n for n in METRICS if n.startswith("shadowkv_")):
        one = sample(references, name.removeprefix("shadowkv_"))
        assert 0 <= score(prediction, one) <= 1, name


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("shadowkv") / "d"
    command = "build-data ruler --tokenizer demo --context-length 2k --num-samples 2"
    options = ["--dialect", "shadowkv", "--template", "llama-3", "--output", str(folder)]
    assert run([*command.split(), *options]) == 0
    return Dataset.open(folder)


@cache
def plain_dialect() -> dict:
    return definitions("shadowkv")


def test_eleven_tasks_flagged_with_their_flaws(data):
    manifest = data.manifest
    assert data.tasks == TASKS == list(plain_dialect())
    assert manifest["suite"] == "ruler-shadowkv"
    assert manifest["comparable_with_published"] is False
    assert "not comparable with RULER" in manifest["note"]
    flaws = " ".join(manifest["known_flaws"])
    assert all(text in flaws for text in ("scores 1.0", "You is a helpful assistant", "fwe"))
    for task in TASKS:
        for one in data.samples(2048, task):
            assert one.metric == plain_dialect()[task].metric
            assert one.postprocess is None
            assert one.length <= 2048


def test_the_flaws_of_the_prompts_are_kept(data):
    single = data.samples(2048, "niah_single_1")[0].prompt
    assert "You is a helpful assistant" in single
    for task in ("niah_multivalue", "vt", "qa_1"):
        assert "You are a helpful assistant" in data.samples(2048, task)[0].prompt
    first, second = (one.prompt for one in data.samples(2048, "vt"))
    head = first.index("Answer: According")
    assert first[:head] == second[:head], "one example for all samples"
    assert "value " in first
    assert "in the text Answer: According" in first, "the question of the example lost a word"
    assert "in the text above." in first[head:]
    assert "There and back again.\n The grass is green." in first
    assert "assgined" in data.samples(2048, "vt")[0].answer_prefix


def test_without_a_chat_template_the_example_is_whole(tmp_path):
    command = "build-data ruler --tokenizer demo --context-length 2k --num-samples 1 --tasks vt"
    options = ["--dialect", "shadowkv", "--template", "base", "--output", str(tmp_path)]
    assert run([*command.split(), *options]) == 0
    (one,) = Dataset.open(tmp_path).samples(2048, "vt")
    assert one.prompt.count("in the text above.") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "cwe"], "Unknown task 'cwe'"),
        (["--fit", "official"], "--fit official is that of NVIDIA's RULER"),
        (["--dialect", "lm-eval"], "--dialect"),
    ],
)
def test_what_the_dialect_has_not_is_one_line(tmp_path, capsys, options, message):
    command = "build-data ruler --tokenizer demo --context-length 2k --dialect shadowkv"
    assert run([*command.split(), "--output", str(tmp_path / "d"), *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_perfect_answers_score_100_through_the_command_line(data, tmp_path, capsys):
    lines = []
    for task in data.tasks:
        for one in data.samples(2048, task):
            text = one.references[0] if task.startswith("qa") else ", ".join(one.references)
            lines.append(json.dumps({"id": one.id, "prediction": text}))
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    assert run(["score", str(tmp_path / "p.jsonl"), "--data", str(data.path)]) == 0
    shown = capsys.readouterr().out
    assert "not comparable with RULER" in shown
    records = [line for line in shown.splitlines() if "average" in line]
    assert "100.0" in records[0]


def test_the_rows_of_the_paper_average_as_it_says():
    rows = paper_rows()
    assert len(rows) == 28
    for row in rows:
        if row.scores:
            mean = sum(row.scores.values()) / len(row.scores)
            assert mean == pytest.approx(row.average, abs=0.011), (row.model, row.method)
    assert paper_model(LLAMA) == "Llama-3.1-8B"
    assert paper_model("models/GLM-4-9B-Chat-1M/") == "GLM-4-9B-1M"
    assert paper_model("demo") is None


def prediction(task, number, cell, settings, value, length=131072):
    return {
        "id": f"{task}-{length}-{number}",
        "task": task,
        "context_length": length,
        "method": cell.partition(":")[0],
        "cell": cell,
        "settings": settings,
        "pass": 0,
        "prediction": "x",
        "score": value,
        "num_references": 1,
        "dense_fallback": False,
        "audit": {"attended_tokens": 1000},
        "error": None,
    }


PAPER_SETTINGS = {
    "sparse_budget": "1.5625%",
    "rank": 160,
    "chunk_size": 8,
    "outlier_chunks": "auto",
}


def rows_like_the_paper(samples=96, length=131072, **changes):
    cells = (("full", {}), ("shadowkv", PAPER_SETTINGS | changes))
    return [
        prediction(task, i, cell, settings, 0.5, length)
        for task in ("vt", "qa_1")
        for i in range(samples)
        for cell, settings in cells
    ]


def compare(rows, suite="ruler-shadowkv", model=LLAMA):
    return paper_comparison(suite, model, score_records(rows))


def test_the_paper_stands_beside_a_run_of_its_model():
    table, plain = compare(rows_like_the_paper())
    assert [row[0] for row in table.rows] == [
        "full",
        "  paper: Full",
        "shadowkv",
        "  paper: ShadowKV",
    ]
    place = table.columns.index("vt")
    assert [row[place] for row in table.rows] == ["50.00", "68.96", "50.00", "67.08"]
    assert table.rows[1][-1] == f"{(82.29 + 68.96) / 2:.2f}"
    assert len(table.notes) == 1
    assert "differences" not in plain[0]
    assert plain[1]["paper_scores"]["qa_1"] == 81.25


@pytest.mark.parametrize(
    ("rows", "suite", "said"),
    [
        (rows_like_the_paper(20), "ruler-shadowkv", "20 samples a task for 96"),
        (rows_like_the_paper(length=32768), "ruler-shadowkv", "32768 tokens for 131072"),
        (rows_like_the_paper(rank=64), "ruler-shadowkv", "shadowkv: rank 64 for 160"),
        (rows_like_the_paper(landmarks_per_chunk=2), "ruler-shadowkv", "2 landmarks per chunk"),
        (rows_like_the_paper(value_dtype="fp8"), "ruler-shadowkv", "values in fp8"),
        (rows_like_the_paper(landmark_dtype="fp8"), "ruler-shadowkv", "landmarks in fp8"),
        (rows_like_the_paper(), "ruler", "RULER's prompts and metrics, not the authors'"),
    ],
)
def test_other_settings_are_named(rows, suite, said):
    table, plain = compare(rows, suite)
    assert said in table.notes[1]
    assert any(said in text for text in plain[0]["differences"])


def test_what_changes_no_score_is_no_other_setting():
    settings = {"value_dtype": "packed", "value_placement": "host", "value_buffer": 4.0}
    cells = (rows_like_the_paper(**more) for more in (settings, {}))
    own, plain = (compare(rows, "ruler-shadowkv")[1][0].get("differences") for rows in cells)
    assert own == plain


def test_no_rows_of_the_paper_for_others():
    assert compare(rows_like_the_paper(), model="Qwen/Qwen2-7B-Instruct") is None
    assert compare(rows_like_the_paper(), suite="longbench") is None
    failed = [row | {"score": None, "error": "x"} for row in rows_like_the_paper(2)]
    assert compare(failed) is None


def test_a_run_shows_the_paper(tmp_path, capsys):
    identity = {"model": LLAMA, "data": "ruler-shadowkv"}
    options = {"scope": {}, "environment": {}, "command": [], "flags": {}}
    with RunFolder.open(tmp_path / "r", kind="eval", identity=identity, **options) as folder:
        folder.append("predictions", rows_like_the_paper(3))
    report_run(tmp_path / "r", as_json=False)
    shown = capsys.readouterr().out
    assert "Beside the paper's Table 1" in shown
    assert "paper: ShadowKV" in shown
    payload = report_run(tmp_path / "r", as_json=True)
    assert payload["paper"][0]["paper_model"] == "Llama-3.1-8B"
