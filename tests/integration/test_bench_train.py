"""The bench of local training runs: our client, a plain loop and a pruned network, side by side."""

from __future__ import annotations

from bench.train import CHANNELS_LAST, COMPILED, PLAIN_ATTENTION, TINY, contestants

from tests.support.benches import RunBench


def test_train(run_bench: RunBench) -> None:
    result = run_bench("train")
    [row] = result["rows"]
    assert row["network"] == "unet-tiny, 1 x 8 x 8, batches of 8"
    assert min(row["client_images_s"], row["loop_images_s"], row["pruned_images_s"]) > 0
    assert [target["limit"] for target in result["targets"]] == [0.97, 1.4]


def test_variants_train_but_for_compiling() -> None:
    """Compiling takes a C++ compiler and a minute, so its side is made here and not run."""
    made = contestants(TINY[0], "cpu", variants=True)
    assert list(made) == ["loop", "client", "pruned", PLAIN_ATTENTION, CHANNELS_LAST, COMPILED]
    for name, turn in made.items():
        if name != COMPILED:
            turn(0)
