"""Rows and datasets on disk."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.row_file import RowWriter, continue_rows
from shadowkv_cli.tasks.rows import Dataset, Sample

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def make(index: int = 0, **more: object) -> Sample:
    fields: dict = {
        "id": f"vt-64-{index}",
        "task": "vt",
        "index": index,
        "prompt": "line\u2028one\nquestion",
        "answer_prefix": " Answer:",
        "references": ["é"],
        "metric": "string_match_all",
        "length": 10,
        "prompt_tokens": 6,
        "max_new_tokens": 4,
        "context_length": 64,
        "question_start": 9,
    }
    return Sample(**{**fields, **more})


def write_dataset(folder, rows, planned=None):
    manifest = {
        "suite": "ruler",
        "seed": 1,
        "tasks": ["vt"],
        "context_lengths": [64],
        "rows": {"64": {"vt": planned or len(rows)}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with RowWriter(folder / "64" / "vt.jsonl") as writer:
        for row in rows:
            writer.append(row)
    return folder


@given(prompt=text.filter(bool), references=st.lists(text, min_size=1, max_size=3), prefix=text)
def test_a_row_survives_the_way_to_disk(prompt, references, prefix):
    row = make(prompt=prompt, references=references, answer_prefix=prefix, question_start=0)
    line = row.to_json()
    assert "\n" not in line
    assert Sample.from_json(line) == row


@given(
    st.text(max_size=80) | st.recursive(st.none() | st.integers() | text, st.lists).map(json.dumps)
)
def test_rows_that_are_none_are_a_value_error(line):
    with pytest.raises(ValueError):  # noqa: PT011 the parser's own message varies
        Sample.from_json(line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 11}, "length must be"),
        ({"context_length": 9}, "length 10 is above 9"),
        ({"prompt": ""}, "must not be empty"),
        ({"references": []}, "must not be empty"),
        ({"question_start": 99}, "question_start 99"),
        ({"index": "0"}, "'index' is no int"),
        ({"references": [1]}, "no str"),
        ({"metric": None}, "'metric' is no str"),
    ],
)
def test_wrong_rows_say_why(change, message):
    values = json.loads(make().to_json())
    with pytest.raises(ValueError, match=message):
        Sample.from_json(json.dumps({**values, **change}))


def test_a_dataset_reads_its_samples(tmp_path):
    rows = [make(i) for i in range(3)]
    data = Dataset.open(write_dataset(tmp_path / "d", rows))
    assert data.tasks == ["vt"]
    assert data.context_lengths == [64]
    assert data.samples(64, "vt") == rows
    assert data.samples(64, "vt", limit=2) == rows[:2]
    assert data.samples(64, "cwe") == []


def test_missing_folders_and_manifests_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"No data folder .*nothing"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        Dataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        Dataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="no field 'context_lengths'"):
        Dataset.open(tmp_path)


def test_a_row_cut_in_half_names_file_and_line(tmp_path):
    folder = write_dataset(tmp_path / "d", [make(0), make(1)])
    file = folder / "64" / "vt.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"vt\.jsonl line 2 is cut off"):
        Dataset.open(folder).samples(64, "vt")
    assert len(Dataset.open(folder).samples(64, "vt", limit=1)) == 1


def test_a_broken_row_names_file_and_line(tmp_path):
    folder = write_dataset(tmp_path / "d", [make(0), make(1)])
    file = folder / "64" / "vt.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(UsageError, match=r"vt\.jsonl line 1 is not a valid row: field 'answer_"):
        Dataset.open(folder).samples(64, "vt")


def test_an_unfinished_build_is_not_read_silently(tmp_path):
    folder = write_dataset(tmp_path / "d", [make(0)], planned=5)
    with pytest.raises(UsageError, match="1 of 5 samples"):
        Dataset.open(folder).samples(64, "vt")
    assert len(Dataset.open(folder).samples(64, "vt", limit=1)) == 1


def test_the_fingerprint_ignores_growth_only(tmp_path):
    data = Dataset.open(write_dataset(tmp_path / "d", [make(0)]))
    grown = Dataset(data.path, {**data.manifest, "tasks": ["vt", "cwe"], "num_samples": 9})
    other = Dataset(data.path, {**data.manifest, "seed": 2})
    assert grown.fingerprint() == data.fingerprint()
    assert other.fingerprint() != data.fingerprint()


def test_continuing_repairs_a_cut_row_with_a_notice(tmp_path, capsys):
    folder = write_dataset(tmp_path / "d", [make(0), make(1)])
    file = folder / "64" / "vt.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert continue_rows(file, "vt", 64) == [10]
    assert "removed a row that was cut off" in capsys.readouterr().err
    with RowWriter(file) as writer:
        writer.append(make(1))
    assert file.read_bytes() == whole


def test_continuing_refuses_rows_that_do_not_belong(tmp_path):
    file = write_dataset(tmp_path / "d", [make(0), make(2)]) / "64" / "vt.jsonl"
    with pytest.raises(ShadowKVError, match=re.escape("line 2") + ".*found sample vt-64-2"):
        continue_rows(file, "vt", 64)


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    import errno
    import os

    file = write_dataset(tmp_path / "d", [make(0)]) / "64" / "vt.jsonl"
    whole = file.read_bytes()
    real = os.write
    calls = []

    def full(descriptor, content):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(content[:5]))

    monkeypatch.setattr(os, "write", full)
    with RowWriter(file) as writer, pytest.raises(ShadowKVError, match="Disk full"):
        writer.append(make(1))
    assert file.read_bytes() == whole
