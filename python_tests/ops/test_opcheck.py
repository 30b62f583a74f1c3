"""torch.library.opcheck: schema, fake implementation and tracing of every op."""

from __future__ import annotations

import pytest
import torch
from op_cases import CPU_ONLY, CUDA_OPS, DTYPES, EXAMPLES, example
from torch._subclasses.fake_tensor import FakeTensorMode

from cerberus_ext import ops
from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def every_op(device: str) -> tuple[str, ...]:
    return tuple(EXAMPLES) if device == "cpu" else CUDA_OPS


@dtypes
@pytest.mark.parametrize("op", EXAMPLES)
def test_opcheck(op, dtype, device):
    if op not in every_op(device):
        assert op in CPU_ONLY
        return
    results = torch.library.opcheck(getattr(torch.ops.cerberus_ext, op), tuple(example(op, dtype, device).values()))
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@dtypes
@pytest.mark.parametrize("op", EXAMPLES)
def test_fake_gives_shape_dtype_and_device(op, dtype, device):
    if op not in every_op(device):
        assert op in CPU_ONLY
        return
    arguments = example(op, dtype, device)
    real = getattr(ops, op)(**arguments)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        fake = getattr(ops, op)(**fakes)
    if real is None:
        assert fake is None
        return
    for r, f in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True):
        assert (r.shape, r.dtype, r.device, r.stride()) == (f.shape, f.dtype, f.device, f.stride())


def test_every_op_has_a_function_a_specification_and_an_example():
    every = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cerberus_ext::")}
    # What is around the fused step takes lists of tensors, or no tensor: ops/step.py, test_step.py.
    around = {"make_step", "run_step", "free_step", "step_times", "packed_bytes", "pack_weights"}
    around |= {"prefer_large_pages", "release_mapped", "trim_heap"}
    around |= {"block_bytes", "pack_blocks", "eight_bit_bytes", "pack_eight_bits", "eight_bit_linear"}
    around |= {"device_block_bytes", "pack_device_blocks"}  # ops/device_step.py, simt/test_device_blocks.py
    around |= {"dequantize_blocks"}  # ops/blocks.py, test_dequantize.py
    around |= {"draft", "settle"}  # writes what it is given: ops/draft.py, test_eight_bits.py, test_settle.py
    every -= {"cpu_isa", *around}
    assert every == set(ops.__all__) == set(EXAMPLES)
    assert every <= vars(reference).keys()


@pytest.mark.parametrize("op", EXAMPLES)
def test_schema_is_the_wrapper(op):
    """One name everywhere, same argument order; only the two cache ops say that they change something."""
    schema = getattr(torch.ops.cerberus_ext, op).default._schema
    code = getattr(ops, op).__code__
    assert [argument.name for argument in schema.arguments] == list(code.co_varnames[: code.co_argcount])
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    assert written == {"write_cache": ["keys", "values"], "commit_cache": ["cache", "length"]}.get(op, [])
