"""Faults in data and recovery."""

from __future__ import annotations

from faults.fault import Fault

FUSED = "inference/test_fused_siblings.py inference/test_inside_fused_siblings.py"
CONVERSATIONS = "data/test_conversations.py"

FAULTS = (
    Fault("data/conversations.py", "if self.end and text.startswith(self.end, last):", "if False:", CONVERSATIONS),
    Fault("data/conversations.py", "if self.marked and self.end and", "if False and", CONVERSATIONS),
    Fault("data/conversations.py", "text[first:last].rstrip()", "text[first:last]", CONVERSATIONS),
    Fault("data/conversations.py", "special.end() if special else last", "last", CONVERSATIONS),
    Fault("data/conversations.py", "after.rstrip() or after", "after", CONVERSATIONS),
    Fault("data/conversations.py", "else after.rstrip() or after", 'else ""', CONVERSATIONS),
    Fault("data/conversations.py", "if not found or mark in after:", "if not found:", CONVERSATIONS),
    Fault("data/conversations.py", "if first < last]", "]", CONVERSATIONS),
    Fault("data/conversations.py", "if one.startswith(other):", "if True:", CONVERSATIONS),
    Fault("data/conversations.py", "*messages[place + 1 :]", "", CONVERSATIONS),
    Fault("data/documents.py", "text = text.removeprefix(bos)", "pass", CONVERSATIONS),
    Fault("data/documents.py", "max(0, a - len(bos)), b - len(bos)", "a, b", CONVERSATIONS),
    Fault("data/documents.py", 'field.rpartition("+")[2]', 'field.partition("+")[0]', "data/test_data.py"),
    Fault(
        "data/windows.py", "(IGNORED)\n            ids += new", "(0)\n            ids += new[1:]", "data/test_data.py"
    ),
    Fault("data/windows.py", "epoch, place = divmod(", "place, epoch = divmod(", "data/test_data.py"),
    Fault("data/windows.py", " and ids[-1] != separator", "", CONVERSATIONS),
    Fault("data/windows.py", 'counted[-1:] == b"\\1"', "True", "data/test_data.py"),
    Fault("data/windows.py", "ends and counted", "counted", "data/test_data.py"),
    Fault("data/windows.py", "counted[:, 1:].any(1)", "counted[:, :1].any(1)", CONVERSATIONS),
    Fault("data/windows.py", "_window(windows, order[place])", "_window(windows, place)", "recover/test_recover.py"),
    Fault("data/windows.py", "start < last and first < stop", "start <= last and first < stop", CONVERSATIONS),
    Fault(
        "exam/families.py",
        "num_smaller = min(random.randrange(4), len(smaller))",
        "num_smaller = min(1, len(smaller))",
        "exam",
    ),
    Fault("exam/questions.py", "gold = random.randrange(4)", "gold = random.randrange(3)", "exam"),
    Fault(
        "recover/finetune.py",
        '_checkpointing(model, "enable")({"use_reentrant": False})',
        "pass",
        "recover/test_recover.py",
    ),
    Fault(
        "recover/finetune.py", '{"text", "loss_on", "held_out"}', '{"text", "held_out"}', "data/test_answers_only.py"
    ),
    Fault("recover/finetune.py", "parameter.requires_grad_(parameter in trained)", "pass", "recover/test_recover.py"),
    Fault(
        "recover/local.py",
        "entering[inputs], targets",
        "entering[inputs], entering[inputs]",
        "recover/test_distill.py",
    ),
    Fault("recover/patches.py", "patch.left.zero_()", "patch.left.fill_(1e-3)", "recover/test_lora.py"),
    Fault(
        "recover/lora.py", '"lr": learning_rate * self.settings.scale', '"lr": learning_rate', "recover/test_lora.py"
    ),
    Fault("recover/lora.py", "right.operator.requires_grad_(not first)", "pass", "recover/test_lora.py"),
    Fault("recover/lora.py", "matrix.add_(patch.operator.to_dense())", "pass", "recover/test_lora.py"),
    Fault("recover/lora.py", "        attach(model)  # checkpoints", "        # checkpoints", "recover/test_lora.py"),
    Fault("recover/lora.py", "new.bias, old.bias = old.bias, None", "pass", "recover/test_lora.py"),
    Fault("recover/patches.py", 'train.get_parameter(f"core_{last}").zero_()', "pass", "recover/test_patches.py"),
    Fault("recover/zeroth_order.py", "/ (2 * size * number)", "/ (2 * size)", "recover/test_zeroth_order.py"),
    Fault("recover/zeroth_order.py", "begun + query", "query", "recover/test_zeroth_order.py"),
    Fault("recover/zeroth_order.py", 'distance * group["unit"]', "distance", "recover/test_zeroth_order.py"),
    Fault("recover/patches.py", "    first.mul_(scale)", "    pass", "recover/test_patches.py"),
    Fault(
        "recover/losses.py",
        " + kept.tail * excess(kept.drawn, kept.drawn_values).mean(-1)",
        "",
        "recover/test_losses.py",
    ),
    Fault(
        "recover/losses.py",
        ".gather(-1, tokens.long()) + total",
        ".gather(-1, tokens.long())",
        "recover/test_losses.py",
    ),
    Fault("recover/rates.py", "if is_replacement(module)", 'if hasattr(module, "sizes")', "recover/test_rates.py"),
    Fault("recover/rates.py", "operator.in_features / parameter.shape[-1]", "1.0", "recover/test_distill.py"),
    Fault("recover/teacher.py", "return len(there) >= len(ids)", "return True", "recover/test_teacher.py"),
    Fault(
        "recover/trainer.py", "return not taught and bool(", "return not taught or bool(", "data/test_answers_only.py"
    ),
    Fault("recover/trainer.py", "    if not which.any():\n", "    if not taught:\n", "data/test_answers_only.py"),
    Fault("recover/trainer.py", "self.logits[self.first + index]", "self.logits[index]", "recover/test_teacher.py"),
    Fault("recover/watch.py", 'if row["loss"] != 0', "", "data/test_answers_only.py"),
    Fault("recover/watch.py", "== _sizes(checkpoint)", "is not None", "recover/test_recover.py"),
    Fault("recover/watch.py", 'row["loss"] > lowest + self.diverged', "False", "recover/test_recover.py"),
    Fault("recover/first_step.py", "max(0.0, loss_sum) / promised", "promised", "recover/test_first_step.py"),
    Fault("recover/first_step.py", "parameter.grad = None", "pass", "recover/test_first_step.py"),
    Fault("recover/held_out.py", 'loss < best["loss"]', 'loss > best["loss"]', "recover/test_held_out.py"),
    Fault("recover/held_out.py", "self.trained[name].copy_(value)", "pass", "recover/test_held_out.py"),
    Fault("recover/held_out.py", 'if kept["step"] == last:', "if True:", "recover/test_held_out.py"),
    Fault("data/windows.py", "        rest[apart] = False\n", "", "recover/test_held_out.py"),
    Fault("recover/losses.py", "scatter(-1, tokens, 0.0)", "clone()", "recover/test_losses.py"),
)
