"""The grid runner and the plots under what can go wrong. pytest beyond/test_grid.py.

Failing cells, kills, signals, full disks, closed outputs, damaged rows, shards that start together,
and every script's plots and tables from some of its rows. No network, no data.
"""
import importlib
import inspect
import json
import math
import multiprocessing.connection
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import parse_args, run_grid, save_tables

HERE = Path(__file__).resolve().parents[1]
SETTINGS = {"steps": (3, 4)}
on_unix = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file limits")
torch.set_num_threads(1)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def train_toy(cell, device, args, progress):
    """A cell that does what its key "do" says."""
    torch.manual_seed(cell["seed"])
    time.sleep(cell.get("sleep", 0))
    if "log" in cell:
        Path(cell["log"], f"finished-{cell['beta']}").touch()
    what = cell.get("do")
    if what == "raise":
        raise ZeroDivisionError("a fault in the cell")
    if what == "raise unpicklable":
        raise Unpicklable("a fault", "that does not pickle")
    if what == "raise its own":
        raise type("Stop", (BaseException,), {})("a fault of its own")
    if what == "exit":
        sys.exit("gives up")
    if what == "open":
        open("no such checkpoint")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "diverge":
        progress(1, 2, math.nan)
    return {"value": torch.randn(50, 50).svd().S.sum().item()} | RESULTS.get(what, {})


def train_well(*arguments):
    return {"value": 1.0}


def train_and_spoil(cell, device, args, progress):
    cell["beta"] *= 2
    return {"value": 1.0}


RESULTS = {
    "numpy": {"a": np.float32(0.5), "b": [np.int64(3)], "c": np.arange(2), "d": np.bool_(True)},
    "torch": {"a": torch.tensor(0.5), "b": [torch.tensor(3)], "c": torch.arange(2), "d": True},
    "nan in depth": {"curve": [[0, 1.0], [1, math.nan]]},
    "inf in depth": {"layers": {"conv1": {"bound": np.float32(math.inf)}}},
    "set": {"a": {1, 2}},
    "list of accuracies": {"train_acc": [0.5, 0.25]},
}


class Grid:
    """A toy's grid, run in this process: status, what was printed, rows."""

    def __init__(self, folder, capsys, monkeypatch):
        self.out, self.capsys, self.monkeypatch = folder / "out", capsys, monkeypatch
        self.path, self.name = self.out / "toy-demo.jsonl", "toy.py"

    def run(self, *cells, arguments=(), train=train_toy, settings=SETTINGS,
            prepare=lambda args: print("loaded")):
        command = [self.name, "--scale", "demo", "--out", str(self.out), "--jobs", "1", *arguments]
        self.monkeypatch.setattr(sys, "argv", command)
        status = 0
        try:
            args = parse_args("A toy.", {"demo": ["synthetic", "other"], "cpu": ["synthetic"]},
                              {"demo": [0], "cpu": [0]})
            rows = run_grid(cells, train, args, settings, prepare)
            claim = {"claim": "c", "paper": "p", "ours": f"rows {len(rows)}", "holds": "NO"}
            save_tables(args, claims=[claim, None])
        except SystemExit as end:
            status = end.code or 0
        printed = self.capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    def rows(self, name="toy-demo.jsonl"):
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]


@pytest.fixture
def one_commit(monkeypatch):
    monkeypatch.setattr(common, "_git_revision", lambda: "abc1234")


@pytest.fixture
def grid(tmp_path, capsys, monkeypatch, one_commit):
    return Grid(tmp_path, capsys, monkeypatch)


def betas(*values, **more):
    return [{"beta": beta} | more for beta in values]


# === Rows

def test_rows_have_the_fields_of_the_contract(grid):
    grid.run(*betas(1, 2), arguments=["--seeds", "0", "5", "0"])
    rows = grid.rows()
    assert [(r["seed"], r["beta"]) for r in rows] == [(0, 1), (0, 2), (5, 1), (5, 2)]
    for row in rows:
        assert {"seconds", "device", "torch", "git", "value"} <= row.keys()
        assert row["settings"] == {"steps": [3, 4]}
        named = row["figure"], row["scale"], row["dataset"], row["status"]
        assert named == ("toy", "demo", "synthetic", "ok")


def test_finished_cells_are_not_run_again(grid):
    first = grid.run(*betas(1, 2))
    assert first.out.startswith("toy: device cpu, scale demo, data synthetic, 2 cells, 0 done")
    rows = grid.rows()
    again = grid.run(*betas(1, 2))
    assert "2 cells, 2 done" in again.out
    assert "--out elsewhere" in again.out
    assert "loaded" not in again.out
    assert grid.rows() == rows


def test_a_cell_that_is_listed_twice_is_trained_once(grid):
    assert "2 cells, 0 done" in grid.run(*betas(1, 1.0, 2)).out
    assert [row["beta"] for row in grid.rows()] == [1, 2]


@pytest.mark.parametrize("key", ["dataset", "status", "seconds", "keys"])
def test_cells_with_keys_of_every_row_are_refused_before_training(grid, key):
    result = grid.run({"beta": 1, key: "a"})
    assert result.status == 2
    assert key in result.err
    assert "loaded" not in result.out


@pytest.mark.parametrize("measured", [{"status": "converged"}, {"dataset": "b"}, {"beta": 9},
                                      {"seed": 3, "settings": {}}])
def test_what_is_measured_takes_no_name_of_the_row(grid, measured):
    result = grid.run(*betas(1), train=lambda *_: measured | {"value": 1.0})
    assert result.status == 0
    assert str(list(measured)) in result.err
    row, = grid.rows()
    assert (row["status"], row["beta"], row["seed"], row["value"]) == ("ok", 1, 0, 1.0)
    assert "1 cells, 1 done" in grid.run(*betas(1)).out


def test_what_is_measured_may_repeat_a_key_of_the_cell(grid):
    assert grid.run(*betas(1), train=lambda *_: {"beta": 1, "value": 1.0}).err == ""


def test_rows_of_cells_with_one_more_key_are_rows_of_their_own(grid):
    grid.run({"beta": 1, "steps_factor": 2})
    assert "1 cells, 0 done" in grid.run(*betas(1)).out
    after = grid.run(*betas(1)).out
    assert "1 rows in" in after and "rows 1" in after  # the other cell is none of this grid


def test_what_a_row_measured_is_no_key_of_its_cell(grid):
    cells = [*betas(1, 2), {"beta": 1, "value": 500}]  # "value" is measured in the others
    grid.run(*cells[:2])
    assert "3 cells, 2 done" in grid.run(*cells).out
    assert "3 cells, 3 done" in grid.run(*cells).out


@on_unix
def test_a_rows_file_that_is_replaced_in_mid_run_is_an_error(grid):
    def train(*arguments):
        copy = grid.path.with_suffix(".new")
        copy.write_bytes(grid.path.read_bytes())
        copy.replace(grid.path)
        return {"value": 1.0}

    result = grid.run(*betas(1, 2), train=train)
    assert result.status == 2
    assert "replaced" in result.err


def test_a_page_of_other_letters_and_line_ends_stays_as_it_is(grid):
    grid.out.mkdir()
    page = grid.out / "README.md"
    page.write_bytes(b"caf\xe9\r\n")
    assert grid.run(*betas(1)).status == 0
    assert page.read_bytes() == b"caf\xe9\r\n"


def test_curves_are_complete_by_keys_and_seed():
    cells = [{"n": n, "beta": beta} for n in (1, 2) for beta in (1, 2)]
    cells += [{"n": 3, "beta": 1, "seed": 0}, {"n": 3, "beta": 1, "seed": 1}]
    rows = [cell | {"status": "ok", "seed": seed} for seed in (0, 1) for cell in cells
            if cell.get("seed", seed) == seed]
    assert common.complete_curves(rows, cells, "n") == sorted(
        rows, key=lambda row: (row["n"], row["seed"], row["beta"]))
    fewer = [row for row in rows if (row["n"], row["seed"], row["beta"]) != (2, 1, 2)]
    whole = common.complete_curves(fewer, cells, "n")
    assert {(row["n"], row["seed"]) for row in whole} == {(1, 0), (1, 1), (2, 0), (3, 0), (3, 1)}


def test_names_of_scripts_and_folders_are_no_patterns(grid):
    grid.path = grid.out / "toy[1]+(a)-demo.jsonl"
    grid.name = "toy[1]+(a).py"
    grid.out.mkdir()
    page = grid.out / "README.md"
    page.write_text("<!-- toy[1]+(a)-demo -->\n<!-- end -->\n")
    grid.run(*betas(1), arguments=["--shard", "1/2"])
    assert "1 done" in grid.run(*betas(1)).out
    assert "rows 1" in page.read_text()


def test_a_cell_may_have_a_seed_of_its_own(grid):
    cells = betas(1) + betas(99, seed=4)
    assert "1 cells" in grid.run(*cells).out
    assert "2 cells" in grid.run(*cells, arguments=["--seeds", "4"]).out


def test_other_data_sets_have_rows_of_their_own(grid):
    grid.run(*betas(1, 2))
    other = grid.run(*betas(1, 2), arguments=["--dataset", "other"])
    assert "2 cells, 0 done" in other.out
    assert "rows 2" in other.out


def test_a_shard_beyond_the_last_cell_has_nothing_to_do(grid):
    empty = grid.run(*betas(1, 2), arguments=["--shard", "31/40"])
    assert empty.status == 0
    assert "loaded" not in empty.out


def test_rows_of_other_settings_are_left_aside(grid):
    grid.run(*betas(1), settings={"steps": [3, 5]})
    result = grid.run(*betas(1))
    assert "1 cells, 0 done" in result.out
    assert re.search(r"(?m)^1 rows .* other settings", result.out)
    assert "rows 1" in result.out


def test_lines_that_are_no_rows_are_named(grid):
    grid.run(*betas(1))
    row = grid.rows()[0]
    damaged = [row | {"figure": "fig9"}, row | {"seed": "0"}, row | {"settings": 3},
               row | {"status": "fine"}, row | {"keys": None}, row | {"keys": [["a"]]},
               {"beta": 1}, [1], 7]
    lines = [json.dumps(row), *map(json.dumps, damaged), "{"]  # the last line is torn
    grid.path.write_text("\n".join(lines))
    result = grid.run(*betas(1, 2))
    assert "2 cells, 1 done" in result.out
    assert re.findall(r"line (\d+)", result.err)[:10] == [str(number) for number in range(2, 12)]
    assert json.loads(grid.path.read_text().splitlines()[-1])["beta"] == 2


@pytest.mark.parametrize("then, now, said", [
    ("abc1234", "abc1234", False), ("abc1234", "def5678", True), ("abc1234", "abc1234-dirty", True),
    ("abc1234-dirty", "abc1234-dirty", True),  # in which the code may have changed again
    ("unknown", "unknown", True)])
def test_commits_of_rows_by_what_may_be_other_code_are_said(grid, monkeypatch, then, now, said):
    for commit in (then, now):
        monkeypatch.setattr(common, "_git_revision", lambda: commit)
        printed = grid.run(*betas(1)).out
    assert (f"rows were trained at commit {then}, perhaps by other code" in printed) == said


def test_a_diverged_cell_is_recorded(grid):
    assert grid.run({"do": "diverge"}, {"do": "no"}).status == 0
    assert [row["status"] for row in grid.rows()] == ["diverged", "ok"]
    assert "NaN" not in grid.path.read_text()
    assert "2 done" in grid.run({"do": "diverge"}, {"do": "no"}).out


def test_no_finished_row_is_one_line(grid):
    result = grid.run({"do": "diverge"})
    assert result.status == 2
    assert "every cell diverged" in result.err
    assert result.err.count("\n") == 1


def test_tables_are_put_into_the_page(grid):
    grid.out.mkdir()
    page = grid.out / "README.md"
    page.write_text("before\n<!-- toy-demo -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    printed = grid.run(*betas(1, 2)).out
    table = (grid.out / "toy-demo.md").read_text()
    assert "| claim | paper | ours | holds |\n" in table
    assert "| c | p | rows 2 | NO |\n" in table
    assert table in printed
    claims = table.split("\n\n")[1]
    count = "Claims: 0 hold, 1 fail, 1 not measured yet ([all, and every cell](toy-demo.md))."
    assert page.read_text() == (f"before\n<!-- toy-demo -->\n\n{count}\n\n{claims}\n\n"
                                "<!-- end -->\nafter <!-- end -->\n")


def test_claims_that_are_no_longer_made_leave_the_page(grid):
    grid.out.mkdir()
    page = grid.out / "README.md"
    page.write_text("<!-- toy-demo -->\nClaims: 1 hold\n| c |\n<!-- end -->\n")
    save_tables(SimpleNamespace(out=grid.out, figure="toy", scale="demo"), claims=[None, None])
    assert page.read_text() == ("<!-- toy-demo -->\n\nClaims: 0 hold, 0 fail, 2 not measured yet "
                                "([all, and every cell](toy-demo.md)).\n\n<!-- end -->\n")


@pytest.mark.parametrize("holds, count", [
    (["yes", "yes"], "Claims: 2 hold, 0 fail ("),
    (["NO", "undecided", "undecided"], "Claims: 0 hold, 1 fail, 2 undecided (")])
def test_the_page_counts_verdicts(tmp_path, holds, count):
    page = tmp_path / "README.md"
    page.write_text("<!-- toy-demo -->\n<!-- end -->\n")
    save_tables(SimpleNamespace(out=tmp_path, figure="toy", scale="demo"),
                claims=[{"claim": "c", "holds": verdict} for verdict in holds])
    assert count in page.read_text()


def test_claims_that_do_not_hold_stand_on_the_page(tmp_path):
    args = SimpleNamespace(out=tmp_path, figure="toy", scale="demo")
    page = tmp_path / "README.md"
    page.write_text("<!-- toy-demo -->\n<!-- end -->\n")
    verdicts = ["yes", "NO", "undecided", *["NO"] * 6]
    save_tables(args, claims=[{"claim": f"number {i}", "holds": verdict}
                              for i, verdict in enumerate(verdicts)])
    assert re.findall(r"number (\d)", page.read_text()) == list("123456")


# === What a row can hold

@pytest.mark.parametrize("what", ["numpy", "torch"])
def test_numbers_of_numpy_and_torch_are_stored(grid, what):
    assert grid.run({"do": what}).status == 0
    stored = {key: grid.rows()[0][key] for key in "abcd"}
    assert stored == {"a": 0.5, "b": [3], "c": [0, 1], "d": True}


@pytest.mark.parametrize("what", ["nan in depth", "inf in depth"])
def test_finiteness_is_checked_in_depth(grid, what):
    grid.run({"do": what}, {"do": "no"})
    assert [row["status"] for row in grid.rows()] == ["diverged", "ok"]


def test_accuracies_in_a_list_are_stored(grid):
    assert grid.run({"do": "list of accuracies"}).status == 0
    assert grid.rows()[0]["train_acc"] == [0.5, 0.25]


@pytest.mark.parametrize("value, stored", [
    ((1, (2, 3)), [1, [2, 3]]), (np.int64(3), 3), (np.float32(0.5), 0.5),
    (torch.tensor(2), 2), ({"a": (1,)}, {"a": [1]}), (None, None)])
def test_cells_are_compared_as_they_are_stored(grid, value, stored):
    assert grid.run({"width": value}).status == 0
    assert grid.rows()[0]["width"] == stored
    assert "1 cells, 1 done" in grid.run({"width": value}).out


def test_an_integer_and_its_float_are_one_cell(grid):
    grid.run({"beta": 1})
    assert "1 cells, 1 done" in grid.run({"beta": 1.0}).out


def test_rows_are_found_and_grouped_by_tuples(grid):
    rows = [{"status": "ok", "seed": 0, "widths": widths} for widths in ([1, 2], [3])]
    assert common.ok_rows(rows, widths=(1, 2)) == rows[:1]
    assert list(common.group_by(rows, "widths")) == [((1, 2),), ((3,),)]
    assert common.complete_seeds(rows, [{"widths": (1, 2)}, {"widths": (3,)}]) == rows


@pytest.mark.parametrize("value", [{1, 2}, math.nan, [math.inf], common, {"a": 1j},
                                   {1: 2, "1": 3}])
def test_a_cell_that_cannot_be_stored_is_refused_before(grid, value):
    result = grid.run({"width": 1}, {"width": value})
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "loaded" not in result.out
    assert not grid.out.exists()


def test_settings_that_cannot_be_stored_are_refused_before(grid):
    assert grid.run(*betas(1), settings={"lr": math.nan}).status == 2
    assert not grid.out.exists()


# === Cells that fail

FAULTS = {"raise": "ZeroDivisionError: a fault in the cell", "raise unpicklable": "Unpicklable",
          "exit": "gives up", "open": "FileNotFoundError.*no such checkpoint",
          "raise its own": "Stop: a fault of its own", "set": "TypeError|AttributeError"}


@pytest.mark.parametrize("what, error", FAULTS.items())
def test_a_failing_cell_is_reported_and_the_others_go_on(grid, what, error):
    result = grid.run({"do": what}, {"do": "no"})
    assert result.status == 1
    assert f"'do': '{what}'" in result.err
    assert re.search(f"Traceback(.|\n)*({error})", result.err)
    assert [row["do"] for row in grid.rows()] == ["no"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_cell_that_train_cell_changes_is_stored_as_it_was(grid, jobs):
    grid.run(*betas(1, 2), arguments=["--jobs", jobs], train=train_and_spoil)
    assert sorted(row["beta"] for row in grid.rows()) == [1, 2]
    assert "2 done" in grid.run(*betas(1, 2), train=train_and_spoil).out


def test_a_failure_without_a_message_has_its_traceback(grid):
    def train(*arguments):
        raise TimeoutError

    assert "Traceback" in grid.run(*betas(1), train=train).err


def test_cells_that_another_run_finished_meanwhile_are_not_trained_again(grid):
    def prepare(args):  # the other run ends while this one loads its data
        grid.path.write_text(text)

    grid.run(*betas(1, 2))
    text = grid.path.read_text()
    grid.path.unlink()
    assert grid.run(*betas(1, 2, 3), prepare=prepare).status == 0
    assert [row["beta"] for row in grid.rows()] == [1, 2, 3]


def test_a_failed_cell_is_tried_again(grid):
    grid.run({"do": "raise"}, {"do": "no"})
    again = grid.run({"do": "raise"}, {"do": "no"})
    assert "2 cells, 1 done" in again.out
    assert again.status == 1
    mended = grid.run({"do": "raise"}, {"do": "no"}, train=train_well)
    assert mended.status == 0
    assert len(grid.rows()) == 2


@on_unix
def test_workers_report_failures_and_deaths_and_go_on(grid):
    cells = [{"do": what} for what in ("die", *FAULTS, "diverge", "numpy", "no")]
    result = grid.run(*cells, arguments=["--jobs", "2"])
    assert result.status == 1
    assert f"{len(FAULTS) + 1} of {len(cells)} cells failed" in result.err
    assert "'die', 'seed': 0} failed: its process was killed" in result.err
    for what in FAULTS:
        assert f"'do': '{what}', 'seed': 0}} failed: Traceback" in result.err
    rows = {row["do"]: row for row in grid.rows()}  # in the order in which they were finished
    status = {do: row["status"] for do, row in rows.items()}
    assert status == {"diverge": "diverged", "numpy": "ok", "no": "ok"}
    children, patience = multiprocessing.active_children(), 300
    while any(child.is_alive() for child in children) and patience:  # were told to end
        time.sleep(0.1)
        patience -= 1
    assert patience
    grid.path.unlink()
    grid.run({"do": "no"})
    assert grid.rows()[0]["value"] == rows["no"]["value"]  # the same in one process


@on_unix
def test_a_worker_that_dies_at_its_start_costs_one_cell(grid, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_set_up_worker", die_third)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    (tmp_path / "starts").mkdir()
    result = grid.run({"do": "die"}, *betas(1, 2, 3, sleep=1), arguments=["--jobs", "2"])
    assert result.status == 1
    assert "2 of 4 cells failed" in result.err
    assert len(grid.rows()) == 2


def die_third(train_cell):
    """In the place of _set_up_worker: the third worker that starts is killed."""
    starts = Path(os.environ["STARTS"])
    (starts / str(os.getpid())).touch()
    if len(list(starts.iterdir())) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_cannot_be_sent_to_workers_is_said(grid):
    def train_local(*arguments):
        return {"value": 1.0}

    result = grid.run(*betas(1, 2), train=train_local, arguments=["--jobs", "2"])
    assert result.status == 2
    assert "worker processes cannot start" in result.err
    assert "--jobs 1" in result.err


# === The command line

@pytest.mark.parametrize("arguments", [
    "--gpu x", "--gpu -1", "--gpu 0,1", "--jobs 0", "--jobs two", "--shard 3/2", "--shard 1",
    "--shard a/b", "--shard 1/0", "--seeds -1", "--seeds one", "--seeds 99999999999999999999",
    "--scale huge", "--dataset imagenet", "--out ~nobody-of-this-name/x", "--nonsense"])
def test_bad_values_are_one_line_that_names_them(grid, arguments):
    result = grid.run(*betas(1), arguments=arguments.split())
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert arguments.split()[-1] in result.err
    assert not grid.out.exists()


@pytest.mark.parametrize("arguments, needed", [
    ("--jobs two", "a whole number from 0 on"), ("--shard 3/2", "I/N with I from 1 to N"),
    ("--out {file}", "a folder")])
def test_bad_values_come_with_what_is_needed(grid, tmp_path, arguments, needed):
    file = tmp_path / "file"
    file.touch()
    result = grid.run(*betas(1), arguments=arguments.format(file=file).split())
    assert result.status == 2
    assert f"{needed} is needed" in result.err


def test_plot_only_without_rows_names_the_folder(grid):
    result = grid.run(*betas(1), arguments=["--plot-only"])
    assert result.status == 2
    assert str(grid.out) in result.err
    assert not grid.out.exists()


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has this GPU")
def test_a_gpu_that_is_not_there_gives_a_warning(grid):
    result = grid.run(*betas(1), arguments=["--gpu", "7"])
    assert result.status == 0
    assert result.err == "warning: GPU 7 is not usable, going on with the CPU\n"


def test_a_folder_that_is_a_file_is_one_line(grid):
    grid.out.write_text("a file, not a folder")
    result = grid.run(*betas(1))
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert str(grid.out) in result.err
    assert "loaded" not in result.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(grid):
    grid.out.mkdir()
    grid.path.symlink_to("/dev/full")
    result = grid.run(*betas(1))
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "space" in result.err


def test_missing_data_leave_no_rows_file(grid):
    def missing(args):
        raise common.DataError("no data")

    result = grid.run(*betas(1), prepare=missing)
    assert (result.status, result.err) == (2, "error: no data\n")
    assert not grid.path.exists()


def test_folders_of_the_user_are_found(grid, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out=~/here", "--data-dir=~/there"])
    args = common.parse_args("", {"cpu": ["toy"]}, {"cpu": [0]})
    assert (args.out, args.data_dir) == (tmp_path / "here", tmp_path / "there")


def test_data_that_are_too_few_for_a_cell_are_one_line_each(grid):
    def few(cell, *_):
        if cell["beta"] == 2:
            raise common.DataError("9 images are needed")
        return {"value": 1.0}

    result = grid.run(*betas(1, 2), train=few)
    assert result.status == 1
    assert "failed: 9 images are needed\n" in result.err
    assert "Traceback" not in result.err


def test_an_empty_folder_of_the_user_stays(tmp_path):
    with common._one_process(tmp_path / "mnist.npz"):
        pass
    assert tmp_path.exists()
    with common._one_process(tmp_path / "new" / "mnist.npz"):
        pass
    assert not (tmp_path / "new").exists()


# === Processes, signals

TOY = '''
import sys
sys.path.insert(0, {here!r})
from beyond.test_grid import train_toy
from common import parse_args, run_grid

def train_cell(*arguments):
    return train_toy(*arguments)

def main():
    args = parse_args("A toy.", {{"demo": ["synthetic"]}}, {{"demo": [0]}})
    run_grid({cells}, train_cell, args)

{call}
'''
GUARD = 'if __name__ == "__main__":\n    main()'
# Imports take most of a short run: on Linux they are done once.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["beyond.test_grid"])


class Toy:
    """A script with these cells, in processes of its own."""

    def __init__(self, folder, cells, call=GUARD, before=""):
        self.folder, self.script, self.out = folder, folder / "toy.py", folder / "out"
        toy = TOY.format(here=str(HERE), cells=cells, call=call)
        self.script.write_text(before + toy)
        self.path = self.out / "toy-demo.jsonl"
        self.command = [str(self.script), "--scale", "demo", "--out", str(self.out)]

    def start(self, *arguments):
        return Run(*self.command, *arguments)

    def run(self, *arguments):
        return self.start(*arguments).wait()

    def rows(self, name="toy-demo.jsonl"):
        lines = (self.out / name).read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_rows(self, count):
        deadline = time.monotonic() + 180
        while not self.path.exists() or self.path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


class Run:
    """python <script> <arguments>, as a child of the process that has the imports."""

    def __init__(self, *command):
        self.folder = tempfile.TemporaryDirectory()
        self.process = CONTEXT.Process(target=run_script, args=(command, self.folder.name))
        self.process.start()

    def kill(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=120):
        """Its exit status, and what it has printed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError
        out, err = (Path(self.folder.name, name).read_text() for name in ("stdout", "stderr"))
        return SimpleNamespace(status=self.process.exitcode, out=out, err=err)


def run_script(command, folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if we run in the background
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


@on_unix
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_kill_loses_nothing_that_is_finished(tmp_path, jobs):
    toy = Toy(tmp_path, betas(*range(8), sleep=0.4, log=str(tmp_path)))
    run = toy.start("--jobs", jobs)
    toy.wait_for_rows(2)
    run.kill(signal.SIGKILL)
    run.wait()
    saved, finished = toy.rows(), len(list(tmp_path.glob("finished-*")))
    time.sleep(0.8)  # in which a worker that lives on would finish a cell
    assert len(list(tmp_path.glob("finished-*"))) == finished
    with open(toy.path, "a") as file:
        file.write('{"figure": "toy", "beta": 3, "se')
    result = toy.run("--jobs", "1")
    assert result.status == 0
    assert f"8 cells, {len(saved)} done" in result.out
    assert "not counted" in result.err
    rows = toy.rows()
    assert rows[:len(saved)] == saved
    assert sorted(row["beta"] for row in rows) == list(range(8))


@on_unix
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_ends_with_130_and_says_what_is_saved(tmp_path, jobs):
    toy = Toy(tmp_path, betas(*range(8), sleep=0.3))
    run = toy.start("--jobs", jobs)
    toy.wait_for_rows(1)
    run.kill(signal.SIGINT)
    result = run.wait(timeout=30)
    assert result.status == 130
    assert str(toy.out) in result.err
    assert "Traceback" not in result.err


def test_ctrl_c_while_drawing_ends_with_130(tmp_path, capsys):
    def panel(ax):
        raise KeyboardInterrupt

    args = SimpleNamespace(out=tmp_path, figure="toy", scale="demo")
    with pytest.raises(SystemExit) as end:
        common.save_panels([panel], "title", args)
    assert end.value.code == 130
    assert capsys.readouterr().err == "\nstopped: the rows are saved, --plot-only draws them\n"


def test_shards_side_by_side_are_the_whole_grid(tmp_path):
    toy = Toy(tmp_path, betas(1, 2, 3, 4, 5, sleep=0.2))
    runs = [toy.start("--jobs", "1", "--shard", shard) for shard in ("1/2", "2/2")]
    assert [run.wait().status for run in runs] == [0, 0]
    parts = [toy.rows(f"toy-demo.{i}-of-2.jsonl") for i in (1, 2)]
    assert [[row["beta"] for row in part] for part in parts] == [[1, 3, 5], [2, 4]]
    assert not toy.path.exists()
    assert "5 cells, 5 done" in toy.run("--plot-only").out


@on_unix
def test_two_identical_commands_do_not_train_twice(tmp_path):
    toy = Toy(tmp_path, betas(1, 2, 3, sleep=1))
    first = toy.start("--jobs", "1")
    toy.wait_for_rows(1)
    second = toy.run("--jobs", "1")
    assert second.status == 2
    assert f"{toy.path} is being written by another run" in second.err
    assert first.wait().status == 0
    assert [row["beta"] for row in toy.rows()] == [1, 2, 3]


@pytest.mark.parametrize("how", ["no guard", "standard input"])
def test_workers_that_cannot_start_say_so(tmp_path, how):
    toy = Toy(tmp_path, betas(1, 2), call="main()")
    command, text = [str(toy.script)], None
    if how == "standard input":
        command, text = ["-"], toy.script.read_text()
    result = subprocess.run([sys.executable, *command, *toy.command[1:], "--jobs", "2"],
                            input=text, text=True, capture_output=True, timeout=300)
    assert result.returncode == 2
    assert "error: worker processes cannot start" in result.stderr
    assert "memory" not in result.stderr


@on_unix
def test_a_closed_standard_output_does_not_matter(tmp_path):
    closed = "import os, sys\nos.close(1)\nsys.stdout = None\n"
    toy = Toy(tmp_path, [{"do": "no"}], before=closed)
    result = toy.run("--jobs", "1")
    assert (result.status, result.err) == (0, "")
    assert len(toy.rows()) == 1


@on_unix
def test_a_row_cut_short_is_an_error_and_is_run_again(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
    result = Toy(tmp_path, betas(1, 2, 3), before=limit).run("--jobs", "1")
    assert result.status == 2
    assert result.err.count("\n") == 1
    toy = Toy(tmp_path, betas(1, 2, 3))
    assert toy.run("--jobs", "1").status == 0
    assert [row["beta"] for row in toy.rows()] == [1, 2, 3]


# === Data that several processes want

def load_at_once(folder):
    """Load MNIST where torchvision's copy takes its time, and says when it is asked."""
    def slow(name, data_dir):
        Path(data_dir, f"asked-{os.getpid()}").touch()
        time.sleep(0.5)
        digits, labels = np.zeros((3, 28, 28), np.uint8), np.arange(3)
        return dict(zip(common.ARRAYS[name], (digits, labels, digits, labels)))

    common._from_torchvision = slow
    assert common.load_mnist(folder)[1].tolist() == [0, 1, 2]


@on_unix
def test_shards_that_start_together_make_the_data_once(tmp_path):
    processes = [CONTEXT.Process(target=load_at_once, args=(tmp_path / "data",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "data").iterdir()) == [
        "asked", "mnist.npz"]


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_from_torchvision", lambda *_: 1 / 0)
    with pytest.raises(common.DataError):
        common.load_mnist(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_truncated_copy_of_torchvision_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = np.array([2051, 100, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(50))  # not 100 * 784
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, 100], ">i4").tobytes())
    with pytest.raises(common.DataError, match=re.escape(f"delete {tmp_path / 'MNIST'}")):
        common.load_mnist(tmp_path)


# === Where the code stands

def revision(folder, name="common.py"):
    """_git_revision of a copy of common.py in a folder."""
    path = folder / name
    path.write_text("")
    space = {"__file__": str(path), "Path": Path, "subprocess": subprocess}
    exec(inspect.getsource(common._git_revision), space)
    return space["_git_revision"]()


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "common.py").touch()
    git(tmp_path, "add", "common.py")
    git(tmp_path, "commit", "-m", "one")
    return tmp_path


def test_the_commit_is_recorded_and_dirt_is_said(repository):
    commit = git(repository, "rev-parse", "--short", "HEAD")
    assert revision(repository) == commit
    (repository / "new.py").touch()
    assert revision(repository) == f"{commit}-dirty"


def test_the_commit_of_an_outer_repository_is_not_recorded(repository):
    inner = repository / "inner"
    inner.mkdir()
    assert revision(inner) == "unknown"


@on_unix
def test_a_folder_with_shell_code_in_its_name_is_not_run(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = repository / '$(touch run)"`touch run`'
    inner.mkdir()
    (inner / "common.py").touch()
    git(repository, "add", ".")
    git(repository, "commit", "-m", "two")
    assert revision(inner) == git(repository, "rev-parse", "--short", "HEAD")
    assert not Path("run").exists()


# === Plots and tables of whatever rows there are

SCRIPTS = sorted(path.stem for path in HERE.glob("fig?_*.py"))
SCRIPTS += sorted(f"beyond.{path.stem}" for path in (HERE / "beyond").glob("[!_t]*.py"))


def test_scripts_start_under_any_mplbackend(tmp_path):
    code = ("import importlib, sys\n"
            f"modules = [importlib.import_module(name) for name in {SCRIPTS}]\n"
            f"sys.argv = ['toy.py', '--scale', 'demo', '--out', {str(tmp_path)!r}]\n"
            "import common\n"
            "args = common.parse_args('', {'demo': ['synthetic']}, {'demo': [0]})\n"
            "common.synthetic_digits(2)\n"
            "common.save_panels([lambda ax: ax.plot([1, 2])], '', args)")
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                            env=os.environ | {"MPLBACKEND": "module://not_installed"})
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "toy-demo.png").exists()


class Caught(Exception):
    """What main() of a script gives to run_grid."""


def grid_of(module, scale, monkeypatch):
    """(cells, train_cell, args, settings) of a script."""
    def catch(cells, train_cell, args, settings=None, prepare=None):
        raise Caught(cells, train_cell, args, settings)

    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--scale", scale])
    with monkeypatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(module, "run_grid", catch)
        module.main()
    return caught.value.args


def shrunk(value, name=""):
    """Settings with less to train: few steps, images and draws."""
    if isinstance(value, dict):
        return {key: shrunk(entry, key) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(shrunk(entry, name) for entry in value)
    if isinstance(value, int):
        return min(value, 8 if "steps" in name or name in ("first", "draws") else 100)
    return value


def kind(cell):
    """Cells of one kind have the same keys and the same words."""
    return *cell, *(value for value in cell.values() if isinstance(value, str))


def templates(module, monkeypatch, folder):
    """{kind: a row of a short training}, and one for cells of other kinds."""
    for figure in [figure for name, figure in sys.modules.items() if name in SCRIPTS]:
        if not getattr(figure, "shrunk", False):
            monkeypatch.setitem(figure.SETTINGS, "demo", shrunk(figure.SETTINGS["demo"]))
            monkeypatch.setattr(figure, "shrunk", True, raising=False)
    cells, train_cell, args, _ = grid_of(module, "demo", monkeypatch)
    args.out, rows = folder, {}
    for cell in cells:
        cell = {"seed": 0} | cell | ({"n": min(cell["n"], 100)} if "n" in cell else {})
        if kind(cell) not in rows:
            row = train_cell(cell, args.device, args, lambda *_: None)
            rows[kind(cell)] = rows[None] = common._through_json(row)
    return rows


def varied(value, rng, name=""):
    """A measurement with other floats in place of each: accuracies from 0 to 1."""
    if isinstance(value, dict):
        return {key: varied(entry, rng, key) for key, entry in value.items()}
    if isinstance(value, list):
        return [varied(entry, rng, name) for entry in value]
    if isinstance(value, float):
        return rng.random() if "acc" in name else value * rng.lognormvariate(0, 0.3)
    return value


def made_rows(module, args, cells, settings, template, rng):
    """A row for every cell and seed, some of them diverged."""
    rows = []
    for seed in (0, 1, 2):
        for cell in cells:
            if cell.get("seed", seed) != seed:
                continue
            head = {"figure": args.figure, "scale": args.scale, "dataset": args.dataset,
                    "status": "ok", "seconds": 1.0, "git": "0", "settings": settings}
            measured = template.get(kind({"seed": 0} | cell)) or template[None]
            if rng.random() < 0.05:
                head["status"], measured = "diverged", {}
            rows.append(common._through_json(head | varied(measured, rng) | cell | {"seed": seed}))
    return rows


def subsets(rows, cells, rng):
    """Of rows: all, shards, those of one seed, the first ones, none of a kind or only that."""
    yield rows
    for parts in (2, 5, 20):
        yield rows[rng.randrange(parts)::parts]
    yield [row for row in rows if row["seed"] == 1]
    for count in (1, 2, 3, *rng.sample(range(4, max(len(rows), 8)), 2)):
        yield rows[:count]
    kinds = sorted({(key, value) for cell in cells for key, value in cell.items()
                    if isinstance(value, (str, int, float))}, key=str)
    for key, value in rng.sample(kinds, min(4, len(kinds))):
        yield [row for row in rows if row.get(key) != value]
        yield [row for row in rows if row.get(key) == value]


@pytest.mark.parametrize("script", SCRIPTS)
def test_plots_and_tables_are_made_of_some_of_the_rows(
        script, tmp_path, monkeypatch, capsys, one_commit):
    """Every subset that has a finished row is drawn by main(), in this process."""
    module, rng = importlib.import_module(script), random.Random(script)
    template = templates(module, monkeypatch, tmp_path)
    cells, _, args, settings = grid_of(module, "cpu", monkeypatch)
    rows = made_rows(module, args, cells, settings, template, rng)
    command = [f"{args.figure}.py", "--scale", "cpu", "--plot-only", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    for number, some in enumerate(subsets(rows, cells, rng)):
        if not common.ok_rows(some):
            continue
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{args.figure}-cpu.jsonl").write_text(text)
        try:
            module.main()
        except (Exception, SystemExit) as error:
            raise AssertionError(f"subset {number}, {len(some)} rows: {error!r}") from error
        assert "warning" not in capsys.readouterr().err
