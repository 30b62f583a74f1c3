"""What transformers makes of a GGUF file, without the weights: the next load takes these from the file, in its order.

transformers takes half a minute for the names of a small model's tensors, reads the header's Python object by object,
and dequantizes block by block. So what it has made once is compared with the file's own tensors, and kept in the cache
folder: configuration, tokenizer, which tensor each parameter is, in which order of its rows, and the few parameters
that are none of them (norms that a file has other by 1). Where the weights are not to stay in memory, they are kept
there, too, as numbers in a file that is mapped.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..ops.blocks import BLOCK_SIZES, dequantize_blocks
from .files import read_object, write_json, write_tensors
from .gguf_header import BFLOAT16, FLOAT16, FLOAT32, FileHeader, FileTensor, read_header
from .manifest import find_damage, has_manifest, is_listed, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PARTS, _OTHERS, _ROWS = "tensors.json", "others.safetensors", "rows.safetensors"
_DENSE = "dense.safetensors"
_VERSION = 1  # of such a folder
_FLOATS = {FLOAT32: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SAMPLES, _SAMPLED = 4, 32  # of a tensor: places, and bytes at each
_LARGEST_SHARE = 8  # of the file's bytes, that other parameters may take


class GgufIndex(NamedTuple):
    """Of one file and dtype. folder: which need not be there."""

    path: Path
    dtype: torch.dtype
    header: FileHeader
    folder: Path

    @staticmethod
    def of(path: Path, dtype: torch.dtype, cache: Path) -> GgufIndex | None:
        """None: the file cannot be read, or is one of those that gguf alone reads."""
        try:
            header, status = read_header(path), path.stat()
            sample = _sample(path, header)
        except (OSError, ValueError):
            return None
        import transformers

        made_by = (_VERSION, transformers.__version__, str(dtype), status.st_size, status.st_mtime_ns)
        digest = hashlib.sha256(repr(made_by).encode() + header.content + sample).hexdigest()[:16]
        return GgufIndex(path, dtype, header, cache / digest) if header.tensors else None

    def load(self, keep_dense: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        """The model, dequantized, and the tokenizer; None where they are not kept, or damaged. keep_dense: as in
        `load_gguf`."""
        if not has_manifest(self.folder) or find_damage(self.folder) is not None:
            return None
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig

        config = AutoConfig.from_pretrained(self.folder)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        weights = self._weights() if keep_dense else self._mapped()
        with redirect_stderr(io.StringIO()):  # its progress bar has no switch
            model, info = made.from_pretrained(
                None, config=config, state_dict=weights, dtype=self.dtype, output_loading_info=True
            )
        if info["missing_keys"] or info["unexpected_keys"]:
            return None
        model.name_or_path = model.config.name_or_path = str(self.path.parent)
        with suppress(OSError):  # a model may have none
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model, tokenizer

    def _weights(self) -> dict[str, Tensor]:
        parts = (read_object(self.folder / _PARTS) or {})["parts"]
        rows, found = load_file(self.folder / _ROWS), load_file(self.folder / _OTHERS)
        for name, (source, shape) in parts.items():
            tensor = self.header.tensors[source]
            blocks = rows_of_file(self.path, tensor)
            found[name] = numbers(blocks[rows[name]] if name in rows else blocks, tensor.kind, self.dtype).view(shape)
        return found

    def _mapped(self) -> dict[str, Tensor]:
        """The same out of a file, which is made where there is none; in memory where it cannot be written."""
        if not is_listed(self.folder, _DENSE):
            weights = self._weights()
            try:
                write_tensors(self.folder / _DENSE, weights)
                write_manifest(self.folder)
            except OSError:
                return weights
        return load_file(self.folder / _DENSE)

    def keep(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """What transformers has made of the file; nothing where that is little else than other numbers, or cannot be
        written."""
        matched, rows, others = self._match(model)
        if sum(tensor.nbytes for tensor in others.values()) > self.path.stat().st_size // _LARGEST_SHARE:
            return
        with suppress(OSError):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".") as temporary:
                made = Path(temporary) / self.folder.name
                model.config.save_pretrained(made)
                if model.generation_config is not None:
                    model.generation_config.save_pretrained(made)
                tokenizer.save_pretrained(made)
                write_json(made / _PARTS, {"parts": matched})
                write_tensors(made / _ROWS, rows)
                write_tensors(made / _OTHERS, others)
                write_manifest(made)
                _put(made, self.folder)

    def _match(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """Parameters that are a tensor of the file: its name and their shape; the order of its rows, where that is
        another; and all other parameters."""
        known: dict[tuple[int, int], list[str]] = {}
        for name, tensor in self.header.tensors.items():
            dense = numbers(rows_of_file(self.path, tensor), tensor.kind, self.dtype)
            known.setdefault(_sum_of_bits(dense), []).append(name)
        matched, rows, others = {}, {}, {}
        seen: set[int] = set()
        for name, parameter in model.state_dict().items():
            if parameter.data_ptr() in seen:
                continue  # tied
            seen.add(parameter.data_ptr())
            flat = parameter.detach().reshape(-1, parameter.shape[-1] if parameter.dim() else 1)
            for source in known.get(_sum_of_bits(flat), []) if parameter.dtype == self.dtype else []:
                order = self._order(flat, self.header.tensors[source])
                if order is None:
                    continue
                matched[name] = [source, list(parameter.shape)]
                if len(order):
                    rows[name] = order
                break
            else:
                others[name] = parameter.detach().contiguous()
        return matched, rows, others

    def _order(self, flat: Tensor, tensor: FileTensor) -> Tensor | None:
        """Of the file's rows, for them to be these; empty: their own. None: they are others."""
        dense = numbers(rows_of_file(self.path, tensor), tensor.kind, self.dtype)
        bits = _BITS[self.dtype]
        if dense.numel() != flat.numel():
            return None
        if dense.view(flat.shape).view(bits).equal(flat.view(bits)):
            return torch.empty(0, dtype=torch.int64)
        if dense.shape != flat.shape:
            return None
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(-(1 << 60), 1 << 60, (flat.shape[1],), generator=generator)
        found, wanted = ((part.view(bits).long() * factors).sum(1).argsort(stable=True) for part in (dense, flat))
        order = torch.empty_like(found)
        order[wanted] = found
        return order if dense[order].view(bits).equal(flat.view(bits)) else None


def _sample(path: Path, header: FileHeader) -> bytes:
    """Some bytes of every tensor. Two models of one family may have the same header, size and, out of an archive that
    sets it, time of change."""
    found = []
    with path.open("rb") as file:
        for tensor in header.tensors.values():
            for place in range(0, tensor.size, max(1, tensor.size // _SAMPLES)):
                file.seek(tensor.begin + place)
                found.append(file.read(_SAMPLED))
    return b"".join(found)


def _put(made: Path, folder: Path) -> None:
    """Moves the new folder to its place, where it may find a damaged one, or a whole one of another process, which may
    be reading it."""
    try:
        made.rename(folder)
    except OSError:
        if has_manifest(folder) and find_damage(folder) is None:
            return
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def rows_of_file(path: Path, tensor: FileTensor) -> Tensor:
    """(R, n) uint8: the bytes of the tensor, mapped into memory; of vectors one row."""
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    rows = int(np.prod(tensor.shape[:-1])) if tensor.shape else 1
    return mapped[tensor.begin : tensor.begin + tensor.size].view(rows, -1)


def numbers(rows: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """(R, I) of what `rows_of_file` gives."""
    if kind in _FLOATS:
        return rows.clone().view(_FLOATS[kind]).to(dtype)  # a copy is where such numbers may lie
    if kind in BLOCK_SIZES:
        return dequantize_blocks(rows, kind, dtype)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType(kind))).to(dtype)


def _sum_of_bits(flat: Tensor) -> tuple[int, int]:
    """The same in any order of the rows; and how many numbers there are."""
    return int(flat.view(_BITS[flat.dtype]).sum(dtype=torch.int64)), flat.numel()
