"""Models of GGUF files: loaded, computed in the file's own bits, and refused in one sentence where they are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tiny_gguf import FIVES, MIXED, copy_gguf, tiny_gguf

import cerberus_ext
from cerberus_ext.ops.step import block_bytes


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """What was found out about a file is kept."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf(path, 64, MIXED)
    return path


def test_a_file_is_a_model_and_a_tokenizer(file: Path) -> None:
    model, tokenizer = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    embeddings = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "token_embd.weight")
    values = torch.from_numpy(dequantize(embeddings.data, embeddings.tensor_type)).bfloat16()
    assert model.get_input_embeddings().weight.equal(values)
    assert tokenizer.decode(tokenizer("hello world").input_ids) == "hello world"
    again, _ = cerberus_ext.load_gguf(file.parent, file.name, dtype=torch.float32, device="cpu")
    assert again.dtype == torch.float32


@pytest.mark.parametrize(
    ("kinds", "packed"), [(MIXED, "4 packed in four bits, 1 packed"), (FIVES, "5 packed in five bits, 1 packed")]
)
def test_it_is_computed_in_its_own_bits(kinds: dict[str, GGMLQuantizationType], packed: str, tmp_path: Path) -> None:
    """Packed in as many as the file has, with the tokens of the model as it is."""
    tiny_gguf(tmp_path / "tiny.gguf", 64, kinds)
    model, tokenizer = cerberus_ext.load_gguf(tmp_path / "tiny.gguf", dtype=torch.bfloat16, device="cpu")
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    fused = cerberus_ext.decode(model, None, ids, max_new_tokens=20, fuse=True, pack=True)
    by_op = cerberus_ext.decode(model, None, ids, max_new_tokens=20, fuse=False)
    assert fused.sequences.equal(by_op.sequences)
    program = cerberus_ext.Decoder(model, pack=True).explain()
    assert (f"{packed} in eight bits" in program) == bool(block_bytes(model.get_input_embeddings().weight, 1, 4))


def changed(change: Callable[[bytearray], object]) -> Callable[[Path, Path], None]:
    def damage(source: Path, target: Path) -> None:
        content = bytearray(source.read_bytes())
        kept = change(content)
        target.write_bytes(content if kept is None else kept)  # type: ignore[arg-type]

    return damage


def retyped(content: bytearray) -> None:
    """The first tensor's type, behind its name, axes and two sizes, becomes one that there is not."""
    place = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    content[place : place + 4] = (999).to_bytes(4, "little")


def widened(content: bytearray) -> None:
    """Its first size becomes larger than the file."""
    place = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4
    content[place : place + 8] = (1 << 20).to_bytes(8, "little")


def metadata(name: str, part: int, value: int, size: int) -> Callable[[Path, Path], None]:
    """The metadata's number at `part` of what gguf reads of it becomes `value`."""

    def damage(source: Path, target: Path) -> None:
        reader, content = GGUFReader(source), bytearray(source.read_bytes())
        place = reader.fields[name].parts[part].ctypes.data - reader.data.ctypes.data
        content[place : place + size] = value.to_bytes(size, "little")
        target.write_bytes(content)

    return damage


def without_a_weight(source: Path, target: Path) -> None:
    copy_gguf(source, target, lambda tensor, weights: None if "ffn_up" in tensor.name else weights)


DAMAGE = {
    "no magic": (changed(lambda content: b"GGML" + content[4:]), "is no GGUF file"),
    "empty": (changed(lambda content: b""), "is no GGUF file"),
    "cut in its header": (changed(lambda content: content[:200]), r"is damaged \(.+\)"),
    "cut in its weights": (
        changed(lambda content: content[:-500]),
        r"is damaged \(its weights would end \d+ ",
    ),
    "an unknown type": (changed(retyped), r"is damaged \(.*999.* is not a valid GGMLQuantizationType\)"),
    "a size that does not fit": (changed(widened), r"is damaged \(.+\)"),
    "an endless array": (metadata("tokenizer.ggml.token_type", 4, 1 << 40, 8), rf"is damaged \(a length of {1 << 40} "),
    "an endless string": (metadata("tokenizer.ggml.model", 3, 1 << 40, 8), rf"is damaged \(a length of {1 << 40} "),
    "an endless name": (metadata("llama.vocab_size", 0, 1 << 40, 8), rf"is damaged \(a length of {1 << 40} "),
    "endless metadata": (metadata("GGUF.kv_count", 0, 1 << 40, 8), r"is damaged \(.+\)"),
    "endless tensors": (metadata("GGUF.tensor_count", 0, 1 << 40, 8), r"is damaged \(.+\)"),
    "no kind of model": (
        changed(lambda c: c.replace(b"architecture", b"orchitecture")),
        r"is damaged \(it has no general.architecture\)",
    ),
    "no layers": (
        metadata("llama.block_count", 3, 0, 4),
        r"is damaged \(llama.block_count is 0, .* of 1\)",
    ),
    "too many layers": (metadata("llama.block_count", 3, 1 << 31, 4), r"is damaged \(llama.block_count is \d+, "),
    "another width": (metadata("llama.embedding_length", 3, 66, 4), r"is damaged \(llama.embedding_length is 66, "),
    "too wide": (
        metadata("llama.feed_forward_length", 3, 1 << 21, 4),
        r"is damaged \(llama.feed_forward_length is ",
    ),
    "another vocabulary": (metadata("llama.vocab_size", 3, 9, 4), r"is damaged \(llama.vocab_size is 9, .* of 263\)"),
    "no name of its layers": (
        changed(lambda c: c.replace(b"block_count", b"block_cound")),
        r"is damaged \(it has no ",
    ),
    "other heads": (
        metadata("llama.attention.head_count", 3, 4, 4),
        "cannot be loaded: its weights have other shapes ",
    ),
    "other heads of keys": (metadata("llama.attention.head_count_kv", 3, 129, 4), "cannot be loaded: its weights have"),
    "no such token": (
        metadata("tokenizer.ggml.eos_token_id", 3, 9999, 4),
        "cannot be loaded: its metadata do not fit its weights or its tokens",
    ),
    "another model": (changed(lambda c: c.replace(b"llama", b"lamma")), "cannot be loaded: .*lamma is not supported"),
    "a weight that is not there": (without_a_weight, r"is damaged \(it has no model.layers.0.mlp.up_proj.weight\)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_sentence(file: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(file, tmp_path / "damaged.gguf")
    with pytest.raises(OSError, match=f"^{tmp_path}/damaged.gguf {message}") as caught:
        cerberus_ext.load_gguf(tmp_path / "damaged.gguf")
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=f"^there is no file {tmp_path}/none.gguf$"):
        cerberus_ext.load_gguf(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match=f"^there is no file {tmp_path}/none.gguf$"):
        cerberus_ext.load_gguf(tmp_path, "none.gguf")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="^nobody/nothing has no file none.gguf, neither here nor on the Hub: "):
        cerberus_ext.load_gguf("nobody/nothing", "none.gguf")
    with pytest.raises(OSError, match=f"^{tmp_path} is no GGUF file, .* say which file$"):
        cerberus_ext.load_gguf(tmp_path)
