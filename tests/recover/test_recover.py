"""Recovery lowers the loss, does the same for the same seed, and goes on where it was stopped."""

from types import SimpleNamespace

import pytest
import torch

from recovery_rows import steps_of
from tensormix.compression import compress
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import MixT
from tensormix.plan import Plan
from tensormix.profile import LiveBytes
from tensormix.recover import recover
from tensormix.recover.rates import compressed_parameters
from tensormix.recover.watch import MARK, Watch, last_whole_checkpoint
from tensormix.settings import Recover, Source

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])


def settings(**changes):
    return Recover(
        **{"text": [Source(exam=True)], "steps": 6, "batch_size": 4, "window": 48, "learning_rate": 1e-2} | changes
    )


@pytest.fixture
def model(tiny):
    model = load_model(str(tiny), dtype="float32")
    compress(model, PLAN)
    return model


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_falls_and_every_step_is_in_a_row(model, tiny, tmp_path):
    seen = []
    rows = recover(
        model,
        load_tokenizer(str(tiny)),
        settings(steps=30),
        folder=tmp_path / "checkpoints",
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = steps_of(rows)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert seen == [(step, 30) for step in range(1, 31)]
    assert rows[-1]["tokens"] == 30 * 4 * 48
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert not (tmp_path / "checkpoints").exists()
    assert not model.training


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tiny, tmp_path):
    after = []
    for seed in (0, 0, 1):
        model = load_model(str(tiny), dtype="float32")
        compress(model, PLAN)
        recover(model, load_tokenizer(str(tiny)), settings(), folder=tmp_path / "c", seed=seed)
        after.append(parameters(model))
    assert same(after[0], after[1])
    assert not same(after[0], after[2])


class Stopped(Exception):
    pass


def test_a_stopped_recovery_ends_in_the_same_model(tiny, tmp_path):
    def run(folder, stop_at=None):
        model = load_model(str(tiny), dtype="float32")
        compress(model, PLAN)
        steps = []

        def progress(done, _total):
            steps.append(done)
            if done == stop_at:
                raise Stopped

        rows = recover(
            model,
            load_tokenizer(str(tiny)),
            settings(steps=8, save_every=3),
            folder=folder,
            seed=0,
            progress=progress,
        )
        return parameters(model), steps_of(rows), steps

    whole, rows, _ = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_at=5)
    assert last_whole_checkpoint(tmp_path / "cut").name == "checkpoint-3"
    again, rows_again, steps = run(tmp_path / "cut")
    assert steps == [4, 5, 6, 7, 8]
    assert same(whole, again)
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in rows_again]


def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(model, tiny, tmp_path):
    def progress(done, _total):
        if done == 7:
            raise Stopped

    with pytest.raises(Stopped):
        recover(
            model,
            load_tokenizer(str(tiny)),
            settings(steps=8, save_every=3),
            folder=tmp_path,
            seed=0,
            progress=progress,
        )
    newest = last_whole_checkpoint(tmp_path)
    assert newest.name == "checkpoint-6"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-3" / MARK).unlink()
    assert last_whole_checkpoint(tmp_path) is None


def test_only_the_compressed_parameters_move_when_asked(model, tiny, tmp_path):
    before = parameters(model)
    structured = {name for name, value in model.named_parameters() if value in compressed_parameters(model)}
    recover(model, load_tokenizer(str(tiny)), settings(parameters="compressed"), folder=tmp_path / "c", seed=0)
    moved = {name for name, value in parameters(model).items() if not torch.equal(value, before[name])}
    assert moved == structured
    assert all("core_" in name for name in structured)
    assert all(value.requires_grad for value in model.parameters())
    assert any(isinstance(module, MixT) for module in model.modules())


def test_a_dense_model_has_no_compressed_parameters(tiny, tmp_path):
    with pytest.raises(
        ValueError, match="parameters 'compressed' needs a structured operator in the model; it has none"
    ):
        recover(
            load_model(str(tiny), dtype="float32"),
            load_tokenizer(str(tiny)),
            settings(parameters="compressed"),
            folder=tmp_path / "c",
            seed=0,
        )


def test_a_loss_that_is_no_number_stops_it_and_says_what_to_change(model, tiny, tmp_path):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(
        ValueError,
        match=r"the loss is (nan|inf) at step 1, .* diverges and was stopped; there was no checkpoint yet.*now 0\.01",
    ):
        recover(model, load_tokenizer(str(tiny)), settings(), folder=tmp_path / "c", seed=0)


def test_a_bfloat16_model_stays_one(tiny, tmp_path):
    model = load_model(str(tiny), dtype="bfloat16")
    compress(model, PLAN)
    rows = steps_of(recover(model, load_tokenizer(str(tiny)), settings(), folder=tmp_path / "c", seed=0))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert all(row["loss"] > 0 for row in rows)


def test_recomputing_saves_memory_and_changes_nothing_else(tiny, tmp_path):
    peaks, after = [], []
    for recompute in (False, True):
        model = load_model(str(tiny), dtype="float32")
        compress(model, PLAN)
        with LiveBytes() as memory:
            recover(
                model,
                load_tokenizer(str(tiny)),
                settings(steps=1, batch_size=8, recompute=recompute),
                folder=tmp_path / str(recompute),
                seed=0,
            )
        peaks.append(memory.peak)
        after.append(parameters(model))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert peaks[1] < 0.9 * peaks[0]
    torch.testing.assert_close(after[1], after[0], rtol=1e-4, atol=1e-6)


def test_a_loss_that_jumps_once_is_no_divergence(tmp_path):
    """Two losses that are too high and one that is not; then three in a row, and what was saved among them goes."""
    watch = Watch(1, None, steps_before=0, phase=lambda step: "lm", diverged=1.0)
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=0.1)

    def log(step, loss):
        watch.on_log(args, SimpleNamespace(global_step=step), None, {"loss": loss, "learning_rate": 0.1})

    for step, loss in enumerate([4.0, 9.0, 9.0, 4.5, 9.0, 9.0], 1):
        log(step, loss)
    for step in (3, 4, 5, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(ValueError, match=r"the loss is 9 at step 7, learning rate 0\.1, after 4 at its best"):
        log(7, 9.0)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-3"]
