import threading

import pytest
import torch
from PIL import Image

from img2prompt.clip.features import Images
from img2prompt.core.device import ahead, device, float32_only, half_products, has_bfloat16, off, onto


def test_what_is_read_ahead_is_in_order_one_ahead_and_closed():
    read, before = [], set(threading.enumerate())

    def items():
        for number in range(9):
            read.append(number)
            yield number

    coming = ahead(items())
    assert next(coming) == 0
    assert [next(coming) for _ in range(3)] == [1, 2, 3]
    coming.close()  # as when training stops
    assert read in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert list(ahead(range(5))) == [0, 1, 2, 3, 4]
    assert list(ahead([])) == []
    assert not set(threading.enumerate()) - before


def test_an_error_while_reading_ahead_is_raised_where_the_items_are_wanted():
    def broken():
        yield 1
        raise OSError("images/7.png: truncated")

    coming = ahead(broken())
    assert next(coming) == 1
    with pytest.raises(OSError, match="truncated"):
        next(coming)


def test_processes_that_read_images_may_be_started_by_the_thread_that_reads_ahead(tmp_path):
    """They are forked from it, and an executor's thread would break them at their end."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    images = Images([str(tmp_path / "a.png")] * 300, lambda image: torch.tensor(image.getpixel((0, 0))))
    found = list(ahead(images.batches([range(start, start + 100) for start in range(0, 300, 100)])))
    assert [batch.shape for batch in found] == [(100, 3)] * 3


def test_on_the_cpu_batches_are_float32_and_results_the_same():
    batches = [torch.arange(6).reshape(2, 3).half(), torch.ones(1, 3)]
    there = list(onto(iter(batches), "cpu"))
    assert all(x.dtype == torch.float32 for x in there)
    assert all(map(torch.equal, there, (batch.float() for batch in batches)))
    assert [found["x"].tolist() for found in off(({"x": x} for x in there), "cpu")] == [x.tolist() for x in there]


def test_a_device_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setenv("IMG2PROMPT_DEVICE", "tpu")
    with pytest.raises(ValueError, match="IMG2PROMPT_DEVICE: 'tpu' is not here; choose from cpu"):
        device()
    monkeypatch.setenv("IMG2PROMPT_DEVICE", "cpu")
    assert device() == "cpu"
    # Apple's, where torch has it; it has no kernels to be switched on or off.
    monkeypatch.setenv("IMG2PROMPT_DEVICE", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device() == "mps"
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("flags", "has"), [({"avx2": True}, False), ({"amx_bf16": True}, True), ({}, False)])
def test_a_processor_says_itself_whether_it_has_bfloat16(flags, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert has_bfloat16("cpu") is has
    with float32_only():
        assert has_bfloat16("cpu") is False
    assert has_bfloat16("cpu") is has


@pytest.mark.parametrize(("flags", "precision"), [({"avx2": True}, "highest"), ({"amx_bf16": True}, "medium")])
def test_half_precision_is_for_the_block_alone_and_for_processors_that_have_it(flags, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    with pytest.raises(KeyError), half_products("cpu"):
        assert torch.get_float32_matmul_precision() == precision
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    with half_products("meta"):
        assert torch.get_float32_matmul_precision() == "highest"


def test_products_in_half_precision_are_sums_in_float32():
    """Of numbers that bfloat16 has as they are: no sum of them is rounded to it."""
    x = torch.randint(-8, 9, (300, 400), generator=torch.Generator().manual_seed(0)).float()
    with half_products("cpu"):
        assert torch.equal(x @ x.T, (x.double() @ x.double().T).float())
