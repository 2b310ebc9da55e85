"""Which ranks draw the same numbers, and that streams continue exactly."""

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_sgt.compat.megatron_cpu import prepare_megatron
from megatron_sgt.parallel.rng import load_rng_state, rng_state, seed_for_training
from tests.helpers.fake_groups import fake_groups

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tracker_on_the_cpu() -> Iterator[None]:
    prepare_megatron(CPU)
    before = rng_state(CPU)
    yield
    load_rng_state(before, CPU)


def draw(count: int = 4) -> tuple[list[float], list[float], list[float]]:
    """Numbers of every stream: Python's, torch's, and the one of sharded weights and activations."""
    python = [random.random() for _ in range(count)]
    with get_cuda_rng_tracker().fork():
        sharded = torch.rand(count).tolist()
    return python, torch.rand(count).tolist(), sharded


def test_streams_of_the_ranks() -> None:
    """Tensor-parallel ranks share Python's and torch's stream; every rank shards for itself."""
    places = [(tp_rank, dp_rank) for dp_rank in range(3) for tp_rank in range(2)]
    python, shared, sharded = {}, {}, {}
    for tp_rank, dp_rank in places:
        seed_for_training(7, fake_groups(tp_rank, 2, dp_rank, 3))
        python[tp_rank, dp_rank], shared[tp_rank, dp_rank], sharded[tp_rank, dp_rank] = map(tuple, draw())
    for streams in (python, shared):
        assert all(streams[0, r] == streams[1, r] for r in range(3))
        assert len({streams[0, r] for r in range(3)}) == 3
    assert len(set(sharded.values())) == 6
    # No stream repeats another one's numbers, whatever its kind.
    assert not set(sharded.values()) & set(shared.values())


def test_streams_of_neighbouring_seeds_and_many_ranks_stay_apart() -> None:
    drawn = []
    for seed in (0, 1, 2):
        for dp_rank in (0, 1, 127):
            for tp_rank in (0, 7):
                seed_for_training(seed, fake_groups(tp_rank, 8, dp_rank, 128))
                drawn.append(tuple(draw()[2]))
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("round_trip", [False, True], ids=["", "copied"])
def test_streams_continue_exactly(round_trip: bool) -> None:
    seed_for_training(7, fake_groups(1, 2, 1, 2))
    draw(3)  # an odd place in every stream
    state = rng_state(CPU)
    if round_trip:
        state = copy.deepcopy(state)
    wanted = [draw(), draw()]
    assert wanted[0] != wanted[1]
    seed_for_training(99, fake_groups())
    load_rng_state(state, CPU)
    assert [draw(), draw()] == wanted
    load_rng_state(state, CPU)  # loading and drawing left the saved state as it was
    assert [draw(), draw()] == wanted


def test_the_state_survives_a_file(tmp_path: object) -> None:
    seed_for_training(7, fake_groups())
    path = f"{tmp_path}/rng.pt"
    torch.save(rng_state(CPU), path)
    wanted = draw()
    load_rng_state(torch.load(path, weights_only=False), CPU)
    assert draw() == wanted


def test_a_fork_leaves_the_outer_stream_alone() -> None:
    seed_for_training(7, fake_groups())
    state = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_devices_generator_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the state of its generator is a part of the streams; the GPU is pretended."""

    class Module:
        state = torch.tensor([1, 2, 3], dtype=torch.uint8)

        def get_rng_state(self, device: torch.device) -> torch.Tensor:
            return self.state.clone()

        def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
            self.state = state

    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    gpu = torch.device("cuda", 0)
    seed_for_training(7, fake_groups())
    saved = rng_state(gpu)
    wanted = draw()
    module.state = torch.zeros(3, dtype=torch.uint8)
    load_rng_state(saved, gpu)
    assert module.state.tolist() == [1, 2, 3] and draw() == wanted
    del saved["device"]  # of a run on a CPU
    module.state = torch.zeros(3, dtype=torch.uint8)
    load_rng_state(saved, gpu)
    assert module.state.tolist() == [0, 0, 0]


def test_stages_of_a_pipeline_draw_their_own_numbers() -> None:
    """The first stage draws what a model of one piece draws."""
    drawn = []
    for pp_rank in range(3):
        for dp_rank in range(2):
            seed_for_training(7, fake_groups(0, 1, dp_rank, 2, pp_rank, 3))
            drawn.append((*draw()[1], *draw()[2]))
    assert len(set(drawn)) == 6
    seed_for_training(7, fake_groups(0, 1, 1, 2))
    assert (*draw()[1], *draw()[2]) == drawn[1]
