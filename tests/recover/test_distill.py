"""Distillation: the whole model, a block alone at its optimum, and what does not fit is refused."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recovery_rows import steps_of
from tensormix.compression import compress
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import LowRank, MixT, Sum
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.recover.local import distill_blocks
from tensormix.recover.rates import parameter_groups, rate_factors
from tensormix.recover.watch import last_whole_checkpoint
from tensormix.settings import Recover, Source
from tensormix.storage.files import read_json, write_json

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])


def settings(**changes):
    distill = {"top_k": 16, "local_steps": 4} | changes.pop("distill", {})
    base = {"text": [Source(exam=True)], "steps": 10, "batch_size": 4, "window": 32, "learning_rate": 3e-3}
    return Recover(**base | {"loss": "kl", "distill": distill} | changes)


def compressed(tiny, plan=PLAN):
    model = load_model(str(tiny), dtype="float32")
    compress(model, plan)
    return model


def run(model, tiny, folder, wanted, **options):
    return steps_of(
        recover(model, load_tokenizer(str(tiny)), wanted, folder=folder, seed=0, teacher=str(tiny), **options)
    )


# ---- the whole model


def exact(teacher, student):
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def test_a_model_that_is_its_teacher_has_nothing_to_learn(tiny, tmp_path):
    rows = run(load_model(str(tiny), dtype="float32"), tiny, tmp_path / "c", settings(steps=1, learning_rate=1e-9))
    assert abs(rows[0]["loss"]) < 1e-3


@pytest.fixture(scope="module")
def by_loss(tiny, tmp_path_factory):
    """The rows of the same recovery with each loss, and the divergence from the dense model afterwards."""
    found = {}
    dense = load_model(str(tiny), dtype="float32")
    ids = torch.randint(5, 500, (8, 32), generator=torch.Generator().manual_seed(1))
    for loss in ("lm", "kl", "local_then_kl"):
        folder = tmp_path_factory.mktemp(loss)
        model = compressed(tiny)
        rows = run(model, tiny, folder / "c", settings(loss=loss, steps=16, distill={"local_steps": 6, "top_k": 64}))
        with torch.no_grad():
            distance = exact(dense(ids).logits, model(ids).logits).mean().item()
        found[loss] = (rows, distance)
    return found


def test_every_loss_reads_the_same_number_of_tokens(by_loss):
    for loss, (rows, _) in by_loss.items():
        assert rows[-1]["step"] == 16, loss
        assert rows[-1]["tokens"] == 16 * 4 * 32, loss
    rows = by_loss["local_then_kl"][0]
    assert [(row["block"], row["tokens"]) for row in rows if row["kind"] == "local_loss"] == [(2, 768), (3, 768)]
    assert [row["step"] for row in rows if row["kind"] == "loss"] == list(range(7, 17))


def test_learning_from_the_teacher_ends_nearer_to_it_than_learning_from_the_text(by_loss):
    assert by_loss["kl"][1] < by_loss["lm"][1]
    assert by_loss["local_then_kl"][1] < by_loss["kl"][1]


def test_the_last_steps_learn_from_the_text_alone(tiny, tmp_path):
    rows = run(compressed(tiny), tiny, tmp_path / "c", settings(distill={"task_steps": 3}))
    assert [row["phase"] for row in rows] == ["kl"] * 7 + ["lm"] * 3
    assert rows[-1]["loss"] > 3 > rows[-4]["loss"]  # nats of a token of text, nats from the teacher


def test_the_hidden_state_term_brings_the_blocks_nearer(tiny, tmp_path):
    dense = load_model(str(tiny), dtype="float32")
    ids = torch.randint(5, 500, (8, 32), generator=torch.Generator().manual_seed(1))
    distances = []
    for weight in (0.0, 1.0):
        model = compressed(tiny)
        wanted = settings(steps=12, distill={"hidden": weight, "top_k": "all"}, held_out={"num_windows": 0})
        run(model, tiny, tmp_path / str(weight), wanted)
        with torch.no_grad():
            ours, theirs = (m.model(ids).last_hidden_state for m in (model, dense))
        distances.append(F.mse_loss(ours, theirs).item())
    assert distances[1] < distances[0]


def test_a_stopped_distillation_ends_in_the_same_model(tiny, tmp_path):
    class Stopped(Exception):
        pass

    def weights(folder, stop_at=None):
        def progress(done, _total):
            told.append(done)
            if done == stop_at:
                raise Stopped

        model, told = compressed(tiny), []
        run(model, tiny, folder, settings(loss="local_then_kl", save_every=2), progress=progress)
        return dict(model.state_dict()), told

    whole, told = weights(tmp_path / "whole")
    assert told[-1] == 10
    for stop_at in (2, 9):  # between the blocks, and behind the second checkpoint
        with pytest.raises(Stopped):
            weights(tmp_path / "cut", stop_at)
    assert last_whole_checkpoint(tmp_path / "cut").name == "checkpoint-4"
    again, told = weights(tmp_path / "cut")
    assert told[-2:] == [9, 10]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_blocks_that_have_nothing_to_learn_leave_all_steps_to_the_logits(tiny, tmp_path):
    model = compressed(tiny, Plan.model_validate([{"blocks": "last 2", "method": {"name": "zero"}}]))
    rows = run(model, tiny, tmp_path / "c", settings(loss="local_then_kl"))
    assert [row["kind"] for row in rows] == ["loss"] * 10


def test_a_diverging_run_stops_says_where_and_keeps_its_last_good_checkpoint(tiny, tmp_path):
    wanted = settings(loss="lm", steps=40, learning_rate=3.0, save_every=1, warmup=0.9, diverged=1.0)
    with pytest.raises(
        ValueError, match=r"at step \d+, learning rate \S+, after \S+ at its best: the run diverges and"
    ):
        run(compressed(tiny), tiny, tmp_path / "c", wanted)
    good = last_whole_checkpoint(tmp_path / "c")
    rows = read_json(good / "whole.json")["rows"]
    assert rows[-1]["loss"] < min(row["loss"] for row in rows) + 1.0


def test_a_judge_ends_a_recovery_whose_outcome_is_clear(tiny, tmp_path):
    asked = []
    rows = run(
        compressed(tiny),
        tiny,
        tmp_path / "c",
        settings(loss="lm", save_every=2),
        judge=lambda _model, step: asked.append(step) or step == 4,
    )
    assert asked == [2, 4]
    assert rows[-1]["step"] == 4


# ---- a block alone


class LinearBlocks(nn.Module):
    """A "model" of one linear block, whose inputs are the rows of its embedding."""

    def __init__(self, block, table):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList([block])

    def forward(self, ids, use_cache=False):
        return self.layers[0](self.embedding(ids))


def best_mixt(table, weight, cores):
    """The least error of ||X (W - W')^T||^2 over the cores of a MixT, by a dense solve: (error, error of W' = 0)."""
    op = MixT(weight.shape[1], weight.shape[0], num_branches=cores).double()
    parameters = list(op.cores)
    columns = []
    for core in parameters:
        for place in range(core.numel()):
            for other in parameters:
                other.data.zero_()
            core.data.view(-1)[place] = 1
            columns.append((table.double() @ op.to_dense().T).flatten())
    wanted = (table.double() @ weight.double().T).flatten()
    design = torch.stack(columns, 1).detach()
    solution = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution[:, 0]
    return (design @ solution - wanted).square().mean().item(), wanted.square().mean().item()


def test_local_distillation_of_a_linear_block_reaches_the_least_squares_optimum(tmp_path):
    torch.manual_seed(0)
    table = torch.randn(64, 16) @ torch.diag(torch.logspace(0, -1, 16))
    dense = nn.Linear(16, 16, bias=False)
    matched = MixT.from_dense(dense.weight.detach(), num_branches=3)
    student, teacher = LinearBlocks(matched, table), LinearBlocks(dense, table)
    optimum, _ = best_mixt(table, dense.weight.detach(), 3)

    def error():
        with torch.no_grad():
            return F.mse_loss(table @ matched.to_dense().T, table @ dense.weight.T).item()

    before = error()
    (row,) = distill_blocks(
        student,
        teacher,
        list(torch.randint(0, 64, (400, 4, 16), generator=torch.Generator().manual_seed(0))),
        trained=set(matched.parameters()),
        inputs="dense",
        learning_rate=3e-2,
        warmup=0.03,
        weight_decay=0.0,
        core_rate="same",
        autocast=None,
        folder=tmp_path,
        progress=lambda done: None,
    )
    assert before > 1.05 * optimum  # the optimum in the Frobenius norm is not the one on the inputs
    assert error() < 1.01 * optimum
    assert row["after"] < row["before"]
    assert row["tokens"] == 400 * 4 * 16


# ---- what is kept of the teacher's logits


def test_a_cache_named_in_the_recipe_is_used_by_the_next_run_and_refused_for_another_teacher(tiny, tmp_path):
    wanted = settings(steps=2, distill={"cache": str(tmp_path / "kept")})
    for folder in ("a", "b"):
        run(compressed(tiny), tiny, tmp_path / folder, wanted)
        times = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    about = read_json(tmp_path / "kept" / "cache.json")
    write_json(tmp_path / "kept" / "cache.json", about | {"teacher": "another"})
    with pytest.raises(ValueError, match=r"kept for another teacher \(another, this run has"):
        run(compressed(tiny), tiny, tmp_path / "c", wanted)


# ---- teachers that do not fit


def test_a_teacher_with_another_vocabulary_is_refused(tiny, tmp_path):
    teacher = load_model(str(tiny), dtype="float32")
    teacher.resize_token_embeddings(500)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 500 tokens and the model one of 512"):
        run(compressed(tiny), tiny, tmp_path / "c", settings(distill={"teacher": str(tmp_path / "teacher")}))


def test_a_teacher_whose_tokens_mean_something_else_is_refused(tiny, tmp_path):
    load_model(str(tiny), dtype="float32").save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(tiny)).save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="needs a teacher with the same tokenizer"):
        run(compressed(tiny), tiny, tmp_path / "c", settings(distill={"teacher": str(tmp_path / "teacher")}))


def test_a_loss_that_needs_a_teacher_says_so(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"needs a teacher; name one as distill\.teacher"):
        recover(compressed(tiny), load_tokenizer(str(tiny)), settings(), folder=tmp_path / "c", seed=0)


def test_phases_that_leave_no_step_for_the_logits_are_refused():
    with pytest.raises(ValueError, match=r"steps \(10\) must be more than .* together \(12\)"):
        settings(loss="local_then_kl", distill={"local_steps": 10, "task_steps": 2})


# ---- rates


def test_the_rate_of_a_core_grows_with_what_its_inputs_are_fewer():
    model = nn.Sequential(
        MixT(64, 64, num_branches=3), Sum(terms=[LowRank(64, 32, rank=4), MixT(64, 32, num_branches=2)])
    )
    factors = rate_factors(model)
    names = {name: factors[p] for name, p in model.named_parameters()}
    assert names["0.core_1"] == 4  # d^(N_T - 1)
    assert {name: value for name, value in names.items() if "terms.1" in name} == {
        "1.terms.1.core_0": 2,
        "1.terms.1.core_1": 2,
    }
    low_rank = sorted(value for name, value in names.items() if "terms.0" in name)
    assert low_rank == [1, 16]
    groups = parameter_groups(model, set(model.parameters()), 0.1, "fan_in")
    assert sorted(group["lr"] for group in groups) == pytest.approx([0.1, 0.2, 0.4, 1.6])
    (group,) = parameter_groups(model, set(model.parameters()), 0.1, "same")
    assert math.isclose(group["lr"], 0.1)
    assert len(group["params"]) == len(list(model.parameters()))
