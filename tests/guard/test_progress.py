from megatron_sgt.guard.progress import Progress


def test_marks() -> None:
    clock = iter([10.0, 11.0, 12.5, 13.0, 20.0, 21.0, 22.0])
    progress = Progress(lambda: next(clock))
    assert (progress.mark.place, progress.mark.quick) == ("start", False)
    progress.enter("train", 7)
    first = progress.mark
    assert (first.place, first.count, first.quick, first.since) == ("step 7 (train)", 1, False, 11.0)
    progress.step_done()
    progress.enter("data")
    assert (progress.mark.place, progress.mark.count, progress.mark.quick) == ("step 7 (data)", 2, True)
    progress.enter("checkpoint", 8)
    assert (progress.mark.step, progress.mark.quick) == (8, False), "saving may take longer"
    assert progress.idle_seconds() == 7.0
    progress.model_built()
    progress.enter("train", 9)
    assert not progress.mark.quick, "the first step of a larger model may take longer"
    progress.step_done()
    progress.enter("train", 10)
    assert progress.mark.quick
