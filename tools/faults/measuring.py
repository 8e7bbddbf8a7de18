"""Faults in what is measured of a model."""

from __future__ import annotations

from faults.fault import Fault

BATCHES = "evaluate/test_batches.py"
QUESTIONS = "evaluate/test_questions_file.py"

FAULTS = (
    Fault("diagnose/base.py", '"batches": batches or None', '"batches": batches', "diagnose/test_residual.py"),
    Fault("diagnose/base.py", "num_tokens += ids[:, 1:]", "num_tokens += ids", "diagnose/test_sensitivity.py"),
    Fault(
        "diagnose/boundary.py",
        "stays = below[:, place - 1, place:].all(axis=1)",
        "stays = below[:, place - 1, place]",
        "diagnose/test_boundary.py",
    ),
    Fault("diagnose/entropy.py", "if value > 0)", "if value > 0.2)", "diagnose/test_entropy.py"),
    Fault("diagnose/geometry.py", "(own - dense).abs()", "(own - dense)", "diagnose/test_geometry.py"),
    Fault("diagnose/residual.py", "((left - right)", "((left - 0.9 * right)", "diagnose/test_residual.py"),
    Fault("diagnose/residual.py", "(size / other)[both]", "(other / size)[both]", "diagnose/test_residual.py"),
    Fault("diagnose/residual.py", "return max(touched", "return min(touched", "diagnose/test_residual.py"),
    Fault("diagnose/restoration.py", "return last_wrong + 1", "return last_wrong", "diagnose/test_restoration.py"),
    Fault("diagnose/restoration.py", "wrong.flip(1)", "wrong", "diagnose/test_restoration.py"),
    Fault(
        "diagnose/restoration.py", "(total / num_tokens).sqrt()", "(total / num_tokens)", "diagnose/test_restoration.py"
    ),
    Fault("diagnose/scaling.py", "slope * unit**exponent", "slope", "diagnose/test_scaling.py"),
    Fault("diagnose/sensitivity.py", "        layers[index] = own\n", "        pass\n", "diagnose/test_sensitivity.py"),
    Fault("diagnose/spectra.py", "exponent=0.0 - slope", "exponent=0.0 + slope", "diagnose/test_spectra.py"),
    Fault("diagnose/spectra.py", "values[first - 1 : last]", "values[first : last + 1]", "diagnose/test_spectra.py"),
    Fault("diagnose/spectra.py", "(wide.T @ wide)", "(wide.T @ wide).diag().diag()", "diagnose/test_spectra.py"),
    Fault(
        "diagnose/spectral_gap.py", "tail = values[rank:]", "tail = values[rank - 1 :]", "diagnose/test_spectral_gap.py"
    ),
    Fault("diagnose/spectral_gap.py", "ord=2", 'ord="fro"', "diagnose/test_spectral_gap.py"),
    Fault("diagnose/super_weights.py", "and c.share >= self.share", "", "diagnose/test_super_weights.py"),
    Fault("diagnose/super_weights.py", "                zero(found)\n", "", "diagnose/test_super_weights.py"),
    Fault("diagnose/verdict.py", "step > self.num_steps / 2", "True", "sweep/test_sweep_search.py"),
    Fault("evaluate/batches.py", "2 * self.size >= self._too_many", "False", BATCHES),
    Fault("evaluate/batches.py", "max(rates) < GAIN * max(before)", "False", BATCHES),
    Fault("evaluate/batches.py", "self.size // 2, False", "self.size, False", BATCHES),
    Fault("evaluate/batches.py", "self.size, self.size // 2\n", "self.size, self.size - 1\n", BATCHES),
    Fault("evaluate/questions_file.py", "and len(prompts) < num_questions", "", QUESTIONS),
    Fault("evaluate/questions_file.py", "isinstance(gold, bool) or ", "", QUESTIONS),
    Fault("evaluate/questions_file.py", '.split("\\n"), 1)', '.split("\\n"))', QUESTIONS),
    Fault("evaluate/benchmarks.py", '.split("\\n"), 1)', ".splitlines(), 1)", "evaluate/test_benchmarks.py"),
    Fault(
        "evaluate/benchmarks.py",
        "for doc in part if benchmark",
        "for doc in part if 1 or benchmark",
        "evaluate/test_benchmarks.py",
    ),
    Fault("evaluate/choices.py", "own = copy.deepcopy(cache)", "own = cache", "evaluate/test_choices.py"),
    Fault(
        "evaluate/divergence.py",
        "torch.where(p > 0, p * (log_p - log_q), 0)",
        "(p * (log_p - log_q))",
        "evaluate/test_divergence.py",
    ),
    Fault("evaluate/divergence.py", "total / num_tokens", "total / len(token_ids)", "evaluate/test_divergence.py"),
    Fault(
        "evaluate/forward.py",
        "last = [len(row) - 1 for row in rows]",
        "last = [longest - 1 for row in rows]",
        "evaluate/test_choices.py",
    ),
    Fault("evaluate/harness.py", "if _key(item) not in kept.found", "if 1", "evaluate/test_harness.py"),
    Fault("evaluate/harness.py", "if lines[0] == head:", "if 1:", "evaluate/test_harness.py"),
    Fault("evaluate/harness.py", "lines[1:-1]", "lines[1:]", "evaluate/test_harness.py"),
    Fault("evaluate/harness.py", 'row.get("shots") == 0', "1", "evaluate/test_harness.py"),
    Fault(
        "evaluate/perplexity.py", "        scored = end\n", "        scored = begin\n", "evaluate/test_perplexity.py"
    ),
    Fault("profile.py", "self.live -= size", "pass", "test_profile.py"),
)
