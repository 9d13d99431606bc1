from hypothesis import given
from hypothesis import strategies as st

from transformers_degmix.training.data import ShardedBatchSampler


@given(
    num_images=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    num_processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_processes_share_the_batches_of_one(num_images, batch_size, num_processes, epoch):
    def batches(batch_size, rank, num_processes):
        sampler = ShardedBatchSampler(num_images, batch_size, 7, rank, num_processes)
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    whole = batches(batch_size * num_processes, 0, 1)
    shards = [batches(batch_size, rank, num_processes) for rank in range(num_processes)]
    assert [sum(parts, []) for parts in zip(*shards, strict=True)] == whole
    seen = sum(whole, [])
    assert len(set(seen)) == len(seen) and len(seen) > num_images - batch_size * num_processes


def test_order_is_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ShardedBatchSampler(50, 5, seed, 0, 1)
        sampler.epoch = epoch
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


@given(st.integers(0, 10))
def test_start_leaves_out(start):
    sampler = ShardedBatchSampler(31, 3, 0, 1, 2)
    whole = list(sampler)
    sampler.start = start
    assert list(sampler) == whole[start:]
