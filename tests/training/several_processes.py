"""What test_several_processes.py runs under ``torchrun``; it leaves its findings in a folder."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import HalfGradient, tiny_images, tiny_network  # noqa: E402

from dscore_plugin.errors import TrainingError  # noqa: E402
from dscore_plugin.training import TrainingConfig, evaluate, train  # noqa: E402

CONFIGS = {
    # 50 images: the last batch of 2 leaves one of three processes without an image
    "uneven": TrainingConfig(epochs=3, learning_rate=0.05, batch_size=16, precision="float32"),
    "smoothed": TrainingConfig(
        epochs=2, learning_rate=0.05, batch_size=7, label_smoothing=0.1, precision="float32", seed=3
    ),
    "parts": TrainingConfig(epochs=2, learning_rate=0.05, batch_size=16, accumulate=2, precision="float32"),
    "mixed": TrainingConfig(
        epochs=3, learning_rate=0.05, batch_size=18, mixup=0.4, cutmix=1.0, accumulate=2, precision="float32"
    ),
    "averaged": TrainingConfig(
        epochs=3, learning_rate=0.05, batch_size=16, ema=0.8, precision="float32", track="tensorboard"
    ),
}


def regularizer_for(config: TrainingConfig) -> HalfGradient | None:
    return None if config.ema else HalfGradient()


class Poison(HalfGradient):
    def after_backward(self, model: nn.Module) -> None:
        model[-1].bias.grad.fill_(math.nan)


def main(folder: Path) -> None:
    state = Accelerator()
    images, validation = tiny_images(50, augmented=True), tiny_images(31, seed=1)
    findings = {"processes": state.num_processes, "process": state.process_index}

    for name, config in CONFIGS.items():
        model = tiny_network(norm=False)
        result = train(
            model,
            images,
            validation,
            config,
            checkpoint=folder / f"run_{name}",
            regularizer=regularizer_for(config),
        )
        save_file(model.state_dict(), folder / f"{name}_{state.process_index}.safetensors")
        findings[name] = result.rows()
        findings[f"{name}_evaluated"] = evaluate(model, validation).top1

    longer = replace(CONFIGS["uneven"], epochs=12, learning_rate=0.1)
    for name, config in (("norm", longer), ("averaged_norm", replace(longer, ema=0.8))):
        model = tiny_network(dropout=0.2)  # with batch norm: each process has statistics of its own
        findings[name] = train(model, images, validation, config).rows()
        save_file(model.state_dict(), folder / f"{name}_{state.process_index}.safetensors")

    try:
        train(tiny_network(norm=False), images, None, CONFIGS["uneven"], regularizer=Poison())
    except TrainingError as error:
        findings["error"] = str(error)
    (folder / f"findings_{state.process_index}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
