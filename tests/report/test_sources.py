"""The CSVs that a report reads, and their rows in common terms."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from million_cli.errors import UserError
from million_cli.pipelines.report import exhibits
from million_cli.report import speed
from million_cli.report.exhibit import to_float
from million_cli.report.kinds import KINDS
from million_cli.report.labels import label
from million_cli.report.sources import TABLES, read
from million_cli.report.style import draw
from million_cli.tables import read_table, write_table


def test_a_folder_is_read_whole_and_each_table_once(folder):
    data = read([folder], "all")
    kinds = {name.rsplit("/", 1)[1]: (kind, rows) for name, kind, rows in data.files}
    assert kinds == {
        "e2e.csv": ("e2e", 9),
        "kernel.csv": ("kernel", 4),
        "other.csv": ("job", 2),
        "results.csv": ("job", 5),
    }
    assert [row["label"] for row in data.quality] == ["pq", "pq, layer", "pq-4bit", "pq-2bit", "worse"]
    assert [(row["length"], row["depth"], row["label"]) for row in data.recall] == [
        (length, depth, "pq-4bit") for length in ("256", "1024") for depth in ("0.0", "1.0")
    ]
    assert len(data.positions) == 4
    assert {(row["suite"], row["task"], row["score"]) for row in data.scores} == {
        ("RULER", "average", "30.0"),
        ("RULER", "vt 1024", "40.0"),
        ("RULER", "vt 4096", "20.0"),
        ("LongBench", "average", "30.0"),
        ("LongBench", "lcc", "30.0"),
        ("lm-evaluation-harness", "average", "0.5"),
        ("lm-evaluation-harness", "echo exact_match", "0.5"),
    }
    jobs = [row for row in data.speed if row["model"] == "tiny"]
    assert [(row["impl"], row["tpot_ms"]) for row in jobs] == [("dense", "3.0"), ("paged, pq-4bit", "2.0")]
    stages = [(row["stage"], row["series"], row["ms"], row["context"]) for row in data.breakdown]
    assert ("MLP", "paged, pq-4bit", "1.0", "64") in stages
    assert len(stages) == 4
    assert [row["why"] for row in data.failures] == ["ValueError: <bad> luck"]


def test_origins_come_from_the_row_or_the_suites_record(folder):
    data = read([folder], "all")
    assert {(row["commit"], row["command"]) for row in data.recall} == {("abc123", "million eval <all>")}
    kernel = data.kernels[0]
    assert (kernel["commit"], kernel["torch"], kernel["device"]) == ("f00d", "2.11.0", "Some GPU")
    assert kernel["command"] == "scripts/gpu_suite.sh"


def test_tables_of_moved_results_are_found(folder, tmp_path, caplog):
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    assert len(read([moved / "results.csv"], "all").recall) == 4
    shutil.rmtree(moved / "evaluations")
    caplog.set_level("INFO", logger="million")
    data = read([moved / "results.csv"], "all")
    assert data.recall == []
    assert len(data.quality) == 3
    assert "6 tables that it names are gone" in caplog.text


def test_a_table_alone_goes_by_the_name_of_its_file(folder):
    (table,) = (folder / "evaluations").glob("passkey-*.csv")
    data = read([table], "all")
    assert {row["model"] for row in data.recall} == {"passkey-1"}


def test_the_latest_run_of_jobs_or_all(tmp_path):
    path = tmp_path / "r.csv"
    rows = [{"run": r, "verb": "eval", "status": "ok", "kl_e3": 1.0} for r in ("a", "b", "b")]
    write_table(path, rows, "job")
    assert len(read([path], "latest").quality) == 2
    assert len(read([path], "all").quality) == 3


def test_stage_times_in_either_form_are_the_same(tmp_path):
    wide = [{"stage": "MLP", "dense_ms": 1.0, "pq_ms": 2.0}]
    long = [{"stage": "MLP", "series": "dense", "ms": 1.0}, {"stage": "MLP", "impl": "pq", "ms": 2.0}]
    found = []
    micro = [{"stage": "MLP", "dense_us": 1000.0, "pq_us": 2000.0}]
    for rows in (wide, long, micro):
        write_table(tmp_path / "x.csv", rows, "breakdown")
        data = read([tmp_path / "x.csv"], "all")
        found.append([(row["stage"], row["series"], row["ms"]) for row in data.breakdown])
    assert found[0] == found[1] == found[2] == [("MLP", "dense", "1.0"), ("MLP", "pq", "2.0")]


def test_rows_of_the_end_to_end_benchmark(tmp_path):
    shared = {"model": "llama", "context": 1024, "batch": 1}
    cases = [
        ("speed", "paged-4bit", "ok", 2.0, None, ""),
        ("speed", "dense", "oom", None, None, "out of memory"),
        ("speed", "dense", "skipped", None, None, "budget_s is used up"),
        ("breakdown", "paged-4bit", "ok", 2.5, None, ""),
        ("largest", "paged-4bit", "ok", None, 30, ""),
    ]
    names = ("what", "impl", "status", "tpot_ms", "largest_batch", "note")
    rows = [{**shared, **dict(zip(names, case, strict=True))} for case in cases]
    write_table(tmp_path / "e2e.csv", rows, "e2e")
    kernels = [{"impl": "paged-4bit", "stage": "MLP", "kernel": "gemm", "launches": 32.0, "us": 9.0}]
    write_table(tmp_path / "kernels.csv", kernels, "breakdown_kernels")
    data = read([tmp_path], "all")
    assert [(row["impl"], row["tpot_ms"], row.get("error", "")) for row in data.speed] == [
        ("paged-4bit", "2.0", ""),
        ("dense", "", "out of memory"),
    ]
    assert data.breakdown == []
    (exhibit,) = speed.largest(data.largest)
    assert exhibit.table.rows == [["llama", "paged-4bit", "1K", "30"]]
    assert exhibit.alt == "Bars of sequences of 1K tokens that fit: llama, paged-4bit 30."


def test_rows_are_labelled_by_what_is_unusual_in_their_file():
    def row(quantizer, source="a/x.csv", **settings):
        more = {f"set.{key}": value for key, value in settings.items()}
        return {"quantizer": quantizer, "cache": "paged", "model": "m", "text": "t", "source": source, **more}

    rows = [
        row("pq", scope="head", nbits="8", rotation="opq"),
        row("pq", scope="head", nbits="8", rotation="opq"),
        row("pq", scope="layer", nbits="4", rotation=""),
        row("fp8", scope="merged"),
        {**row("pq", scope="head", nbits="8", rotation="opq"), "cache": "contiguous"},
        row("other"),
        row("other", source="b/x.csv"),
    ]
    label(rows)
    assert [r["label"] for r in rows] == [
        "pq",
        "pq",
        "pq, layer, nbits=4, rotation=none",
        "fp8",
        "pq, contiguous",
        "other (a/x.csv)",
        "other (b/x.csv)",
    ]


def test_labels_start_from_the_earliest_row_and_say_nothing_twice():
    def row(started, **settings):
        more = {f"set.{key}": value for key, value in settings.items()}
        return {"quantizer": "pq", "source": "a/x.csv", "started": started, **more}

    full = {"keys.metric": "fisher", "values.metric": "fisher", "bits": "4.0", "widths": "[1, 2]"}
    rows = [
        row("2026-02", **{**full, "keys.metric": "euclidean", "values.metric": "euclidean"}),
        row("2026-03", **{**full, "values.metric": "euclidean"}),
        row("2026-04", **{**full, "bits": "", "widths": ""}),
        row("2026-05", **{**full, "widths": "[2, 4]"}),
        row("2026-01", **full),
    ]
    label(rows)
    assert [r["label"] for r in rows] == [
        "pq, metric=euclidean",
        "pq, values.metric=euclidean",
        "pq, bits=none",
        "pq, widths=[2, 4]",
        "pq",
    ]
    jobs = [
        row("", **{"keys.dsub": "2", "values.dsub": "2"}),
        row("", **{"keys.dsub": "4", "values.dsub": "4"}),
        row("", **{"keys.dsub": "4", "values.dsub": "2"}),
    ]
    label(jobs)
    assert [r["label"] for r in jobs] == ["pq", "pq, dsub=4", "pq, keys.dsub=4"]


def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.csv"
    for content, message in (
        ("colour,size\n1,2\n", "no column kind, schema; accepted are tables"),
        ("kind,schema,stage\n", "has no rows"),
        ("", "is not a CSV"),
        ("kind,schema,stage\nbreakdown\n", "its rows are not equally long"),
        ("kind,schema,stage\nbreakdown,1,2,3\n", "is not a CSV"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message) as error:
            read([path], "all")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a CSV"):
        read([path], "all")
    with pytest.raises(UserError, match="no results at /nowhere"):
        read([Path("/nowhere")], "all")
    with pytest.raises(UserError, match="no CSV there is a table of ours"):
        read([tmp_path], "all")
    path.unlink()
    with pytest.raises(UserError, match="the folder holds no CSV"):
        read([tmp_path], "all")


def test_what_is_no_table_in_a_folder_is_left_out_and_named(folder, caplog):
    whole = read([folder], "all")
    (folder / "foreign.csv").write_text("colour,size\n1,2\n")
    (folder / "cut.csv").write_text('kind,schema,run\njob,1,"a')
    found = read([folder], "all")
    assert found.quality == whole.quality
    assert [record.getMessage().split("/")[-1].split(" ")[0] for record in caplog.records] == [
        "cut.csv",
        "foreign.csv:",
    ]


def test_hidden_files_are_no_results(folder):
    whole = read([folder], "all")
    for hidden in (folder / ".0123abcd.results.csv", folder / ".trash" / "results.csv"):
        hidden.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "results.csv", hidden)
    assert read([folder], "all").files == whole.files


def test_kinds_and_schemas_that_are_unknown_are_left_out(tmp_path, caplog):
    path = tmp_path / "x.csv"
    path.write_text("kind,schema,stage,ms\nbreakdown,1,MLP,1\nbreakdown,2,MLP,2\n,,MLP,3\nhat,1,MLP,4\n")
    assert [row["ms"] for row in read([path], "all").breakdown] == ["1"]
    assert "schema '2'; this version reads 1" in caplog.text
    assert f"1 row left out: kind 'hat'; accepted are {', '.join(KINDS)}" in caplog.text
    assert "kind ''" in caplog.text


DRAWN = [name for name in TABLES if name != "drift"]  # its columns are those of positions


@pytest.mark.parametrize("cell", ["", "0", "-1", "many"])
@pytest.mark.parametrize("table", ["results", "e2e", "gpu/kernel", *(f"evaluations/{n}-1" for n in DRAWN)])
def test_a_bad_cell_costs_its_row_and_no_traceback(folder, caplog, table, cell):
    """In every number column of every kind, one at a time."""
    path = folder / f"{table}.csv"
    whole = read_table(path)
    whole = whole[[column for column in whole if not column.endswith("_table")]]
    numbers = [column for column in whole if column != "schema" and to_float(whole[column].max()) is not None]
    assert numbers
    for column in numbers:
        frame = whole.copy()
        frame.loc[0, column] = cell
        path.write_text(frame.to_csv(index=False))
        for exhibit in exhibits(read([path], "all"), []):
            if cell in ("0", "-1") and exhibit.paint is not None:
                draw(exhibit.paint, *exhibit.size)
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("cell", ["", "-1", "1.5", "many", "nan", "-inf", "1e400", "=1", "12;5", "0x10"])
def test_a_row_without_its_numbers_is_left_out_with_a_line(tmp_path, caplog, cell):
    rows = [{"length": 8, "depth": depth, "recall": 1, "recall_dense": 1} for depth in (0.5, cell)]
    write_table(tmp_path / "x.csv", rows, "passkey")
    assert [row["depth"] for row in read([tmp_path / "x.csv"], "all").recall] == ["0.5"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}/x.csv: 1 row left out: depth is {cell!r}; accepted are numbers from 0 to 1"
    )
