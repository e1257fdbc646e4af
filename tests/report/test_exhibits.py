"""Computations of exhibits: fronts, growth, totals, averages, sums."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.errors import UserError
from million_cli.files import write_safetensors
from million_cli.pq import Codebook
from million_cli.report import breakdown, kernels, positions, quality, recall, scores, speed
from million_cli.report import codebook as card
from million_cli.report.exhibit import grid, join, number, slug
from million_cli.report.sources import read

POINT = st.tuples(st.sampled_from([2.0, 3.0, 4.0, 4.5]), st.floats(0.01, 100))


@given(st.lists(POINT, min_size=1, max_size=20))
def test_the_front_is_what_nothing_beats(points):
    rows = [{"bits": repr(bits), "kl_e3": repr(kl)} for bits, kl in points]
    front = [(float(row["bits"]), float(row["kl_e3"])) for row in quality.front(rows, "kl_e3")]
    beaten = {
        (b, k) for b, k in points if any(b2 <= b and k2 <= k and (b2, k2) != (b, k) for b2, k2 in points)
    }
    assert set(front) == set(points) - beaten
    assert front == sorted(front)


def test_quality_compares_only_numbers_of_the_same_tokens(folder):
    rows = read([folder], "all").quality
    found = quality.exhibits([*rows, {**rows[-1], "text": "other"}, {**rows[-1], "context": "128"}])
    titles = [exhibit.title for exhibit in found]
    assert titles == [
        "other, text: like.txt",
        "tiny, text: words in windows of 64 tokens",
        "tiny, text: other in windows of 64 tokens",
        "tiny, text: words in windows of 128 tokens",
    ]
    table = found[1].table
    assert table.headings[:3] == ["quantizer", "bits", "KL e-3"]
    assert [line[:3] for line in table.rows] == [
        ["pq-2bit", "2.00", "9.00"],
        ["pq-4bit", "4.00", "1.00"],
        ["worse", "4.00", "3.00"],
    ]
    assert found[1].alt.endswith("On the Pareto front of KL: pq-2bit at 2 bits, pq-4bit at 4 bits.")


def test_growth_is_the_last_quarter_over_the_second():
    kl = (0.0, 0.5, 2.0, 4.0, 9.0, 9.0, 5.0, 7.0)
    line = [{"kl_e3": repr(value), "kl_se_e3": "0.3"} for value in kl]
    found = positions.growth("pq", line)
    assert (found["early"], found["late"]) == ("3.00 ± 0.21", "6.00 ± 0.21")  # sqrt(2) * 0.3 / 2
    assert float(found["growth"]) == 2
    assert positions.growth("pq", line[:3]) is None
    assert positions.growth("dense", [{"kl_e3": "0.0", "kl_se_e3": "0.0"}] * 4)["growth"] == ""


def test_recall_is_summed_over_cells_with_wilsons_interval(folder):
    (exhibit,) = recall.exhibits(read([folder], "all").recall)
    assert exhibit.title == "tiny, one of 8 facts, text: words"
    lines = [dict(zip(exhibit.table.headings, row, strict=True)) for row in exhibit.table.rows]
    assert [line["cache"] for line in lines] == ["dense", "pq-4bit"]
    assert lines[1] == {
        "cache": "pq-4bit",
        "bits": "4.0",
        "recall %": "75.0",  # 10 + 10 + 5 + 5 of 40
        "95 % interval": "59.8 – 85.8",
        "questions": "40",
        "less than dense, in 100": "+25.0",
    }
    assert len(exhibit.details.rows) == 4
    assert exhibit.alt.endswith("one of 8 facts, text: words: dense 100.0 % and pq-4bit 75.0 %.")


def test_scores_are_the_suites_averages_or_the_means_of_a_table(folder):
    found = {exhibit.title: exhibit for exhibit in scores.exhibits(read([folder], "all").scores)}
    assert list(found) == ["RULER, tiny", "LongBench, tiny", "lm-evaluation-harness, tiny"]
    assert found["LongBench, tiny"].table.rows == [["pq-4bit", "4.0", "30.00", "40.00"]]
    rows = [{"task": t, "score": s, "dense": "4", "label": "x"} for t, s in (("a", "1"), ("b", "2"))]
    assert float(scores.average("x", rows)["score"]) == 1.5


def test_speed_names_bits_where_they_differ_and_keeps_what_ran_out_of_memory(folder):
    found = {exhibit.title: exhibit for exhibit in speed.exhibits(read([folder], "all").speed)}
    assert list(found) == ["llama, batch 1", "tiny, batch 1"]
    rows = found["llama, batch 1"].table.rows
    assert [row[:2] for row in rows[:3]] == [
        ["dense engine", "1K"],
        ["dense engine", "32K"],
        ["dense engine", "128K"],
    ]
    assert rows[2][-1] == "out of memory"
    assert {row[0] for row in rows[3:]} == {"pq paged, 4 bits", "pq paged, 2 bits"}
    assert "At 128K: pq paged, 4 bits 128.00 ms and pq paged, 2 bits 64.00 ms." in found["llama, batch 1"].alt


def test_kernels_are_named_by_shape_and_bits(folder):
    (exhibit,) = kernels.exhibits(read([folder], "all").kernels)
    assert exhibit.table.rows[0][:4] == ["32/8, batch 1", "million paged", "4K", "13.7"]
    row = {"impl": "lookup", "m_keys": "64", "m_values": "32", "head_dim": "128", "layout": "row"}
    assert kernels.series(row) == "lookup, row, 4+2 bits"
    shape = {"q_heads": "8", "kv_heads": "8", "batch": "2", "dtype": "bfloat16", "head_dim": "64"}
    assert kernels.case(shape) == "8/8, batch 2, bfloat16, 64"


def test_stages_are_summed(folder):
    (exhibit,) = breakdown.exhibits(read([folder], "all").breakdown)
    assert exhibit.title == "tiny, context 64, batch 1"
    assert exhibit.table.rows == [
        ["MLP", "1.500", "1.000"],
        ["head", "1.500", "1.000"],
        ["sum", "3.000", "2.000"],
    ]


def test_errors_of_a_codebook_by_layer_and_head(codebook):
    meta = Codebook.load(codebook).meta
    exhibit = card.exhibit(codebook)
    assert f"For the first {meta.positions} positions of a text." in exhibit.words
    assert [float(row["key_error"]) for row in exhibit.data] == [e for line in meta.key_error for e in line]
    places = [(row["layer"], row["head"]) for row in exhibit.data]
    assert places == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert exhibit.table.rows[0] == ["bits an element", "2", "2"]
    assert (exhibit.origin.commands, exhibit.origin.commits) == (["million train-codebook"], ["abc123"])
    worst = max(e for line in meta.value_error for e in line)
    assert exhibit.table.rows[-1][2] == f"{worst:.4f}"


def test_what_is_no_codebook_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such codebook"):
        card.exhibit(tmp_path / "x")
    (tmp_path / "x").write_text("no")
    with pytest.raises(UserError, match="is not a codebook with a readable card"):
        card.exhibit(tmp_path / "x")
    errors = {"key_error": [[0.1]], "value_error": [[0.1]]}
    for text in (
        *("[" * 100_000, "[]", "null", "{", json.dumps({"meta": []})),
        *(
            json.dumps({"meta": {**errors, "key_error": cell}})
            for cell in ([], [[]], [["x"]], [[float("nan")]], [[0.1], [0.1]], [[0.1], [0.1, 0.2]], 3, None)
        ),
        json.dumps({"meta": errors, "keys": 3}),
    ):
        write_safetensors(tmp_path / "y", {}, {"card": text})
        with pytest.raises(UserError, match="is not a codebook with a readable card") as error:
            card.exhibit(tmp_path / "y")
        assert "\n" not in str(error.value)


def test_cells_are_formatted_and_empty_columns_left_out():
    columns = [("a", "A", str), ("b", "B", number("+.1f", 100, " %")), ("c", "C", str)]
    table = grid([{"a": "x", "b": "0.125"}, {"b": "-0.0000001"}, {"a": "y", "b": "nan"}], columns)
    assert table.headings == ["A", "B"]
    assert table.rows == [["x", "+12.5 %"], ["–", "0.0 %"], ["y", "nan"]]
    assert table.numeric == [False, True]


def test_words():
    assert [join(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert slug("Quality", "", "meta/Llama 3.1", "32K") == "quality-meta-llama-3.1-32k"
