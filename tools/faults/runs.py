"""Faults in recipes, budgets, runs and their reports."""

from __future__ import annotations

from faults.fault import Fault

SEARCH = "allocation/test_search.py"
BROWSER = "report/test_report_browser.py"

FAULTS = (
    Fault("allocation/allocate.py", "* whole) - outside", "* whole)", "allocation/test_budget.py"),
    Fault(
        "allocation/allocate.py",
        "return self.files.dense_bits(self.sites[site.name])",
        "return super().dense_bits(site)",
        "allocation/test_budget.py",
    ),
    Fault("allocation/learned.py", " - kept.grad.sum()", "", "allocation/test_learned.py"),
    Fault("allocation/learned.py", "kept.copy_(bounds.within(kept))", "pass", "allocation/test_learned.py"),
    Fault(
        "allocation/laser_search.py",
        "exam_prompts(together)[num_judging:]",
        "exam_prompts(together)[:num_choosing]",
        SEARCH,
    ),
    Fault("allocation/laser_search.py", "ids[num_judging : num_judging + num_choosing]", "ids[:num_choosing]", SEARCH),
    Fault("allocation/laser_search.py", "copy.deepcopy(fitted[pair])", "fitted[pair]", SEARCH),
    Fault("allocation/laser_search.py", "    if needed > least:", "    if False:", SEARCH),
    Fault("allocation/laser_search.py", "log_softmax(0)[r", "softmax(0)[r", SEARCH),
    Fault(
        "allocation/laser_search.py",
        "min(math.floor(len(ids) * (1 - part)), len(ids) - text.window)",
        "len(ids)",
        SEARCH,
    ),
    Fault("allocation/sensitivity.py", "means[site.block or 0]", "means[0]", "allocation/test_budget.py"),
    Fault(
        "allocation/survey.py",
        "rest[min(rank, len(squares))]",
        "rest[min(rank + 1, len(squares))]",
        "allocation/test_budget.py",
    ),
    Fault("allocation/survey.py", "/ probed.error, LEAST)", ", LEAST)", "allocation/test_budget.py"),
    Fault("allocation/survey.py", "setattr(holder, child, old)", "pass", "allocation/test_budget.py"),
    Fault("reading.py", "(folder / model).exists()", "False", "recipe/test_recipe.py"),
    Fault("recipe/recipe.py", "placed[key] = placed_path(placed[key], folder)", "pass", "recipe/test_recipe.py"),
    Fault("report/boundary.py", "item.depth == min(past)", "item.depth == max(past)", "report/test_report_sweep.py"),
    Fault("report/chart.py", 'tabindex="0",', "", BROWSER),
    Fault("report/chart.py", "sorted(reversed(parts)", "sorted(list(parts)", "report/test_chart.py"),
    Fault("report/figure.py", "found.setdefault(entry.name, entry)", "pass", "report/test_report_papers.py"),
    Fault("report/measures.py", "(own - embedding)", "own", "report/test_report_papers.py"),
    Fault("report/page.css", "font-size: 14.8px", "font-size: 12.5px", BROWSER),
    Fault("report/page.css", "max-width: 100%; width: fit-content", "width: fit-content", BROWSER),
    Fault("report/page.js", 'event.pointerType === "mouse" && hide()', "hide()", BROWSER),
    Fault("report/page.js", "at + step + order.length", "at + order.length", BROWSER),
    Fault("report/pareto.py", "if value < lowest:", "if value <= lowest:", "report/test_report_pareto.py"),
    Fault("report/pareto.py", "min(known), max(known)", "max(known), max(known)", "report/test_report_pareto.py"),
    Fault("report/parts.py", "at(self.gap + HEAD, HEAD / 2)}L", "at(self.gap + HEAD)}L", "report/test_chart.py"),
    Fault("report/rendering.py", "autoescape=True", "autoescape=False", "report/test_report_sweep.py"),
    Fault("report/sites.py", "dense / own if own", "own / dense if own", "report/test_report_papers.py"),
    Fault("report/tradeoffs.py", "-0.90 + 4.87", "-0.90 + 4.78", "report/test_report_papers.py"),
    Fault("report/tradeoffs.py", "1.20 - 1.30", "1.30 - 1.20", "report/test_report_papers.py"),
    Fault("report/weights.py", "max(gaps, key=len", "min(gaps, key=len", "report/test_report_papers.py"),
    Fault("sweep/compare.py", "impossible[cell.name] = str(reason)", "pass", "sweep/test_compare.py"),
    Fault("sweep/family.py", "or len(done) < 2", "", "sweep/test_family.py"),
    Fault("sweep/family.py", 'row["model"] == "compressed"', 'row["model"] == "dense"', "sweep/test_family.py"),
    Fault("run/keys.py", "content_digest(Path(name)) for", "0 for", "run/test_keys.py"),
    Fault(
        "run/keys.py",
        "start = [code_version(), sources[recipe.model]",
        "start = [sources[recipe.model]",
        "run/test_keys.py",
    ),
    Fault("run/run.py", "with only_process(folder):", "if folder:", "run/test_two_processes.py"),
    Fault("recover/teacher.py", "with in_turn(self._file(number)):", "if True:", "run/test_two_processes.py"),
    Fault("storage/files.py", "    _sync(path.parent)\n", "", "storage/test_files.py"),
    Fault("sweep/boundaries.py", "if follow_each_other(members):", "if members:", "sweep/test_sweep.py"),
    Fault("run/keys.py", '["key"] != keys[stage]', '["key"] == ""', "run/test_run.py"),
    Fault("run/keys.py", 'del settings["batch_size"], settings["direct"]', "pass", "run/test_run_direct.py"),
    Fault("run/keys.py", '"budget": None, "search": None}', '"budget": None}', SEARCH),
    Fault("sweep/predict.py", "(after - before, depth)", "(before - after, depth)", "sweep/test_predict.py"),
    Fault(
        "sweep/predict.py", "if depth is not None and signal not in WITHOUT_A_SAY", "if depth", "sweep/test_predict.py"
    ),
    Fault("sweep/predict.py", "states - states.mean(0)", "states", "sweep/test_predict.py"),
    Fault("sweep/predict.py", "/ self.rank).log().abs()", "/ self.rank)", "sweep/test_predict.py"),
    Fault("sweep/predict.py", "total += errors.get(block, 0.0)", "total += 1", "sweep/test_predict.py"),
    Fault(
        "run/stages.py",
        "is_turned else recipe.start or self.source",
        "is_turned else self.source",
        "sweep/test_sweep_search.py",
    ),
    Fault("run/stages.py", 'self._load(self.folder / "compressed")', "self.model", "run/test_run_direct.py"),
    Fault("sweep/depths.py", "and set(c.blocks) < set(cell.blocks)]", "]", "sweep/test_sweep_search.py"),
    Fault("sweep/depths.py", "bisect_boundary(measure, max(members))", "measure(0)", "sweep/test_sweep_search.py"),
    Fault(
        "recipe/cell.py",
        'return f"{self.direction} {self.depth}"',
        'return f"last {self.depth}"',
        "sweep/test_sweep.py",
    ),
)
