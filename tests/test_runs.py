"""The run directory: whose it is, what it keeps, and what it does when the disk, the power or another process interferes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from temper import runs
from temper.config import Settings, UserError, opt
from temper.runs import Run, atomic_write, differences, fingerprint, load_checkpoint, load_latest, save_checkpoint

IDENTITY = {"method": "sft", "settings": {"lr": 1e-3, "batch": 8, "words": ["a", "b"]}, "inputs": {"data": "0" * 64}}


def changed(**settings):
    return {**IDENTITY, "settings": {**IDENTITY["settings"], **settings}}


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- whose folder it is


def test_claim_creates_then_goes_on_then_refuses_another(tmp_path):
    with Run.claim(tmp_path / "a" / "sft", IDENTITY, record={"parent": "base", "threads": 2}) as run:
        stage = run.stage
        assert stage["status"] == "running"
        assert stage["identity"] == IDENTITY
        assert stage["record"] == {"parent": "base", "threads": 2}
        assert stage["fingerprint"] == fingerprint(IDENTITY)
        assert {"python", "torch", "transformers"} <= stage["versions"].keys()
        run.log("metrics", {"step": 1, "loss": 0.5})
    with Run.claim(tmp_path / "a" / "sft", IDENTITY) as run:
        assert run.rows("metrics") == [{"step": 1, "loss": 0.5}]
    with pytest.raises(UserError) as caught:
        Run.claim(tmp_path / "a" / "sft", changed(lr=3e-4))
    assert str(caught.value).endswith("sft belongs to another run: lr 0.001 there, 0.0003 here; choose another --out or --fresh")
    assert Run(tmp_path / "a" / "sft").rows("metrics") == [{"step": 1, "loss": 0.5}]


def test_another_run_is_told_by_its_method_and_by_the_names_of_its_inputs(tmp_path):
    def claim(method, data, key):
        identity = {"method": method, "settings": {"batch": 8}, "inputs": {"data": key * 32}}
        return Run.claim(tmp_path / "out", identity, record={"named": {"data": data}})

    claim("sft", "a.jsonl", "ab").close()
    with pytest.raises(UserError, match="method sft there, dpo here; choose"):
        claim("dpo", "a.jsonl", "ab")
    with pytest.raises(UserError, match=r"inputs.data abababababab \(a.jsonl\) there, cdcdcdcdcdcd \(b.jsonl\) here; choose"):
        claim("sft", "b.jsonl", "cd")


def test_tuples_sets_and_settings_are_the_same_identity_after_a_round_trip(tmp_path):
    class Some(Settings):
        lr: float = opt(0.1, "rate")
        sizes: tuple[int, ...] = opt((1, 2), "sizes")

    for _ in range(2):
        Run.claim(tmp_path / "r", {"settings": Some(), "t": (1, 2), "path": Path("x")}).close()


def test_other_code_or_versions_go_on_and_say_so(tmp_path, monkeypatch):
    with Run.claim(tmp_path / "r", IDENTITY):
        pass
    monkeypatch.setattr("temper.runs.versions", lambda: {"torch": "9"})
    with Run.claim(tmp_path / "r", IDENTITY) as run:
        [event] = run.rows("events")
        assert event["event"] == "changed"
        assert "versions.torch" in event["what"]
        assert run.stage["versions"] == {"torch": "9"}


def test_another_command_for_the_same_result_is_no_change(tmp_path):
    """A record is not compared: with --save-seconds or --quiet the figures stay the same."""
    with Run.claim(tmp_path / "r", IDENTITY, record={"command": "temper sft"}):
        pass
    with Run.claim(tmp_path / "r", IDENTITY, record={"command": "temper sft --save-seconds 5"}) as run:
        assert run.rows("events") == []
        assert run.stage["record"]["command"] == "temper sft --save-seconds 5"


def test_differences_in_words():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c 2 there, 3 here"
    assert differences({"settings": {"lr": 1}}, {"settings": {"rate": 2}}) == "rate not there, 2 here, lr 1 there, not here"
    assert (
        differences({str(i): i for i in range(5)}, {str(i): -i for i in range(5)})
        == "1 1 there, -1 here, 2 2 there, -2 here, 3 3 there, -3 here and 1 more"
    )
    assert differences({"data": "a" * 64}, {"data": "b" * 64}) == f"data {'a' * 12} there, {'b' * 12} here"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, fresh):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.txt but no stage.json.*choose another --out"):
        Run.claim(tmp_path, IDENTITY, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file, not a folder"):
        Run.claim(tmp_path / "thesis.txt", IDENTITY, fresh=fresh)


def test_fresh_removes_what_is_its_own_and_nothing_else(tmp_path):
    with Run.claim(tmp_path / "r", IDENTITY) as run:
        run.log("metrics", {"step": 1})
        run.set_status(phase="train", now=True, step=1)
        run.model.mkdir()
        run.file("tokenizer").mkdir()
        run.file("pairs.jsonl").write_text("{}\n")
        save_checkpoint(run.checkpoints, 1, {"x": 1})
        (run.folder / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="not a place inside"):
            run.file("../other")
    with Run.claim(tmp_path / "r", changed(lr=0.5), fresh=True) as run:
        assert sorted(path.name for path in run.folder.iterdir()) == [".lock", "notes.txt", "stage.json"]
        assert run.stage["identity"] == changed(lr=0.5)


def test_a_death_while_clearing_is_cleared_on(tmp_path):
    with Run.claim(tmp_path / "r", IDENTITY) as run:
        run.finish({"steps": 3})
        run.model.mkdir()
        run.update(status="clearing")
    with Run.claim(tmp_path / "r", IDENTITY) as run:
        assert not run.model.exists()
        assert not run.done


def test_an_unreadable_stage_file(tmp_path):
    Run.claim(tmp_path / "r", IDENTITY).close()
    (tmp_path / "r" / "stage.json").write_text('{"ident')
    assert Run(tmp_path / "r").stage == {}
    with pytest.raises(UserError, match=r"stage.json cannot be read; choose another --out or --fresh"):
        Run.claim(tmp_path / "r", IDENTITY)
    Run.claim(tmp_path / "r", IDENTITY, fresh=True).close()


def test_one_writer_at_a_time_and_a_dead_one_does_not_count(tmp_path):
    code = (
        "import sys, time; from temper.runs import Run; run = Run.claim(sys.argv[1], {'a': 1}); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    for fresh in (False, True):
        with pytest.raises(UserError, match=f"is being written by process {child.pid}"):
            Run.claim(tmp_path / "r", {"a": 1}, fresh=fresh)
    assert Run(tmp_path / "r").stage["identity"] == {"a": 1}  # anybody may read
    child.kill()
    child.wait()
    Run.claim(tmp_path / "r", {"a": 1}).close()


def test_a_reader_cannot_write(tmp_path):
    Run.claim(tmp_path / "r", IDENTITY).close()
    run = Run(tmp_path / "r")
    for write in (
        lambda: run.log("metrics", {}),
        lambda: run.update(a=1),
        lambda: run.truncate_after(0),
        lambda: run.set_status(phase="x"),
    ):
        with pytest.raises(RuntimeError, match="reading only"):
            write()
    assert Run(tmp_path / "nowhere").stage == Run(tmp_path / "nowhere").status == {}
    assert Run(tmp_path / "nowhere").rows("metrics") == []


# ---------------------------------------------------------------- logs


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path):
    with Run.claim(tmp_path / "r", IDENTITY) as run:
        for step in (1, 2, 3):
            run.log("metrics", {"step": step, "loss": step / 3})
            run.log("metrics", {"step": step, "eval": {"gold": step}})
            run.event("made", step=step)
        run.event("history")
        before = (run.folder / "metrics.jsonl").read_bytes()
        with open(run.folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 4, "lo')
        assert [row["step"] for row in run.rows("metrics")] == [1, 1, 2, 2, 3, 3]
        run.truncate_after(2)
        assert (run.folder / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:4])
        assert [row.get("step") for row in run.rows("events")] == [1, 2, None]
        run.log("metrics", {"step": 3})
        assert [row["step"] for row in run.rows("metrics")] == [1, 1, 2, 2, 3]


def test_numbers_in_logs(tmp_path):
    with Run.claim(tmp_path / "r", IDENTITY) as run:
        run.log(
            "metrics", {"nan": float("nan"), "inf": np.float32("inf"), "np": np.int64(3), "t": torch.tensor(0.5), "x": 0.1 + 0.2, "ü": "ß"}
        )
        assert run.rows("metrics") == [{"nan": None, "inf": None, "np": 3, "t": 0.5, "x": 0.1 + 0.2, "ü": "ß"}]
        with pytest.raises(ValueError, match="no log 'metric'"):
            run.log("metric", {})
        run.set_status(phase="train", now=True, step=2)
        run.set_status(phase="train", step=3)  # too soon
        assert run.status["step"] == 2


def test_runs_does_not_import_torch():
    """The studio reads run directories without it."""
    code = "import sys, temper.runs; assert 'torch' not in sys.modules and 'safetensors' not in sys.modules; temper.runs.code_version()"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- fingerprints


def test_fingerprint_is_of_the_content(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "sub").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "sub" / "w").write_bytes(b"123")
    (b / ".cache").mkdir()
    (b / ".cache" / "x").write_text("1")
    os.utime(b / "config.json", (1, 1))
    assert fingerprint(a) == fingerprint(b)
    (b / "sub" / "w").rename(b / "sub" / "v")
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a / "config.json") == fingerprint(b / "config.json")
    with pytest.raises(UserError, match="no such file"):
        fingerprint(tmp_path / "c")
    assert fingerprint({"x": 1, "y": (1, 2)}) == fingerprint({"y": [1, 2], "x": 1}) != fingerprint({"x": 1, "y": [2, 1]})
    assert runs.code_version() == runs.code_version()


# ---------------------------------------------------------------- checkpoints


def rich_state():
    base = torch.randn(4, 6)
    return {
        "weights": {
            "a": base,
            "tied": base,
            "view": base[1:3, :4],
            "t": base.T,
            "bf16": torch.randn(3).bfloat16(),
            "empty": torch.zeros(0, 2),
        },
        "integers": torch.tensor([2**62, -1]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "adam": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}},
        "numbers": [0.1, 1e-310, -0.0, float("inf"), 7, 2**200, True, None, "text", ""],
        "pair": (1, (2, [3])),
        "philox": np.random.Generator(np.random.Philox(5)).bit_generator.state,
        "numpy": np.random.get_state(),
        "float": np.float64(0.1),
        "wide": np.arange(6, dtype=">u2").reshape(2, 3)[:, ::2],
        "like a tag": {"tensor": "0", "dict": [1], "tuple": 2},
    }


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert repr(a) == repr(b)


def test_a_state_comes_back_as_it_was(tmp_path):
    state = rich_state()
    path = save_checkpoint(tmp_path, 12, state)
    assert path == tmp_path / "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    loaded = load_latest(tmp_path)
    assert loaded.step == 12
    assert loaded.events == []
    same(loaded.state, state)
    assert loaded.state["weights"]["a"] is loaded.state["weights"]["tied"]  # written once
    generator = np.random.Philox(0)
    generator.state = loaded.state["philox"]
    assert np.random.Generator(generator).random() == np.random.Generator(np.random.Philox(5)).random()


def test_a_state_that_cannot_be_written_says_where(tmp_path):
    with pytest.raises(TypeError, match=r"state.a\[1\] is a set"):
        save_checkpoint(tmp_path, 1, {"a": [1, {2}]})
    with pytest.raises(TypeError, match=r"state.a: key \(1, 2\)"):
        save_checkpoint(tmp_path, 1, {"a": {(1, 2): 3}})
    assert load_latest(tmp_path) == (0, None, [])


def steps_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_k_stay(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, {"n": step}, keep=2)
    save_checkpoint(tmp_path, 6, {"n": -6}, keep=2)  # the same step again
    assert load_latest(tmp_path).state == {"n": -6}
    assert steps_of(tmp_path) == ["step-00000005", "step-00000006"]


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda path: damage_byte(path / "tensors.safetensors"), "tensors.safetensors does not match its checksum"),
        (lambda path: damage_byte(path / "state.json"), "state.json does not match its checksum"),
        (lambda path: os.truncate(path / "tensors.safetensors", 20), "tensors.safetensors does not match"),
        (lambda path: (path / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text('{"step"'), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"step": 2, "sha256": {}}'), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, harm, what):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.arange(100) + step})
    harm(tmp_path / "step-00000002")
    loaded = load_latest(tmp_path)
    assert loaded.step == 1
    assert torch.equal(loaded.state["x"], torch.arange(100) + 1)
    [event] = loaded.events
    assert event["event"] == "damaged checkpoint"
    assert event["checkpoint"].endswith("step-00000002")
    assert what in event["what"]
    save_checkpoint(tmp_path, 2, {"x": torch.arange(3)}, keep=1)
    assert load_latest(tmp_path).step == 2


def test_all_damaged(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.arange(3)})
        damage_byte(tmp_path / f"step-{step:08d}" / "tensors.safetensors")
    loaded = load_latest(tmp_path)
    assert (loaded.step, loaded.state, len(loaded.events)) == (0, None, 2)
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(tmp_path / "step-00000002")


def test_leftovers_of_a_death_are_cleaned(tmp_path):
    save_checkpoint(tmp_path, 1, {"n": 1})
    (tmp_path / ".tmp-step-00000002-99").mkdir()
    (tmp_path / ".tmp-step-00000002-99" / "tensors.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path).step == 1
    assert steps_of(tmp_path) == ["step-00000001"]


# ---------------------------------------------------------------- a full disk


def test_full_disk_while_saving(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"n": 1})
    for where in ("temper.runs._write", "temper.runs.fsync", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(UserError, match=r"step-00000002: no space left on the disk; the checkpoint before it is whole; free some"):
                save_checkpoint(tmp_path, 2, {"n": 2})
        assert steps_of(tmp_path) == ["step-00000001"]
        assert load_latest(tmp_path).state == {"n": 1}


def test_full_disk_as_safetensors_words_it(tmp_path, monkeypatch):
    def rust(*_):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", rust)
    with pytest.raises(UserError, match="no space left"):
        save_checkpoint(tmp_path, 2, {"n": torch.zeros(3)})


def test_full_disk_while_writing_files_and_logs(tmp_path, monkeypatch):
    atomic_write(tmp_path / "x", "old")
    run = Run.claim(tmp_path / "r", IDENTITY)
    run.log("metrics", {"step": 1})
    monkeypatch.setattr("temper.runs._write", full)
    with pytest.raises(UserError, match=r"x: no space left on the disk; what stood there before is unchanged"):
        atomic_write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "x"]
    monkeypatch.setattr("os.write", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: no space left.*the last checkpoint is whole"):
        run.log("metrics", {"step": 2})
    with pytest.raises(UserError, match="no space left"):
        Run.claim(tmp_path / "new", IDENTITY)
    monkeypatch.undo()
    assert run.rows("metrics") == [{"step": 1}]
    Run.claim(tmp_path / "new", IDENTITY).close()  # nothing half-written stands in the way
    assert json.loads((tmp_path / "new" / "stage.json").read_text())["status"] == "running"


def test_an_unfinished_run_goes_on_where_only_rounding_differs(tmp_path):
    identity = {"settings": {"lr": 0.1, "shard": "none"}, "ranks": 2}
    with Run.claim(tmp_path / "r", identity):
        pass
    other = {"settings": {"lr": 0.1, "shard": "full"}, "ranks": 1}
    with Run.claim(tmp_path / "r", other, rounding=("ranks", "shard")) as run:
        (event,) = [row for row in run.rows("events") if row["event"] == "changed"]
        assert event["what"] == "identity.ranks 2 there, 1 here, identity.settings.shard none there, full here"
        assert run.stage["identity"] == other
    with pytest.raises(UserError, match="lr"):
        Run.claim(tmp_path / "r", {"settings": {"lr": 0.2, "shard": "full"}, "ranks": 1}, rounding=("ranks", "shard"))
    with Run.claim(tmp_path / "r", other) as run:
        run.finish({"steps": 1})
    with pytest.raises(UserError, match="ranks 1 there, 2 here"):
        Run.claim(tmp_path / "r", {**other, "ranks": 2}, rounding=("ranks", "shard"))
