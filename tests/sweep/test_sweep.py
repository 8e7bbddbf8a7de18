"""A sweep makes every cell once, in one folder each, and finds the boundary from what they say."""

import pytest

from tensormix.methods import Mixt, ZeroMethod
from tensormix.recipe import Cell, Recipe, Sweep, schedule
from tensormix.report import build_report
from tensormix.run import STAGES, stage_rows
from tensormix.storage.files import read_json
from tensormix.sweep.boundaries import boundary_rows
from tensormix.sweep.depths import cell_recipe, cost, run_sweep, within


def sweep(tiny, **changes):
    recipe = {
        "model": str(tiny),
        "evaluate": {"exam": {"num_questions": 16, "shots": 1}},
        "diagnose": {"num_prompts": 4},
    }
    return Sweep.model_validate(
        {
            "recipe": recipe,
            "vary": {"num_branches": [2]},
            "directions": {"last": {"depths": "all"}, "first": {"depths": [2]}},
            "baselines": {"methods": ["zero", "drop_blocks"], "depths": [3]},
        }
        | changes
    )


def mixt(direction, depth, num_branches, **settings):
    blocks = schedule(direction, 12)[:depth]
    method = Mixt(num_branches=num_branches, **settings)
    return Cell(direction=direction, blocks=blocks, method=method, settings={"num_branches": num_branches})


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    told = []
    run_sweep(sweep(tiny), folder, progress=lambda *args: told.append(args))
    return folder, told


def test_every_cell_has_its_folder_and_depth_zero_is_the_dense_model(finished):
    folder, _ = finished
    content = read_json(folder / "sweep.json")
    assert [row["cell"] for row in content["cells"]] == [
        "dense",
        *(f"last-0{depth}-mixt2" for depth in (1, 2, 3, 4)),
        "first-02-mixt2",
        "last-03-zero",
        "last-03-drop_blocks",
    ]
    for row in content["cells"]:
        assert stage_rows(folder / row["folder"], "evaluate")
    assert content["finished"] is not None


def test_depth_is_the_number_of_compressed_blocks_from_the_named_end(finished):
    folder, _ = finished
    assert {row["block"] for row in stage_rows(folder / "last-03-mixt2", "compress")} == {1, 2, 3}
    assert {row["block"] for row in stage_rows(folder / "first-02-mixt2", "compress")} == {0, 1}
    assert {row["operator"] for row in stage_rows(folder / "last-03-drop_blocks", "compress")} == {"Bypass"}


def test_progress_ends_at_the_whole_and_never_goes_back(finished):
    _, told = finished
    done = [step[1] for step in told]
    assert done == sorted(done)
    assert told[-1][1] == pytest.approx(told[-1][2])


def test_a_finished_sweep_does_nothing_again(finished, tiny):
    folder, _ = finished
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/evaluate.json")}
    told = []
    run_sweep(sweep(tiny), folder, progress=lambda *args: told.append(args))
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/evaluate.json")} == before
    assert told == []


def test_a_wider_sweep_keeps_the_cells_that_are_there(finished, tiny):
    folder, _ = finished
    before = (folder / "last-03-mixt2" / "evaluate.json").stat().st_mtime_ns
    told = []
    wider = sweep(tiny, directions={"last": {"depths": "all"}, "first": {"depths": [1, 2]}})
    run_sweep(wider, folder, progress=lambda *args: told.append(args[0]))
    assert set(told) == {"first-01-mixt2"}
    assert (folder / "last-03-mixt2" / "evaluate.json").stat().st_mtime_ns == before


def test_the_boundary_comes_from_the_accuracies_of_the_cells(tmp_path):
    """Planted: 0.9 up to depth 3, chance from depth 4 on."""
    from tensormix.storage.files import write_json

    def plant(name, accuracy, drift):
        row = {"kind": "accuracy", "subject": "all", "value": accuracy, "num_questions": 400}
        write_json(tmp_path / name / "evaluate.json", {"rows": [row]})
        write_json(
            tmp_path / name / "diagnose.json", {"rows": [{"kind": "drift_mean", "region": "all", "value": drift}]}
        )

    plant("dense", 0.9, 0.0)
    cells = [mixt("last", d, 4) for d in range(1, 9)]
    for cell in cells:
        plant(cell.name, 0.9 if cell.depth < 4 else 0.25, 0.01 * cell.depth + 0.03 * max(0, cell.depth - 4))
    found = {row["kind"]: row for row in boundary_rows(cells, tmp_path)}
    assert found["boundary"]["value"] == 4
    assert (found["boundary"]["method"], found["boundary"]["direction"]) == ("mixt", "last")
    assert found["drift_crossing"]["value"] == pytest.approx(4)
    assert found["drift_crossing"]["slope_after"] == pytest.approx(0.04)


def test_a_cell_changes_the_plan_alone(tiny):
    base = Recipe.model_validate(
        {
            "model": str(tiny),
            "seed": 3,
            "plan": [{"sites": ["gate", "up"], "method": {"name": "mixt", "num_branches": 2, "init": "zero"}}],
        }
    )
    made = cell_recipe(base, mixt("first", 2, 3, init="zero"))
    (rule,) = made.plan.root
    assert (rule.blocks, rule.sites) == ("first 2", ("gate", "up"))
    assert (rule.method.num_branches, rule.method.init) == (3, "zero")
    assert made.model_copy(update={"plan": base.plan}) == base


def test_a_depth_beyond_the_model_is_refused_before_anything_is_done(tiny, tmp_path):
    with pytest.raises(ValueError, match="depths asks for 9 blocks; the model has 4"):
        run_sweep(sweep(tiny, directions={"last": {"depths": [9]}}), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_size_that_a_layer_does_not_allow_is_refused_before_anything_is_done(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"last-04-mixt9: .*num_branches=9 is too large.*largest possible"):
        run_sweep(sweep(tiny, vary={"num_branches": [1, 9]}), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_work_is_estimated_by_the_blocks_that_are_left():
    assert cost(mixt("last", 6, 4), 12) == 1
    null = Cell(direction="last", blocks=tuple(range(12)), method=ZeroMethod())
    assert cost(null, 12) == pytest.approx(0.2)
    shares = []
    begun = within(shares.append, dict.fromkeys(STAGES, 0.0) | {"recover": 0.75, "profile": 0.25})
    begun("compress", 0, 1)
    begun("recover", 1, 3)
    begun("profile", 1, 1)
    assert shares == pytest.approx([0, 0.25, 1])


def test_any_setting_is_swept_along_any_direction(tiny, tmp_path):
    plan = [{"sites": ["down"], "method": {"name": "svd", "keep": 0.9}}]
    recipe = {"model": str(tiny), "plan": plan, "evaluate": {"exam": {"num_questions": 8, "shots": 0}},
              "diagnose": None, "profile": None}  # fmt: skip
    asked = {"recipe": recipe, "vary": {"keep": [0.2, 0.5]}, "directions": ["middle_out", "single"],
             "depths": [1, 2, 4], "blocks": [[0, 3]]}  # fmt: skip
    folder = run_sweep(Sweep.model_validate(asked), tmp_path)
    content = read_json(folder / "sweep.json")
    blocks = {row["cell"]: {site["block"] for site in stage_rows(folder / row["folder"], "compress")}
              for row in content["cells"][1:]}  # fmt: skip
    assert blocks["middle_out-02-svd0.5"] == {1, 2} and blocks["single-03-svd0.2"] == {3}
    assert blocks["blocks-0_3-svd0.2"] == {0, 3} and len(blocks) == 2 * (3 + 4 + 1)
    (site,) = stage_rows(folder / "single-03-svd0.2", "compress")
    assert (site["role"], site["method"]) == ("down", "svd")
    found = [(row["direction"], row["settings"]) for row in content["boundary"] if row["kind"] == "boundary"]
    assert found == [("middle_out", {"keep": 0.2}), ("middle_out", {"keep": 0.5})]  # single blocks have no depth
    assert content["cells"][1]["series"] == "low rank (SVD), keep 0.2, middle out"
    assert build_report([folder]).stat().st_size > 0
