import numpy as np

from img2prompt.core.blocks import Stack, blocks


def test_blocks_cover_all_rows_once():
    assert [*blocks(7, 3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [*blocks(0, 3)] == []


def test_a_stack_reads_as_the_arrays_one_below_the_other(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 3)).astype(np.float32) for n in (5, 0, 8)]
    np.save(tmp_path / "last.npy", arrays[2])
    mapped = [*arrays[:2], np.load(tmp_path / "last.npy", mmap_mode="r")]
    whole, rows = np.concatenate(arrays), rng.permutation(13)[:9]
    for stack, expected in (
        (Stack(mapped), whole),
        (Stack(mapped, rows), whole[rows]),
        (Stack([whole], rows), whole[rows]),
    ):
        assert (len(stack), stack.shape, stack.dtype) == (len(expected), expected.shape, np.float32)
        for key in (slice(2, 7), np.array([6, 0, 3]), np.array([[1, 2], [5, 1]]), np.arange(len(expected)) % 2 == 0):
            np.testing.assert_array_equal(stack[key], expected[key])
        np.testing.assert_array_equal(stack.take(np.array([4, 2]))[:], expected[[4, 2]])
