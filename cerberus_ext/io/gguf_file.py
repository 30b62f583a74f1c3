"""Models and tokenizers of GGUF files, by transformers; and what is wrong with a file that cannot be read."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gguf_header import check_sizes, read_header
from .model_files import first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAGIC = b"GGUF"


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return not Path(name).is_dir() and str(name).endswith(".gguf")


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, its weights dequantized to `dtype`, and the tokenizer of a GGUF file.

    Raises OSError, of one sentence, where the file is not there, damaged, or of a kind that transformers does not know.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .transformers_names import dequantized_gguf

    check_gguf(path)
    options = {"dtype": dtype, "output_loading_info": True, **dequantized_gguf(path.name)}
    with redirect_stderr(io.StringIO()):  # its progress bar has no switch
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, **options)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds
            raise OSError(f"{path} cannot be loaded: {_reason(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would make some up
        raise OSError(f"{path} is damaged (it has no {missing[0]})")
    return model, tokenizer


def check_gguf(path: Path) -> None:
    """Raises OSError, of one sentence, where the file is none of GGUF, or lacks what it lists or says of its model."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise OSError(f"{path} is no GGUF file")
    try:
        read_header(path)
        reader = GGUFReader(path)
        for tensor in reader.tensors:
            name, rows = tensor.name, tensor.data.reshape(-1, tensor.data.shape[-1])
            dequantize(rows[:1], tensor.tensor_type)
        check_sizes(reader)
    except NotImplementedError as error:
        raise OSError(f"{path} has weights of a type that gguf cannot dequantize ({name}: {error})") from error
    except Exception as error:  # of numpy, where something lies outside of the file; of enum, where it has no name
        raise OSError(f"{path} is damaged ({first_line(str(error)) or type(error).__name__})") from error


def _reason(error: Exception) -> str:
    """What transformers says, but where that is advice for its callers or only an index."""
    text = first_line(str(error)) or type(error).__name__
    if "ignore_mismatched_sizes" in text or text.startswith("cannot reshape"):  # of transformers; of numpy
        return "its weights have other shapes than its metadata say"
    if isinstance(error, LookupError | ArithmeticError):
        return f"its metadata do not fit its weights or its tokens ({type(error).__name__}: {text})"
    return text
