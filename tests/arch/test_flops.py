from megatron_sgt.arch.flops import Flops


def test_a_training_step() -> None:
    """Backward: twice the linear operations, 2.5 times attention's. Model FLOPs leave out scores twice and entropy."""
    flops = Flops(linear=100, attention=10) + Flops(linear=20, attention=30, entropy=7)
    assert (flops.forward, flops.backward) == (120 + 40 + 7, 240 + 100)
    assert flops.executed == 167 + 340
    assert flops.model == 3 * 160
