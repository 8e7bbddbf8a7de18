"""The predictor: what its signals say about planted damage, and about a model in which one block alone matters."""

import pytest
import torch
from typer.testing import CliRunner

from tensormix.cli.verbs import app
from tensormix.models import load_model, load_tokenizer
from tensormix.recipe import Sweep
from tensormix.sweep.predict import SIGNALS, effective_rank, largest_rise, predict, prediction_rows, rank_agreement


def planted(**curves):
    return [
        {"kind": "signal", "signal": name, "depth": depth, "value": value}
        for name, values in curves.items()
        for depth, value in enumerate(values)
    ]


def test_each_signal_says_where_it_rises_most_and_the_lower_median_is_the_prediction():
    rows = prediction_rows(planted(a=[0, 0, 1, 1.1], b=[0, 1, 1, 5], c=[0, 0, 3, 3], d=[0, 2, 3, 3.5]))
    said = {row["signal"]: row["depth"] for row in rows}
    assert said == {"a": 2, "b": 3, "c": 2, "d": 1, "all": 2}
    assert (rows[-1]["low"], rows[-1]["high"]) == (1, 3)


def test_the_effective_rank_has_a_row_and_no_say():
    rows = prediction_rows(planted(drift=[0, 0, 1], divergence=[0, 0, 1], effective_rank=[0, 1, 1]))
    assert rows[2] == {"kind": "prediction", "signal": "effective_rank", "depth": 1}
    assert (rows[-1]["depth"], rows[-1]["low"]) == (2, 2)


def test_the_effective_rank_counts_directions_around_the_mean():
    frame = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())[0]
    centred = frame[:, 1:5] - frame[:, 1:5].mean(0)
    basis = torch.linalg.qr(centred)[0]  # four orthonormal columns, each of mean zero
    for scales, expected in (((1, 1, 1, 1), 4), ((2, 2, 0, 0), 2), ((0.5, 0, 0, 0), 1)):
        states = 7.0 + basis * torch.tensor(scales)
        assert float(effective_rank(states)) == pytest.approx(expected)
    uneven = 7.0 + basis * torch.tensor([3.0, 1, 0, 0])  # shares 3/4 and 1/4
    assert float(effective_rank(uneven)) == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert float(effective_rank(torch.ones(5, 3))) == 1  # no direction at all: no infinity, no NaN


def test_a_signal_that_never_rises_says_nothing():
    assert largest_rise([(0, 1.0), (1, 1.0), (2, 0.5)]) is None
    assert prediction_rows(planted(a=[1, 1, 0]))[-1] == {
        "kind": "prediction",
        "signal": "all",
        "depth": None,
        "low": None,
        "high": None,
    }


def test_rank_agreement_is_one_for_the_same_order_and_minus_one_for_the_other():
    assert rank_agreement([1, 2, 3, 4], [0.9, 0.8, 0.5, 0.2]) == pytest.approx(1)
    assert rank_agreement([4, 3, 2, 1], [0.9, 0.8, 0.5, 0.2]) == pytest.approx(-1)
    assert rank_agreement([1, 1, 1], [0.9, 0.8, 0.5]) == 0
    # (1,2) tied in accuracy: 5 pairs agree of 6 in the signal and 5 in accuracy
    assert rank_agreement([1, 2, 3, 4], [0.9, 0.9, 0.5, 0.2]) == pytest.approx(5 / 30**0.5)


@pytest.mark.parametrize(("direction", "depth"), [("last", 3), ("first", 2)])
def test_where_one_block_alone_does_something_every_signal_names_the_depth_that_reaches_it(
    tiny, tmp_path, direction, depth
):
    model = load_model(str(tiny), dtype="float32")
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            if index != 1:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            else:
                block.mlp.down_proj.weight.mul_(5)
    model.save_pretrained(tmp_path)
    load_tokenizer(str(tiny)).save_pretrained(tmp_path)
    recover = {"text": [{"exam": True}], "window": 32}
    sweep = Sweep.model_validate(
        {"recipe": {"model": str(tmp_path), "recover": recover}, "vary": {"num_branches": [3]}}
    )
    rows = predict(sweep, direction=direction, num_prompts=4, local_tokens=128)
    values = {(row["signal"], row["depth"]): row["value"] for row in rows if row["kind"] == "signal"}
    assert set(values) == {(signal, d) for signal in SIGNALS for d in range(5)}
    before = [values["divergence", d] for d in range(5)]
    assert max(map(abs, before[:depth])) < 1e-5 < before[depth]
    said = {row["signal"]: row["depth"] for row in rows if row["kind"] == "prediction"}
    assert said["divergence"] == said["drift"] == said["effective_rank"] == said["all"] == depth


def test_any_method_of_a_sweep_along_any_direction(tiny):
    recipe = {"model": str(tiny), "recover": {"text": [{"exam": True}], "window": 32}}
    sweep = Sweep.model_validate({"recipe": recipe, "vary": {"method": [{"name": "svd", "keep": 0.5}, "zero"]}})
    rows = predict(sweep, direction="middle_to_late", variant="zero", num_prompts=4, local_tokens=64)
    assert {row["depth"] for row in rows if row["kind"] == "signal"} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"no method 'svd'; it has svd0\.5, zero"):
        predict(sweep, variant="svd")


def test_the_command_shows_the_signals_and_the_prediction(tiny, tmp_path):
    file = tmp_path / "sweep.yaml"
    looks = "evaluate: {exam: {shots: 1}}, diagnose: {num_prompts: 4}"
    file.write_text(f"recipe: {{model: {tiny}, {looks}, recover: {{text: [{{exam: true}}], window: 32}}}}\n")
    shown = CliRunner().invoke(app, ["predict", str(file)])  # four branches fit no layer of width 32
    assert "the largest possible is" in str(shown.exception)
    file.write_text(file.read_text() + "vary: {num_branches: [2]}\n")
    shown = CliRunner().invoke(app, ["predict", str(file)])
    assert shown.exit_code == 0
    assert "local_error" in shown.stdout and "Predicted boundary: " in shown.stdout
    with pytest.raises(
        ValueError, match="direction must be one of last, first, middle_out, middle_to_late, got 'lats'"
    ):
        CliRunner().invoke(app, ["predict", str(file), "--direction", "lats"], catch_exceptions=False)
