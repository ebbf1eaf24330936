"""Records: what they say, and that they are only ever appended."""

import json

from benchmarks import records


def test_records_are_appended_to_the_file_of_the_machine(tmp_path):
    record = {"machine": {"cpu": "Some CPU @ 2.0GHz", "cores": 2}, "timings": {}}
    first = records.append(record, tmp_path)
    assert records.append({**record, "suite": "again"}, tmp_path) == first
    assert first.name == "some-cpu-2-0ghz-2cores.jsonl"
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert [line.get("suite") for line in lines] == [None, "again"]
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_a_gpu_names_its_own_file(tmp_path):
    record = {"machine": {"cpu": "C", "cores": 4, "gpu": "NVIDIA H200"}}
    assert records.append(record, tmp_path).name == "nvidia-h200-4cores.jsonl"


def test_what_the_numbers_depend_on_is_named():
    assert records.machine("cpu")["cpu"]
    assert {"python", "torch", "numpy"} <= records.versions().keys()
    assert records.source().keys() == {"commit", "dirty"}


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.source() == {"commit": None, "dirty": None}
