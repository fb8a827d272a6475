"""Shows a complete plug-in: with its treatment `mean` each token takes the mean of the values in its window.

pip install ./examples/plugin && layerboost convert MODEL --plan SMMS --window 16 --out converted
"""

from layerboost.plan import TREATMENTS, TreatmentEntry


def register() -> None:
    """Adds the treatment; LayerBoost calls it once in each process. Torch is imported only when a layer computes."""
    TREATMENTS.add(
        TreatmentEntry(
            name="mean",
            letter="M",
            summary="the mean of the values inside the window",
            mechanism="layerboost_mean.mechanism:MEAN",
            fill="#cc79a7",
            needs_window=True,
            depth=0.7,
        )
    )
