"""The emulator itself, by small kernels: what it computes, and that it reports what it is there to report."""

import ctypes
import re

import pytest
import torch
from op_cases import assert_same_bits, normal
from simt_kernels import Kernels, Launch
from simt_library import build

SEEDS = range(20)


@pytest.fixture(scope="module")
def kernels(built):
    return Kernels(build("test_kernels"))


def ints(values):
    values = list(values)
    return (ctypes.c_int32 * len(values))(*values)


def caught(kernels, launches, values, size, expected):
    """Of how many seeds: an error, or something else than what is expected."""
    count = 0
    for seed in SEEDS:
        kernels.set(seed)
        data = ints(values)
        count += kernels.run(launches, data, size) != "" or list(data) != list(expected)
    return count


def test_block_barrier(kernels):
    """Two blocks of four warps: right with the barrier at every seed, wrong without it at nearly every one."""
    expected = [*range(127, -1, -1), *range(255, 127, -1)]
    assert caught(kernels, Launch("reverse", blocks=2), range(256), 0, expected) == 0
    assert caught(kernels, Launch("reverse_without_barrier", blocks=2), range(256), 0, expected) >= 18


def test_grid_barrier(kernels):
    expected = [*range(6), *range(1, 6), 0]
    launch = Launch("next_block", blocks=6, cooperative=True)
    assert caught(kernels, launch, [-5] * 12, 0, expected) == 0
    assert caught(kernels, launch._replace(kernel="next_block_without_barrier"), [-5] * 12, 0, expected) >= 18


def test_shared_memory_starts_as_nan_in_every_block(kernels):
    data = ints([0] * 2 * 5 * 64)
    assert kernels.run(Launch("find_shared", blocks=5, threads=64, shared_bytes=256), data) == ""
    assert set(data) == {-1}


def test_shared_memory_is_the_blocks_own(kernels):
    data = ints([0] * 6 * 32)
    assert kernels.run(Launch("own_shared", blocks=6, threads=32, cooperative=True), data, 50) == ""
    assert list(data) == [100 * block + 50 for block in range(6) for _ in range(32)]


def test_warp_functions(kernels):
    data = ints([0] * 5 * 64)
    assert kernels.run(Launch("warp_functions", threads=64), data) == ""
    third = sum(1 << lane for lane in range(32) if lane % 3 == 0)
    third -= 2**32 if third >= 2**31 else 0
    for i in range(64):
        lane = i % 32
        assert data[5 * i : 5 * i + 5] == [7, lane ^ 5, lane - 3 if lane >= 3 else lane, third, 31 * 16]


def test_atomics(kernels):
    turns = set()
    for seed in SEEDS:
        kernels.set(seed)
        data = ints([0] * (5 + 256))
        assert kernels.run(Launch("atomics", blocks=2), data) == ""
        assert data[:5] == [256, 255, 512, 1, 1]
        assert sorted(data[5:]) == list(range(256))
        turns.add(tuple(data))
        again = ints([0] * (5 + 256))
        kernels.set(seed)
        kernels.run(Launch("atomics", blocks=2), again)
        assert list(again) == list(data), "the seed does not determine the schedule"
    assert len(turns) == len(SEEDS), "different seeds give the same schedule"


def test_threads_interleave_at_atomics(kernels):
    """A read and a write that should have been one atomicAdd."""
    assert caught(kernels, Launch("lost_updates"), [0], 0, [128]) == len(SEEDS)


# ---------------------------------------------------------------- copies, launches that overlap


def test_copies_arrive_when_they_are_waited_for(kernels):
    values = [*range(512), *[-5] * 1024]
    backwards = [4 * i + j for i in range(127, -1, -1) for j in range(4)]
    launch = Launch("copy_reversed", shared_bytes=4096)
    assert caught(kernels, launch, values, 512, [*range(512), *backwards, *[0] * 512]) == 0
    expected = [*range(512), *backwards, *[-5] * 512]
    one = launch._replace(kernel="copy_reversed_waiting_for_one")
    assert caught(kernels, one, values, 512, expected) == 0, "the group that is read is not the last one"
    for kernel in ("copy_reversed_waiting_for_none", "copy_reversed_without_waiting"):
        assert caught(kernels, launch._replace(kernel=kernel), values, 512, expected) == len(SEEDS)


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("copy_unaligned", "starts a copy from or to an address that is not a multiple of 16 bytes"),
        ("copy_to_global", "starts a copy to an address outside of shared memory"),
        ("load_unaligned_matrices", "loads a matrix row from an address that is not a multiple of 16 bytes"),
    ],
)
def test_copies_and_matrices_are_of_16_bytes(kernel, error, kernels):
    memory = ints([0] * 64)
    start = -ctypes.addressof(memory) % 16 // 4  # data at a multiple of 16 bytes
    data = (ctypes.c_int32 * 32).from_buffer(memory, 4 * start)
    assert error in kernels.run(Launch(kernel, threads=32, shared_bytes=512), data, 4)


def test_overlapping_launches(kernels):
    """The second launch begins before the first has written; it is right if it waits, and only then."""
    expected = [*range(256), *range(256)]
    first = Launch("write_late", blocks=2)
    second = Launch("copy_from_before", blocks=2, overlaps=True)
    assert caught(kernels, [first, second], [-5] * 512, 256, expected) == 0
    without = second._replace(kernel="copy_from_before_without_waiting")
    assert caught(kernels, [first, without], [-5] * 512, 256, expected) >= 15
    assert caught(kernels, [first, without._replace(overlaps=False)], [-5] * 512, 256, expected) == 0


# ---------------------------------------------------------------- errors in kernels


@pytest.mark.parametrize(
    ("launch", "error"),
    [
        (Launch("diverge", threads=32), "while other lanes of its warp are at"),
        (Launch("diverge_at_barrier", threads=32), "while other lanes of its warp are at"),
        (
            Launch("leave_before_shuffle", threads=32),
            "leaves the kernel while other lanes|lanes of its warp have .* left",
        ),
        (Launch("leave_before_barrier"), "leaves the kernel while other threads|threads of its block have .* left"),
        (Launch("some_lanes", threads=32), "calls a warp function for some of the lanes only"),
        (Launch("next_block", blocks=2), "at a grid barrier, but the launch is not cooperative"),
        (Launch("wait_forever"), "waits for something that does not happen"),
        (Launch("copy_unaligned"), "uses dynamic shared memory, but the launch asked for none"),
        (Launch("fill_stack"), "the stack of 64 KB is too small"),
    ],
    ids=lambda value: value.kernel if isinstance(value, Launch) else "",
)
def test_errors_name_kernel_block_and_thread(launch, error, kernels):
    for seed in range(5):
        kernels.set(seed)
        message = kernels.run(launch, ints([0] * 128))
        assert re.search(error, message), message
        name = launch.kernel
        assert re.search(rf"kernel .*\b{name}\b.* at .*kernels\.cu:\d+, block \d, thread \d+", message), message
    kernels.set()
    data = ints(range(128))
    assert kernels.run(Launch("reverse"), data) == "" and list(data) == list(range(127, -1, -1)), "it goes on as before"


def test_deadlock_says_who_waits_where(kernels):
    message = kernels.run(Launch("deadlock", threads=64, cooperative=True), ints([0]))
    assert message.startswith("simt: deadlock:")
    for at in ("a grid barrier", "__syncthreads"):
        assert re.search(
            rf"(?s)32 threads are at {at} \(.*deadlock at \S*kernels\.cu:\d+\), the first: kernel", message
        )


# ---------------------------------------------------------------- launches the device refuses


@pytest.mark.parametrize(
    ("launch", "error"),
    [
        (Launch("find_shared", shared_bytes=48 << 10), ""),
        (Launch("copy_reversed", shared_bytes=(48 << 10) + 16), "invalid argument"),
        (Launch("find_shared", shared_bytes=227 << 10, ask_for_shared=227 << 10), ""),
        (Launch("own_shared", ask_for_shared=(227 << 10) + 1), "invalid argument"),
        (Launch("reverse", threads=1056), "invalid configuration argument"),
        (Launch("reverse", threads=33), "invalid configuration argument"),
        (Launch("reverse", threads=0), "invalid configuration argument"),
        (Launch("reverse", blocks=0), "invalid configuration argument"),
        (Launch("own_shared", blocks=6, cooperative=True), ""),
        (Launch("own_shared", blocks=7, cooperative=True), "too many blocks in cooperative launch"),
        # Of 100 KB, two blocks fit on a multiprocessor; of 120 KB, one.
        (Launch("own_shared", 6, 128, 100 << 10, 100 << 10, cooperative=True), ""),
        (Launch("own_shared", 4, 128, 120 << 10, 120 << 10, cooperative=True), "too many blocks in cooperative launch"),
    ],
    ids=str,
)
def test_limits(launch, error, kernels):
    kernels.set()
    assert kernels.run(launch, ints([0] * 2048)) == error


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "asked", "expected"),
    [(128, 0, 0, 9), (256, 0, 0, 8), (1024, 0, 0, 2), (32, 60000, 60000, 3), (32, 60000, 0, 0)],
)
def test_occupancy(threads, shared_bytes, asked, expected, kernels):
    """None where more shared memory is needed than was asked for."""
    kernels.set(multiprocessors=1, blocks_each=9)
    assert kernels.library.test_resident(*map(ctypes.c_int64, (threads, shared_bytes, asked))) == expected


# ---------------------------------------------------------------- numbers


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions(dtype, kernels):
    """Every 16-bit number; float32 numbers around each border between two of them, and random bits. As torch does."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    size, kind = ctypes.c_int64(2**16), ctypes.c_int(dtype is torch.bfloat16)
    wide = torch.empty(2**16)
    kernels.library.test_to_float(pointer(every), pointer(wide), size, kind)
    torch.testing.assert_close(wide, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    finite = wide[wide.isfinite()]
    borders = ((finite.sort().values[1:].double() + finite.sort().values[:-1].double()) / 2).float()
    up, down = torch.full_like(borders, torch.inf), torch.full_like(borders, -torch.inf)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32).view(torch.float32)
    ends = torch.tensor(
        [65504.0, 65519.9, 65520.0, 3.4e38, torch.inf, 2**-25, 1.0001 * 2**-25, 2**-149, 0.0, torch.nan]
    )
    given = torch.cat([wide, borders, borders.nextafter(up), borders.nextafter(down), noise, ends, -ends])
    narrow = torch.empty(len(given), dtype=torch.int16)
    kernels.library.test_from_float(pointer(given), pointer(narrow), ctypes.c_int64(len(given)), kind)
    got, expected = narrow.view(dtype), given.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[~got.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_product(dtype, kernels):
    a, b = normal(16, 16, seed=1, dtype=dtype), normal(16, 8, seed=2, dtype=dtype)
    data = torch.zeros(192 + 128, dtype=torch.int32)
    data[:192] = torch.cat([a.flatten(), b.flatten()]).view(torch.int32)
    name = "multiply_bf16" if dtype is torch.bfloat16 else "multiply_fp16"
    assert kernels.run(Launch(name, threads=32, shared_bytes=768), pointer(data)) == ""
    got = data[192:].view(torch.float32).reshape(16, 8)
    torch.testing.assert_close(got, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
