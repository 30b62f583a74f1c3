"""Models of GGUF files, which other programs use, too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .default_model import load_model
from .gguf_file import is_gguf
from .model_files import check_model_name, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(
    name: str | os.PathLike[str],
    file: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keep_dense: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer from a GGUF file, in evaluation mode.

    name: the file; or a folder or a Hub id (user/name), in which it is `file`.
    dtype: of the weights, None: `default_dtype(device)`. In bfloat16 `decode` packs those that came out of Q4_0,
        Q4_1, Q4_K, Q5_0, Q5_1, Q5_K or Q8_0 in as many bits again, of Q6_K in eight, and computes what the dequantized
        model does, to the bit: on a CPU, and in fused steps on a GPU.
    device: None takes CUDA where there is one, else the CPU.
    keep_dense: whether the dequantized weights lie in memory, 2 bytes each in bfloat16, as long as the model. False:
        they lie in a file in the cache folder, as large, which is mapped into memory. Whatever reads them finds the
        same numbers there, `model.generate` say; once `decode` on a CPU has copies for its steps, their memory is the
        system's again.
    transformers reads the file once, which takes minutes for a large one; what it made of it, but the weights, is kept
    in the cache folder (`io/gguf_index.py`), as long as neither the file nor transformers changes.
    Raises OSError, of one sentence, where there is no such file, or it is damaged, or transformers knows no such model.
    """
    if file is None and not is_gguf(name):
        raise OSError(f"{name} is no GGUF file, which end in .gguf: of a folder or a Hub id, say which file")
    return load_model(_find(name, file), dtype, device, keep_dense)


def _find(name: str | os.PathLike[str], file: str | None) -> Path:
    if file is None or Path(name).is_dir():
        return Path(name, file or "")
    from transformers.utils import cached_file

    check_model_name(name)
    try:
        return Path(str(cached_file(str(name), file)))
    except OSError as error:
        raise OSError(f"{name} has no file {file}, neither here nor on the Hub: {first_line(str(error))}") from error
